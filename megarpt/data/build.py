"""Configuration to data: opens what a run reads and refuses what does not belong together, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.distributed import ProcessGroup

from megarpt.config.schema import HeldOutCorpus, LanguageModelConfig, PretrainConfig, SftConfig, TrainingConfig
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.data.answers import AnswerDataset
from megarpt.data.batches import TokenBatches
from megarpt.data.chat import AnswerFormat
from megarpt.data.samples import SampleDataset
from megarpt.data.windows import WindowDataset
from megarpt.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def build_train_batches(
    cfg: LanguageModelConfig,
    tokenizer: Tokenizer,
    *,
    dp_rank: int,
    dp_size: int,
    device: torch.device,
    streams: Sequence[str] = (),
    share_over: ProcessGroup | None = None,
) -> TokenBatches:
    """The training blend as micro-batches of one data-parallel rank, with the sidecars that the objective reads.

    Raises:
        ConfigError: batch sizes do not fit, the model's vocabulary is too small, a source lacks a stream, or the tokenizer
            cannot make answers.
        DataError: a corpus, a sidecar or a file of answers is damaged or belongs to something else.
    """
    datasets = _open_sources(cfg, tokenizer, streams)
    batches = TokenBatches(
        datasets,
        [source.weight for source in cfg.data.train],
        seed=cfg.run.seed,
        global_batch_size=cfg.batch.global_batch_size,
        micro_batch_size=cfg.batch.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        device=device,
        share_over=share_over,
    )
    if dp_rank == 0:
        _log_epochs(cfg, datasets)
    return batches


def build_eval_sets(cfg: TrainingConfig, tokenizer: Tokenizer, streams: Sequence[str] = ()) -> dict[str, SampleDataset]:
    """What a run of given text holds out, by name, for `evaluation_batches`; corpora with those of `streams` that they have a
    sidecar of. Of rollouts nothing.

    Raises:
        ConfigError: the model's vocabulary is too small, or the tokenizer cannot make answers.
        DataError: a corpus, a sidecar or a file of answers is damaged or belongs to something else.
    """
    if isinstance(cfg, SftConfig):
        return dict(zip(cfg.data.valid, _open_answers(cfg, tokenizer, cfg.data.valid.values()), strict=True))
    if isinstance(cfg, PretrainConfig):
        return {**open_held_out(cfg, tokenizer, cfg.data.valid, streams)}
    return {}


def open_held_out(
    cfg: TrainingConfig, tokenizer: Tokenizer, corpora: Mapping[str, HeldOutCorpus], streams: Sequence[str] = ()
) -> dict[str, WindowDataset]:
    """Held-out corpora, cut into the run's windows; as `build_eval_sets`."""
    datasets = {}
    for name, corpus in corpora.items():
        dataset = open_corpus(cfg, tokenizer, corpus.path, where=f"data.valid.{name}")
        for stream in streams:
            if stream in corpus.streams:
                dataset.add_stream(stream, corpus.streams[stream])
        datasets[name] = dataset
    return datasets


def open_corpus(cfg: TrainingConfig, tokenizer: Tokenizer, prefix: str, *, where: str) -> WindowDataset:
    """One corpus cut into the run's windows; `where` is the configuration key that named it.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has ids.
        DataError: the corpus is damaged or was made with another tokenizer.
    """
    dataset = WindowDataset(
        prefix,
        seq_length=cfg.data.seq_length,
        separate_documents=cfg.data.separate_documents,
        vocab_size=_vocab_size(cfg, tokenizer),
    )
    if dataset.manifest.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"{where}: corpus {prefix} was tokenized with {dataset.manifest.tokenizer.sha256[:12]}, expected data.tokenizer "
            f"({cfg.data.tokenizer}, {tokenizer.sha256[:12]}); tokenize the text again with this tokenizer, or set "
            "data.tokenizer to the corpus' own"
        )
    return dataset


def _open_sources(cfg: LanguageModelConfig, tokenizer: Tokenizer, streams: Sequence[str]) -> Sequence[SampleDataset]:
    """What the training blend is made of, in its order."""
    if isinstance(cfg, SftConfig):
        return _open_answers(cfg, tokenizer, [source.path for source in cfg.data.train])
    assert isinstance(cfg, PretrainConfig)
    _require_streams(cfg, streams)
    datasets = []
    for number, source in enumerate(cfg.data.train):
        dataset = open_corpus(cfg, tokenizer, source.path, where=f"data.train[{number}].path")
        for name in streams:
            dataset.add_stream(name, source.streams[name])
        datasets.append(dataset)
    return datasets


def _open_answers(cfg: SftConfig, tokenizer: Tokenizer, paths: Iterable[str]) -> list[AnswerDataset]:
    _vocab_size(cfg, tokenizer)
    form = AnswerFormat(tokenizer, cfg.data.chat)
    leave_out_long = cfg.data.too_long == "leave_out"
    return [AnswerDataset(path, form, seq_length=cfg.data.seq_length, leave_out_long=leave_out_long) for path in paths]


def _vocab_size(cfg: TrainingConfig, tokenizer: Tokenizer) -> int:
    vocab_size = cfg.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: got {vocab_size}, expected at least {tokenizer.vocab_size}, the size of the tokenizer "
            f"{cfg.data.tokenizer}; leave model.vocab_size out to take the tokenizer's"
        )
    return vocab_size


def _require_streams(cfg: PretrainConfig, streams: Sequence[str]) -> None:
    lacking = [
        f"data.train[{number}] ({source.path}): the objective needs the per-token stream {name!r}, got "
        f"{sorted(source.streams) or 'none'}; make it with `{_score_command(cfg, source.path, name)}` and add "
        f"`streams: {{{name}: {source.path}_{name}}}` to this source"
        for number, source in enumerate(cfg.data.train)
        for name in streams
        if name not in source.streams
    ]
    if lacking:
        raise ConfigError("\n".join(lacking))


def _score_command(cfg: PretrainConfig, corpus: str, stream: str) -> str:
    apart = "" if cfg.data.separate_documents else " --no-separate-documents"
    return f"megarpt score --reference RUN --corpus {corpus} --streams {stream} --seq-length {cfg.data.seq_length}{apart}"


def _log_epochs(cfg: LanguageModelConfig, datasets: Sequence[SampleDataset]) -> None:
    samples = -(-cfg.train.train_tokens // cfg.data.seq_length)
    weights = [source.weight for source in cfg.data.train]
    for dataset, weight in zip(datasets, weights, strict=True):
        epochs = samples * weight / sum(weights) / dataset.num_windows
        logger.info("%s, share %.3g, %.3g epochs in this run", dataset, weight / sum(weights), epochs)
