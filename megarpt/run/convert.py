"""Published weights into the folder that `megarpt export` makes, and any checkpoint into a folder to publish.

Both sides are read one parameter at a time, and a folder appears under its name only when it is whole. `verify` computes both.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megarpt
from megarpt.config.hf_settings import Architecture, from_model_config, read_settings, to_model_config, write_settings
from megarpt.config.load import config_from_dict, config_hash, dump_resolved
from megarpt.config.schema import ParallelConfig, TrainingConfig
from megarpt.corpus.atomic import fsync_directory, require_free_bytes, write_errors
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, ConfigError, ExtensionError
from megarpt.model import build
from megarpt.model.convert_hf import VOCABULARY, Move, is_constant, misfits, moves
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.run import hf_folder
from megarpt.run.hf_folder import HuggingFaceWeights
from megarpt.run.pretrained import load_pretrained
from megarpt.run.tokenizer_files import keep_tokenizer, locate_tokenizer, tokenizer_copy
from megarpt.structs import Progress
from megarpt.train.checkpoint_files import (
    CONFIG,
    MODEL,
    Manifest,
    check_files,
    describe_file,
    read_config,
    read_manifest,
    resolve_checkpoint,
)
from megarpt.train.checkpoint_state import RunShards
from megarpt.train.environment import git_state
from megarpt.train.sharded import read_slice, read_tensor, stored_tensors
from megarpt.train.sharded_save import Distribution, complete
from megarpt.train.weights import describe_model, sharded_weights

logger = logging.getLogger(__name__)

_MAX_WINDOW = 4096  # of the windows that an imported model is evaluated on, unless its user says otherwise


def import_model(
    source: Path,
    output: Path,
    runtime: Runtime,
    *,
    vocab_size: int | None = None,
    seq_length: int | None = None,
    tokenizer: str | None = None,
    ignored: Collection[str] = (),
) -> None:
    """Make a checkpoint without training state from a folder of Hugging Face's.

    Args:
        source: with config.json, safetensors and a tokenizer.
        output: the folder to make.
        runtime: on a CPU.
        vocab_size: rows of the vocabulary to keep; None keeps all.
        seq_length: data.seq_length of the configuration; None takes what the model allows, 4096 at most.
        tokenizer: file of the tokenizer; None takes the folder's.
        ignored: keys of config.json that were found to change nothing.

    Cost: memory of one parameter, besides pages of files that the system may drop; disk of the parameters that are not merely
        copied, until the folder is whole.

    Raises:
        ConfigError: the output exists, or the options do not fit the model.
        CheckpointError: the model cannot be computed here, or the folder is damaged.
        DataError: the file system refused.
    """
    _require_absent(output)
    architecture = read_settings(hf_folder.read_json(source / hf_folder.CONFIG), ignored=ignored)
    file = Path(tokenizer) if tokenizer else hf_folder.tokenizer_file(source)
    known = load_tokenizer(str(file))
    architecture = _with_vocabulary(architecture, vocab_size, known)
    for note in architecture.notes:
        logger.warning("%s", note)
    layout, groups = _one_rank()
    with HuggingFaceWeights(source) as weights:
        if "wte.weight" in weights.shapes:  # GPT-2 was published without the prefix that its class writes
            weights.rename(lambda name: name if name == "lm_head.weight" else f"transformer.{name}")
        dtype = weights.dtype(name for name in weights.shapes if not is_constant(name))
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        cfg = _imported_config(architecture, output, file, seq_length, precision)
        network = _empty_network(cfg, layout, groups, architecture.vocab_size)
        planned = _checked_plan(architecture, network, weights)
        num_bytes = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
        require_free_bytes(output, 2 * num_bytes)
        with _whole_or_absent(output, num_bytes) as temporary:
            _fill(network, planned, weights, architecture, temporary / "scratch")
            _write_model(network, groups, temporary / MODEL)
            shutil.rmtree(temporary / "scratch")
            (temporary / CONFIG).write_text(dump_resolved(cfg), encoding="utf-8")
            keep_tokenizer(temporary, str(file))
            hf_folder.copy_companions(file.parent, temporary)
            origin = {"family": architecture.family, "config.json": describe_file(source / hf_folder.CONFIG)["sha256"]}
            Manifest(
                step=0,
                progress=asdict(Progress()),
                config_sha256=config_hash(cfg),
                tokenizer_sha256=known.sha256,
                model=describe_model(network),
                has_optimizer_state=False,
                layout=RunShards(runtime, groups).layout(),
                versions=_versions() | {"imported": origin},
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                files={str(path.relative_to(temporary)): describe_file(path) for path in _files(temporary)},
            ).write(temporary)
    logger.info("imported %s to %s: %s, %.1f MB in %s", source, output, _said(cfg), num_bytes / 1e6, precision)


def export_model(
    checkpoint: str,
    output: Path,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Make a folder as Hugging Face publishes it.

    Args:
        checkpoint: a run folder, its `checkpoints` folder, one checkpoint or an export.
        output: the folder to make.
        family: its model_type; None takes the first that can compute the model.
        dtype: of the weights; None keeps the checkpoint's.
        max_shard_bytes: of one file.

    Cost: memory of one file, and of the largest parameter.

    Raises:
        ConfigError: the output exists.
        CheckpointError: no known family computes this model, or the checkpoint is damaged.
        DataError: the file system refused.
    """
    _require_absent(output)
    source = resolve_checkpoint(checkpoint)
    cfg, manifest = read_config(source), read_manifest(source)
    architecture = from_model_config(cfg.model, manifest.model["model.vocab_size"], family)
    problems = check_files(source, manifest, [name for name in manifest.files if name.startswith(f"{MODEL}/")])
    if problems:
        raise CheckpointError("\n".join(problems))
    spec, tokenizer = locate_tokenizer(cfg, source)
    layout, groups = _one_rank()
    one_rank = cfg.model_copy(update={"parallel": ParallelConfig()})
    network = _empty_network(one_rank, layout, groups, architecture.vocab_size)
    planned = _plan(architecture, network)
    shapes = {name: shape for move in planned for name, shape in move.theirs.items()}
    stored = stored_tensors(source / MODEL)
    kinds = {kind for kind, _ in stored.values()}
    dtype = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    num_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    require_free_bytes(output, num_bytes)
    keys = {name: entry.key for name, entry in sharded_weights([network])["model0"].items()}
    with _whole_or_absent(output, num_bytes) as temporary:
        parts = (move.split(_stored_parameter(source / MODEL, move, keys, stored), architecture.heads) for move in planned)
        hf_folder.write_weights(temporary, shapes, dtype, parts, max_shard_bytes)
        name = str(dtype).removeprefix("torch.")
        hf_folder.write_json(temporary / hf_folder.CONFIG, write_settings(architecture, dtype=name, eos=tokenizer.eod))
        _write_tokenizer(temporary, spec, tokenizer, architecture.max_sequence_length)
        for path in _files(temporary):
            describe_file(path)  # makes sure that it is on the disk
    logger.info("exported %s to %s as %s: %.1f MB in %s", source, output, architecture.family, num_bytes / 1e6, name)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far two models are apart on the same tokens."""

    num_tokens: int
    max_difference: float  # of a logit
    max_logit: float
    same_choice: float  # share of tokens after which both find the same one likeliest


@torch.no_grad()
def verify(folder: Path, checkpoint: str, runtime: Runtime, *, num_sequences: int, num_tokens: int, seed: int) -> Verdict:
    """Compare the logits of both sides on random tokens, in fp32.

    Cost: memory of about ten bytes per parameter.

    Raises:
        ExtensionError: transformers is not installed.
        ConfigError: the sequences are longer than the model allows.
    """
    try:
        import transformers
    except ImportError as error:
        raise ExtensionError("verify computes with transformers, which is not installed: pip install -e '.[hf]'") from error
    layout, groups = _one_rank()
    ours = load_pretrained(checkpoint, runtime, layout, groups, ParallelConfig())
    vocab, longest = ours.network.valid_vocab_size, ours.network.max_sequence_length
    if num_tokens > longest:
        raise ConfigError(f"--tokens: got {num_tokens}, expected at most {longest}, the positions of {ours.checkpoint}")
    tokens = torch.randint(vocab, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(seed))
    network = ours.network.float()
    network.config.params_dtype = network.config.pipeline_dtype = torch.float32
    network.config.bf16 = False
    positions = torch.arange(num_tokens).expand(1, -1)
    here = [network(row[None], positions, None, runtime_gather_output=True)[0, :, :vocab] for row in tokens]
    del ours, network
    gc.collect()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    there = [theirs(row[None], use_cache=False).logits[0, :, :vocab] for row in tokens]
    gaps = [(a - b).abs().max().item() for a, b in zip(here, there, strict=True)]
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(here, there, strict=True)])
    largest = max(b.abs().max().item() for b in there)
    return Verdict(tokens.numel(), max(gaps), largest, same.float().mean().item())


def _require_absent(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"{output} exists already; name a folder that does not, or remove it")


@contextlib.contextmanager
def _whole_or_absent(output: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to fill, which gets its name when the body is done and is removed when it fails."""
    temporary = output.with_name(f".{output.name}.tmp")
    with write_errors(output, needed=num_bytes):
        shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
        temporary.mkdir(parents=True)
        try:
            yield temporary
            fsync_directory(temporary)
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_directory(output.parent)


def _one_rank() -> tuple[ParallelLayout, ProcessGroups]:
    layout = ParallelLayout()
    return layout, layout.initialize(seed=0)


def _with_vocabulary(architecture: Architecture, vocab_size: int | None, tokenizer: Tokenizer) -> Architecture:
    rows, wanted = architecture.vocab_size, vocab_size or architecture.vocab_size
    if wanted > rows:
        raise ConfigError(f"--vocab-size: got {wanted}, expected at most {rows}, the rows of the model; others have no weights")
    if wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.spec} has {tokenizer.vocab_size} entries and the model {wanted} rows "
            f"({'--vocab-size' if vocab_size else 'vocab_size in config.json'}); name the model's own tokenizer with "
            f"--tokenizer{', or leave --vocab-size out' if vocab_size else ''}"
        )
    return replace(architecture, vocab_size=wanted)


def _imported_config(
    architecture: Architecture, output: Path, tokenizer: Path, seq_length: int | None, precision: str
) -> TrainingConfig:
    """The configuration of a run that was never made here: what the model is, and what its commands ask for."""
    length = seq_length or min(architecture.max_sequence_length, _MAX_WINDOW)
    return config_from_dict(
        {
            "run": {"dir": str(output)},
            "model": to_model_config(architecture),
            "data": {
                "tokenizer": str(tokenizer_copy(output, str(tokenizer))),
                "train": [{"path": "unknown"}],  # whatever its publisher trained it on
                "seq_length": length,
            },
            "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            "train": {"train_tokens": length, "precision": precision},
        }
    )


def _empty_network(cfg: TrainingConfig, layout: ParallelLayout, groups: ProcessGroups, vocab_size: int) -> TokenStatsGPT:
    """The network of a configuration on the meta device: names, shapes and how it is stored, without memory."""
    config = build.transformer_config(cfg, layout, is_cuda=False)
    config.perform_initialization = False
    with torch.device("meta"):
        network = build.build_network(cfg, config, groups, vocab_size=vocab_size, backend="torch")
    return network.to(config.params_dtype)


def _checked_plan(architecture: Architecture, network: TokenStatsGPT, weights: HuggingFaceWeights) -> list[Move]:
    """Where every parameter comes from, when all of them are there and nothing else is."""
    planned = _plan(architecture, network)
    tied = bool(architecture.gpt["share_embeddings_and_output_weights"])
    problems = misfits(planned, weights.shapes, tied=tied)
    head, embedding = "lm_head.weight", next(iter(planned[0].theirs))
    if not problems and tied and head in weights.shapes and not torch.equal(weights.read(head), weights.read(embedding)):
        problems = [
            f"{head}: differs from {embedding}, although tie_word_embeddings is true; if the model has an output layer of its "
            "own, set it to false in config.json"
        ]
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{weights.folder} does not hold the model that its config.json describes:", *problems])
        )
    return planned


def _plan(architecture: Architecture, network: TokenStatsGPT) -> list[Move]:
    return moves(architecture, {name: tuple(parameter.shape) for name, parameter in network.named_parameters()})


def _fill(
    network: TokenStatsGPT,
    planned: Sequence[Move],
    weights: HuggingFaceWeights,
    architecture: Architecture,
    scratch: Path,
) -> None:
    """Give every parameter its values: pages of the published files, or of a file of its own where they are arranged anew."""
    scratch.mkdir()
    parameters, filled = dict(network.named_parameters()), {}
    for i, move in enumerate(planned):
        wanted = parameters[move.ours]
        parts = [weights.read(name) for name in move.theirs]
        value = move.join(parts, architecture.heads, wanted.shape[0])
        is_mapped = value.data_ptr() == parts[0].data_ptr()
        if is_mapped and value.dtype == wanted.dtype:
            filled[move.ours] = value
            continue
        place = torch.from_file(str(scratch / str(i)), shared=True, size=value.numel(), dtype=wanted.dtype)
        filled[move.ours] = place.view(value.shape).copy_(value)
    network.load_state_dict(filled, strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in network.parameters())


def _write_model(network: TokenStatsGPT, groups: ProcessGroups, folder: Path) -> None:
    folder.mkdir()
    part = Distribution(groups.dp_cp).part(sharded_weights([network]))
    part.freeze(None)
    complete(folder, [part.write(folder, 0)])
    fsync_directory(folder)


def _stored_parameter(
    folder: Path, move: Move, keys: Mapping[str, str], stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Tensor:
    """One parameter of a checkpoint; the layers of a model are stored together."""
    key = keys[move.ours]
    if key not in stored:
        raise CheckpointError(f"{folder}: {key} is missing; the checkpoint is of another model than its config.yaml")
    layer = re.search(r"\.layers\.(\d+)\.", move.ours)
    shape = stored[key][1][1:] if layer else stored[key][1]
    if shape != move.shape and not (move.ours in VOCABULARY and shape[0] >= move.shape[0] and shape[1:] == move.shape[1:]):
        raise CheckpointError(f"{folder}: {key}: got shape {shape}, expected {move.shape}; was config.yaml exchanged?")
    return read_slice(folder, key, int(layer[1])) if layer else read_tensor(folder, key)


def _write_tokenizer(folder: Path, spec: str, tokenizer: Tokenizer, max_length: int) -> None:
    path = Path(spec)
    if not path.is_file():
        logger.warning("the tokenizer %s has no file: the folder has no tokenizer", spec)
        return
    shutil.copyfile(path, folder / tokenizer_copy(folder, spec).name)
    if "tokenizer_config.json" in hf_folder.copy_companions(path.parent, folder):
        return
    if path.suffix != ".json":
        logger.warning("there is no tokenizer_config.json beside %s: say in one how transformers is to read it", path)
        return
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    if tokenizer.eod is not None:
        settings["eos_token"] = tokenizer.token_text(tokenizer.eod)
    hf_folder.write_json(folder / "tokenizer_config.json", settings)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _versions() -> dict[str, Any]:
    return {
        "megarpt": megarpt.__version__,
        "git": git_state(Path(megarpt.__file__).parent),
        **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    }


def _said(cfg: TrainingConfig) -> str:
    """For people: how a configuration names the model."""
    gpt = {name: value for name, value in cfg.model.gpt.model_dump().items() if value is not None}
    changed = {**{f"model.mcore.{k}": v for k, v in cfg.model.mcore.items()}, **{f"model.gpt.{k}": v for k, v in gpt.items()}}
    settings = {"model.preset": cfg.model.preset, "model.vocab_size": cfg.model.vocab_size, **changed}
    return " ".join(f"{key}={value}" for key, value in settings.items())
