"""Which tokens of a corpus, or of any text, a student would train on: scored and chosen by the classes that training uses.

Dims: w windows that compete, s sequence.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarpt.config.schema import LanguageModelConfig, ObjectiveConfig, ParallelConfig, TrainingConfig
from megarpt.config.validate import STREAM_OF_SCORER
from megarpt.corpus.indexed import CorpusIndex, CorpusWriter, bin_path, manifest_path, token_dtype
from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, TokenizerRecord
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.data.batches import assemble, to_device
from megarpt.data.build import open_corpus
from megarpt.data.windows import WindowDataset
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
from megarpt.log import terminal
from megarpt.model.forward import token_stats
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.run.pretrained import Pretrained, held_out_corpora, load_pretrained, only_held_out
from megarpt.run.selection_page import Selection, ShownDocument, ShownToken, token_texts
from megarpt.structs import Progress, TokenBatch, TokenStats
from megarpt.train.progress import ProgressLine
from megarpt.train.reference import OnlineReference

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """What is shown, and by which rule tokens are chosen. None takes what the student was trained with."""

    student: str  # run folder or checkpoint
    reference: str | None = None  # run folder, checkpoint or sidecar prefix
    corpus: str | None = None
    documents: tuple[int, ...] | Literal["all"] | None = None  # of the corpus; None draws `num_documents`
    num_documents: int = 3
    texts: tuple[tuple[str, str], ...] = ()  # (title, text) of the user's own
    scorer: str | None = None
    fraction: float | None = None
    scope: str | None = None
    max_shown: int = 4000  # tokens of each document
    max_tokens: int = 1 << 16  # of the corpus that compete beside those that are shown
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Competition:
    """All windows that were scored. Shapes: [w, s]; NaN where there is no value."""

    source: Int64Array  # [w], 0 the texts, 1 the corpus, where there are both
    window: Int64Array  # [w], ascending within a source
    valid: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    loss: npt.NDArray[np.float32]
    reference_loss: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    rank: Int64Array
    threshold: float | None


def select_tokens(options: SelectionOptions, runtime: Runtime) -> Selection:
    """Score what is to be shown with the student and the reference, and choose as training would.

    Raises:
        ConfigError: options that do not go together, or say nothing to show.
        DataError: a corpus or sidecar is damaged or belongs to something else.
    """
    if runtime.world_size > 1:
        raise ConfigError(f"got a world of {runtime.world_size} ranks, expected one process; start it without torchrun")
    layout, parallel = ParallelLayout(), ParallelConfig()
    groups = layout.initialize(seed=0)
    student = load_pretrained(options.student, runtime, layout, groups, parallel)
    rule = selection_rule(student.config, options)
    with tempfile.TemporaryDirectory() as folder:
        datasets, shown = _open(options, student, Path(folder))
        reference, annotate = _reference(options, student, rule, datasets, runtime, groups)
        windows = _competitors(options, datasets, shown, student.config.data.seq_length)
        found = _compete(student, rule, datasets, windows, annotate, runtime, groups)
        documents = tuple(_shown(each, datasets[each.source], found, student.tokenizer) for each in shown)
    return Selection(
        student=f"{options.student} ({student.checkpoint.name})",
        reference=reference,
        scorer=rule.scorer,
        fraction=rule.fraction,
        scope=rule.scope,
        threshold=found.threshold,
        num_competing=int(found.valid.sum()),
        num_kept=int(found.kept.sum()),
        documents=documents,
    )


def selection_rule(cfg: TrainingConfig, options: SelectionOptions) -> ObjectiveConfig:
    """The student's own rule with what the options replace; excess loss at 60% for a student that selected nothing.

    Raises:
        ConfigError: a value is not allowed.
    """
    own = objective_of(cfg)
    selects = own.weighting == "top_fraction"
    chosen = {
        "scorer": options.scorer or (own.scorer if selects else "excess_loss"),
        "weighting": "top_fraction",
        "fraction": options.fraction if options.fraction is not None else (own.fraction if selects else 0.6),
        "scope": options.scope or (own.scope if own.scope in ("sequence", "microbatch") else "global_batch"),
    }
    if not 0.0 < float(str(chosen["fraction"])) <= 1.0:
        raise ConfigError(f"--fraction: got {chosen['fraction']}, expected a number above 0 and at most 1")
    return ObjectiveConfig.model_validate(chosen)


def objective_of(cfg: TrainingConfig) -> ObjectiveConfig:
    """What tokens were worth in a run; plain language modeling for a policy."""
    return cfg.objective if isinstance(cfg, LanguageModelConfig) else ObjectiveConfig()


class _Shown(NamedTuple):
    """A document that is to be shown."""

    title: str
    source: int  # index of its dataset
    start: int  # its first token
    end: int


def _open(options: SelectionOptions, student: Pretrained, folder: Path) -> tuple[list[WindowDataset], list[_Shown]]:
    """The data that compete and the documents to be shown."""
    datasets: list[WindowDataset] = []
    shown: list[_Shown] = []
    if options.texts:
        prefix = folder / "texts"
        lengths = _write_texts(prefix, [text for _, text in options.texts], student.tokenizer)
        datasets.append(open_corpus(student.config, student.tokenizer, str(prefix), where="--text"))
        ends = np.cumsum(lengths).tolist()
        shown += [
            _Shown(title, 0, end - length, end) for (title, _), end, length in zip(options.texts, ends, lengths, strict=True)
        ]
    corpus = options.corpus or (None if options.texts else only_held_out(student.config).path)
    if corpus is not None:
        dataset = open_corpus(student.config, student.tokenizer, corpus, where="--corpus")
        datasets.append(dataset)
        if not options.texts:
            shown += [
                _Shown(f"{Path(corpus).name}, document {number}", 0, start, end)
                for number, start, end in _choose_documents(options, CorpusIndex(corpus))
            ]
    return datasets, [_shortened(each, options.max_shown) for each in shown]


def _shortened(document: _Shown, limit: int) -> _Shown:
    count = document.end - document.start
    if count <= limit:
        return document
    title = f"{document.title} (the first {limit:,} of {count:,} tokens)"
    return document._replace(title=title, end=document.start + limit)


def _write_texts(prefix: Path, texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The user's texts as a corpus, each a document; tokens of each."""
    writer = CorpusWriter(prefix, token_dtype(tokenizer.vocab_size))
    end = [tokenizer.eod] if tokenizer.eod is not None else []
    documents = [np.array([*tokenizer.encode(text), *end]) for text in texts]
    if any(len(document) < 2 for document in documents):
        raise ConfigError("--text: got an empty text, expected at least two tokens, one to read and one to predict")
    for document in documents:
        writer.append(document)
    totals = writer.finish()
    manifest = CorpusManifest(
        num_documents=totals.num_documents,
        num_tokens=totals.num_values,
        dtype=writer.dtype.name,
        bin_sha256=totals.bin_sha256,
        idx_sha256=totals.idx_sha256,
        text_bytes=sum(len(text.encode()) for text in texts),
        append_eod=bool(end),
        tokenizer=TokenizerRecord.of(tokenizer),
        inputs=[],
    )
    writer.publish(manifest)
    return [len(document) for document in documents]


def _choose_documents(options: SelectionOptions, index: CorpusIndex) -> list[tuple[int, int, int]]:
    """(number, first token, end) of the documents to be shown."""
    lengths = np.concatenate([*index.document_lengths()])
    ends = np.cumsum(lengths)
    numbers = options.documents
    if numbers == "all":
        numbers = tuple(range(index.num_documents))
    if numbers is None:
        candidates = np.flatnonzero(lengths > 1)
        count = min(options.num_documents, len(candidates))
        drawn = np.random.default_rng(options.seed).choice(candidates, size=count, replace=False)
        numbers = tuple(sorted(drawn.tolist()))
    outside = [number for number in numbers if not 0 <= number < index.num_documents]
    if outside:
        raise ConfigError(f"--documents: got {outside[0]}, expected numbers from 0 to {index.num_documents - 1}")
    return [(number, int(ends[number] - lengths[number]), int(ends[number])) for number in numbers]


def _reference(
    options: SelectionOptions,
    student: Pretrained,
    rule: ObjectiveConfig,
    datasets: Sequence[WindowDataset],
    runtime: Runtime,
    groups: ProcessGroups,
) -> tuple[str, OnlineReference | None]:
    """What the reference is called, and what adds its values to batches; sidecars are opened with their corpus.

    Without one asked for, the student's own is taken: its online reference, or the sidecar of its held-out corpus.
    """
    own, needed = objective_of(student.config).reference, STREAM_OF_SCORER.get(rule.scorer)
    path = options.reference
    if path is None and own is not None:
        path = own.checkpoint
    if path is None and not options.texts and needed is not None:
        named = {corpus.path: corpus.streams for corpus in held_out_corpora(student.config).values()}
        path = named.get(datasets[0].prefix, {}).get(needed)
    if path is None:
        if needed is None:
            return "", None
        raise ConfigError(
            f"--reference: scorer {rule.scorer} ranks by a reference model, and the student's run does not say which; name a "
            "run folder, a checkpoint, or a sidecar that `megarpt score` wrote for the corpus"
        )
    if manifest_path(path).is_file() and not Path(path).is_dir():
        if options.texts:
            raise ConfigError(
                f"--reference: got the sidecar {path}, which knows the tokens of its corpus alone; name the reference model to "
                "show a text of your own"
            )
        stream = SidecarManifest.load(path).stream
        if needed is not None and stream != needed:
            raise ConfigError(f"--reference: got a sidecar of {stream}, expected {needed}, which scorer {rule.scorer} reads")
        datasets[0].add_stream(stream, path)
        return f"sidecar {path}", None
    model = load_pretrained(
        path,
        runtime,
        ParallelLayout(),
        groups,
        ParallelConfig(),
        micro_batch_size=student.config.batch.micro_batch_size,
        seq_length=student.config.data.seq_length,
    )
    if model.tokenizer.sha256 != student.tokenizer.sha256:
        raise ConfigError(
            f"--reference: {model.checkpoint} was trained with tokenizer {model.tokenizer.sha256[:12]}, expected the student's "
            f"({student.tokenizer.sha256[:12]}); losses of different tokens cannot be compared"
        )
    streams = ["ref_nll", "ref_entropy"] if needed == "ref_entropy" else ["ref_nll"]
    return f"{path} ({model.checkpoint.name})", OnlineReference(model.network, groups, streams)


def _competitors(
    options: SelectionOptions, datasets: Sequence[WindowDataset], shown: Sequence[_Shown], s: int
) -> tuple[Int64Array, Int64Array]:
    """Source and window of all that compete: what is shown, and of a corpus a sample spread evenly over it, as in a batch."""
    chosen: set[tuple[int, int]] = set()
    for each in shown:  # token i is the label of window (i - 1) // s
        chosen |= {(each.source, window) for window in range(max(each.start - 1, 0) // s, max(each.end - 2, 0) // s + 1)}
    if options.corpus is not None or not options.texts:
        source, total = len(datasets) - 1, datasets[-1].num_windows
        count = min(total, -(-options.max_tokens // s))
        chosen |= {(source, int(window)) for window in np.linspace(0, total - 1, count).round()} if count else set()
    source_of, window_of = zip(*sorted(chosen), strict=True)
    return np.array(source_of, dtype=np.int64), np.array(window_of, dtype=np.int64)


@torch.no_grad()
def _compete(
    student: Pretrained,
    rule: ObjectiveConfig,
    datasets: Sequence[WindowDataset],
    windows: tuple[Int64Array, Int64Array],
    annotate: OnlineReference | None,
    runtime: Runtime,
    groups: ProcessGroups,
) -> _Competition:
    """Score all windows and choose among them, with the scorer and the weighting of the objective."""
    source, window = windows
    size, s = student.config.batch.micro_batch_size, student.config.data.seq_length
    objective = build_objective(rule, student.config.run.seed)
    (scorer,) = objective.scorers
    batches: list[TokenBatch] = []
    losses: list[Tensor] = []
    with ProgressLine("score", len(window) * s, console=terminal()) as line:
        for begin in range(0, len(window), size):
            rows = np.arange(begin, begin + size)
            inside = rows < len(window)
            at = np.minimum(rows, len(window) - 1)
            numbers = np.where(inside, window[at], -1)
            batch = to_device(assemble(datasets, source[at], numbers, np.where(inside, rows, -1)), runtime.device)
            if annotate is not None:
                (batch,) = annotate([batch])
            (stats,) = token_stats([student.network], [batch], groups)
            batches.append(batch)
            losses.append(-stats.logprob)
            line.update(min(begin + size, len(window)) * s)
    scores = [scorer(TokenStats(-loss, None), batch, Progress()) for loss, batch in zip(losses, batches, strict=True)]
    weights = objective.weighting([scores], batches, None)
    valid = _rows([batch.loss_mask for batch in batches], len(window)).astype(np.bool_)
    unknown = torch.full_like(losses[0], torch.nan)
    score = _rows(scores, len(window))
    set_of_row = {"sequence": np.arange(len(window)), "microbatch": np.arange(len(window)) // size}.get(rule.scope)
    thresholds = {float(each.threshold) for each in weights if each.threshold is not None}
    return _Competition(
        source=source,
        window=window,
        valid=valid,
        kept=_rows([each.weight > 0.0 for each in weights], len(window)).astype(np.bool_) & valid,
        loss=_rows(losses, len(window)),
        reference_loss=_rows([batch.streams.get("ref_nll", unknown) for batch in batches], len(window)),
        score=score,
        rank=_ranks(score, valid, set_of_row),
        threshold=thresholds.pop() if rule.scope == "global_batch" and len(thresholds) == 1 else None,
    )


def _rows(parts: Sequence[Tensor], count: int) -> npt.NDArray[np.float32]:
    """Shapes: [b, s] each -> [w, s], without rows of padding."""
    return np.asarray(torch.cat([part.float() for part in parts]).cpu().numpy()[:count])


def _ranks(score: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], set_of_row: Int64Array | None) -> Int64Array:
    """Place of every valid token among those of its set, from 1; equal scores by position, as they are chosen."""
    rank = np.zeros(score.shape, dtype=np.int64)
    rows = np.zeros(len(score), dtype=np.int64) if set_of_row is None else set_of_row
    for number in np.unique(rows):
        members = np.flatnonzero(valid & (rows == number)[:, None])
        best_first = members[np.argsort(-score.flat[members], kind="stable")]  # NaN comes last
        rank.flat[best_first] = np.arange(1, len(members) + 1)
    return rank


def _shown(document: _Shown, dataset: WindowDataset, found: _Competition, tokenizer: Tokenizer) -> ShownDocument:
    """The tokens of one document with what was found about each; value i of a window speaks of its label i."""
    start, end, s = document.start, document.end, dataset.seq_length
    ids = np.memmap(bin_path(dataset.prefix), mode="r", dtype=dataset.dtype)[start:end]
    row_of = {int(found.window[row]): row for row in np.flatnonzero(found.source == document.source)}
    tokens = []
    for position, number, text in zip(range(start, end), ids.tolist(), token_texts(tokenizer, ids), strict=True):
        window, column = divmod(position - 1, s)
        if position == 0 or not found.valid[row_of[window], column]:
            tokens.append(ShownToken(number, text))
            continue
        at = row_of[window], column
        tokens.append(
            ShownToken(
                number,
                text,
                kept=bool(found.kept[at]),
                loss=_finite(found.loss[at]),
                reference_loss=_finite(found.reference_loss[at]),
                score=_finite(found.score[at]),
                rank=int(found.rank[at]),
            )
        )
    return ShownDocument(document.title, tuple(tokens))


def _finite(value: np.float32) -> float | None:
    return float(value) if math.isfinite(value) else None
