"""Folders of published models: config.json, weights in safetensors files, a tokenizer."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megarpt.errors import CheckpointError, ExtensionError

CONFIG = "config.json"
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What transformers reads beside the tokenizer, and what says how the model is to be sampled from.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
               "chat_template.jinja", "generation_config.json")  # fmt: skip
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FETCH = "fetch the folder again"


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: no weight's


class HuggingFaceWeights:
    """The tensors of a folder, read when they are asked for. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            CheckpointError: files are missing or damaged.
            ExtensionError: safetensors is not installed.
        """
        self.folder = folder
        self._stored: dict[str, _Stored] = {}
        self._open = contextlib.ExitStack()
        try:
            for name, wanted in _files(folder).items():
                self._read_header(folder / name, wanted)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def rename(self, change: Callable[[str], str]) -> None:
        """Call the tensors otherwise from now on."""
        self._stored = {change(name): stored for name, stored in self._stored.items()}

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """The type that a model can be trained in, bf16 or fp32, and that holds all these tensors without a loss.

        Raises:
            CheckpointError: they are quantized.
        """
        kinds = {self._stored[name].dtype: name for name in names}
        if None in kinds:
            raise CheckpointError(
                f"{self.folder}: {kinds[None]} is neither fp32, bf16 nor fp16: quantized weights cannot be converted; take "
                "those they were made from"
            )
        return torch.bfloat16 if set(kinds) == {torch.bfloat16} else torch.float32

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file.

        Raises:
            CheckpointError: it holds what is no number.
        """
        stored = self._stored[name]
        tensor: Tensor = stored.file.get_tensor(stored.name)
        if not _is_finite(tensor):
            raise CheckpointError(f"{self.folder}: {name} holds NaN or infinity: the file is damaged, or the training failed")
        return tensor

    def _read_header(self, path: Path, wanted: set[str] | None) -> None:
        library = _library()
        try:
            file = self._open.enter_context(library.safe_open(path, framework="pt"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; {_FETCH}") from error
        except (OSError, library.SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {_FETCH}") from error
        names = set(file.keys())
        if wanted is not None and wanted != names:
            odd = sorted(wanted ^ names)
            raise CheckpointError(f"{path} and {_INDEX} disagree about {odd[0]} and {len(odd) - 1} other tensors; {_FETCH}")
        for name in sorted(names):
            header = file.get_slice(name)
            self._stored[name] = _Stored(file, name, tuple(header.get_shape()), _DTYPES.get(header.get_dtype()))


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Iterable[dict[str, Tensor]], max_bytes: int
) -> None:
    """Write tensors as they come, in files of at most `max_bytes` (or one tensor), with an index when there are several.

    Args:
        folder: where.
        shapes: of all tensors, in the order in which they come.
        dtype: of all.
        read: the tensors, some at a time.
        max_bytes: of a file.

    Cost: memory of one file.

    Raises:
        CheckpointError: a tensor holds what is no number, in this type.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = _num_bytes(shape, dtype)
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    files = (
        [_ONE_FILE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    content: dict[str, Tensor] = {}
    source = iter(read)
    for file, names in zip(files, shards, strict=True):
        while not set(names) <= set(content):
            content |= next(source)
        # Each in memory of its own: the library refuses tensors that are parts of another.
        shard = {name: content.pop(name).to(dtype).clone(memory_format=torch.contiguous_format) for name in names}
        for name, tensor in shard.items():
            if not _is_finite(tensor):
                raise CheckpointError(
                    f"{name} holds NaN, infinity, or numbers beyond {dtype}; choose fp32 or bf16, or other weights"
                )
        _library().torch.save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(_num_bytes(shape, dtype) for shape in shapes.values())
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def read_json(path: Path) -> dict[str, Any]:
    """An object.

    Raises:
        CheckpointError: missing, or something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; expected the folder of a model as Hugging Face publishes it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_FETCH}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, expected an object; {_FETCH}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An object, as transformers writes it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: there is none that megarpt reads.
    """
    for name in _TOKENIZERS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: no tokenizer, expected {' or '.join(_TOKENIZERS)}; put one there, or name one with --tokenizer"
    )


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what belongs to a tokenizer; the names."""
    names = [name for name in _COMPANIONS if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _files(folder: Path) -> dict[str, set[str] | None]:
    """File -> the tensors it must hold, None where no index says so."""
    if (folder / _INDEX).is_file():
        where = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{folder / _INDEX}: no weight_map of tensors to files; {_FETCH}")
        return {file: {name for name in where if where[name] == file} for file in sorted(set(where.values()))}
    if (folder / _ONE_FILE).is_file():
        return {_ONE_FILE: None}
    old = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))), None)
    hint = f"; {old} is a pickle, which may run code: have transformers write it anew with save_pretrained" if old else ""
    raise CheckpointError(f"{folder}: no weights, expected {_ONE_FILE}, or {_INDEX} with the files it names{hint}")


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(edge)) for edge in tensor.aminmax())  # NaN spreads into both, and nothing is copied


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ExtensionError("converting needs the library safetensors: pip install -e '.[hf]'") from error
    return safetensors
