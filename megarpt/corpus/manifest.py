"""What stands beside every corpus and sidecar: what it holds, what it was made of, and the hashes that prove it.

The manifest is written last. Files without one are the remains of a job that did not end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megarpt import __version__
from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.corpus.indexed import CorpusIndex, bin_path, idx_path, manifest_path
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import DataError

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_HASH_BLOCK = 1 << 22
_TOKEN_BLOCK = 1 << 20
_OWN_HASH = "manifest_sha256"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class TokenizerRecord(_Record):
    """Which tokenizer."""

    name: str
    """Base name of its file, or `bytes`."""
    sha256: Sha256
    """Of its content."""
    vocab_size: Annotated[int, Field(gt=0)]
    """One more than the largest id."""
    eod: int | None
    """The id that ends a document, when it has one."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """The record of an open tokenizer."""
        return cls(name=tokenizer.name, sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)


class InputRecord(_Record):
    """One file the text came from."""

    name: str
    """Base name."""
    size_bytes: Count
    """Its size as it lay on the disk, compressed or not."""
    fingerprint: str
    """sha256 over its size and blocks of its content (readers.fingerprint); of the `.bin` for a merged corpus."""
    num_documents: Count
    """Documents it gave."""


class MalformedRecord(_Record):
    """One skipped line or row."""

    file: str
    """Base name of the file."""
    line: Count
    """Line, row or document, counted from 1."""
    reason: str
    """What was wrong with it."""


class _FileManifest(_Record):
    """What corpora and sidecars share; `version` changes when the meaning of a field does."""

    kind_name: ClassVar[str]
    made_by: ClassVar[str]

    version: Literal[1] = 1
    """Of this file's format."""
    num_documents: Count
    """Documents, empty ones included."""
    num_tokens: Count
    """Values in the `.bin`."""
    dtype: str
    """Their type."""
    bin_sha256: Sha256
    """Of the `.bin`."""
    idx_sha256: Sha256
    """Of the `.idx`."""
    tool_version: str = __version__
    """megarpt's version."""
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When, UTC."""

    @classmethod
    def load(cls, prefix: str | Path) -> Self:
        """Read the manifest of a prefix.

        Raises:
            DataError: there is none, or it is damaged or of another kind.
        """
        path = manifest_path(prefix)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            left = [each.name for each in (bin_path(prefix), idx_path(prefix)) if each.exists()]
            state = f"got only {' and '.join(left)}" if left else "got no file of this name"
            raise DataError(
                f"{prefix}: {state}, expected a {cls.kind_name} with its manifest {path.name}, which is written last; the job "
                f"that wrote it did not end, or the path is wrong: run {cls.made_by} (again)"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            return cls.model_validate_json(_checked(content, path, cls.made_by))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{path}: not the manifest of a {cls.kind_name}: {where}: {first['msg']}, got {str(first['input'])[:80]!r} "
                f"({error.error_count()} mistakes in all); copy it again, or run {cls.made_by} again"
            ) from error

    def to_json(self) -> bytes:
        """The file's content, its own hash in it."""
        fields = self.model_dump(mode="json")
        return json.dumps({**fields, _OWN_HASH: _hash_json(fields)}, indent=2, ensure_ascii=False).encode() + b"\n"

    def save(self, prefix: str | Path) -> None:
        """Write the manifest atomically beside files that already carry their names.

        Raises:
            DataError: the file system refused.
        """
        atomic_write_bytes(manifest_path(prefix), self.to_json())


def _checked(content: bytes, path: Path, made_by: str) -> bytes:
    """The manifest without its own hash, after comparing it; what is not a JSON object is left for the schema to name."""
    try:
        fields = json.loads(content)
        stored = fields.pop(_OWN_HASH, None)
    except (ValueError, AttributeError):
        return content
    if stored != _hash_json(fields):
        raise DataError(
            f"{path}: got sha256 {_hash_json(fields)} of its fields, expected {stored} as written in it; the file was changed: "
            f"copy it again, or run {made_by} again"
        )
    return json.dumps(fields).encode()


def _hash_json(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class CorpusManifest(_FileManifest):
    """A tokenized corpus."""

    kind_name = "tokenized corpus"
    made_by = "tools/preprocess_corpus.py"

    kind: Literal["corpus"] = "corpus"
    """Says that this is not a sidecar."""
    text_bytes: Count
    """UTF-8 bytes of the text, for bits per byte; eod tokens are not text."""
    append_eod: bool
    """Every document that is not empty ends in tokenizer.eod."""
    tokenizer: TokenizerRecord
    """What made the ids."""
    inputs: list[InputRecord]
    """Where the text came from, in order."""
    num_malformed: Count = 0
    """Lines that were skipped as malformed."""
    malformed: list[MalformedRecord] = Field(default_factory=list)
    """The first of them."""
    job_sha256: str = ""
    """Of inputs, tokenizer and options, so that the same command knows its own result."""

    @property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer's content."""
        return self.tokenizer.sha256


class SidecarManifest(_FileManifest):
    """A per-token stream beside a corpus: same documents, one fp32 value per token."""

    kind_name = "per-token sidecar"
    made_by = "megarpt score"

    kind: Literal["sidecar"] = "sidecar"
    """Says that this is not a corpus."""
    stream: str
    """Its name, such as `ref_nll`."""
    corpus_bin_sha256: Sha256
    """The corpus it belongs to."""
    corpus_idx_sha256: Sha256
    """The corpus it belongs to."""
    tokenizer_sha256: Sha256
    """The corpus' tokenizer."""
    seq_length: Annotated[int, Field(gt=0)]
    """Window length the values were computed in."""
    separate_documents: bool
    """Whether documents of a window were kept apart."""
    reference: str
    """The model that made the values, in words."""
    reference_sha256: str
    """Of that model's checkpoint."""

    def check_belongs(
        self, corpus: CorpusManifest, *, seq_length: int, separate_documents: bool, tokenizer_sha256: str | None = None
    ) -> None:
        """Refuse a sidecar that was made for something else.

        Raises:
            DataError: names every field that differs.
        """
        expected: dict[str, Any] = {
            "corpus_bin_sha256": corpus.bin_sha256,
            "corpus_idx_sha256": corpus.idx_sha256,
            "num_tokens": corpus.num_tokens,
            "num_documents": corpus.num_documents,
            "tokenizer_sha256": tokenizer_sha256 or corpus.tokenizer.sha256,
            "seq_length": seq_length,
            "separate_documents": separate_documents,
        }
        wrong = [
            f"{name}: got {_short(getattr(self, name))}, expected {_short(value)}"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]
        if wrong:
            raise DataError(
                f"the sidecar of stream {self.stream!r} (made by {self.reference}) does not belong to this corpus and these "
                f"settings: {'; '.join(wrong)}. Make it again with `megarpt score`, or use the settings it was made with"
            )


def verify_corpus(prefix: str | Path, *, full: bool = False) -> CorpusManifest:
    """Check that the files of a corpus are those its manifest speaks of; return the manifest.

    Cheap: names, sizes, the whole index and its hash. `full`: also the hash of the values, and every id in the vocabulary.

    Raises:
        DataError: they are not.
    """
    manifest = CorpusManifest.load(prefix)
    verify_files(prefix, manifest, full=full)
    if full:
        largest = _largest_id(prefix, manifest)
        if largest >= manifest.tokenizer.vocab_size:
            raise DataError(
                f"{bin_path(prefix)}: got id {largest}, expected less than {manifest.tokenizer.vocab_size}, the vocabulary of "
                f"{manifest.tokenizer.name}; the corpus is not what its manifest says: make it again"
            )
    return manifest


def verify_files(prefix: str | Path, manifest: CorpusManifest | SidecarManifest, *, full: bool = False) -> None:
    """The part of `verify_corpus` that sidecars share.

    Raises:
        DataError: a file is missing, damaged or belongs to another manifest.
    """
    again = f"copy the files again, or run {manifest.made_by} again"
    index = CorpusIndex(prefix)
    what = manifest_path(prefix).name
    for name, got, expected in (
        ("number of documents", index.num_documents, manifest.num_documents),
        ("type of values", index.dtype.name, manifest.dtype),
        ("number of values", index.check(), manifest.num_tokens),
    ):
        if got != expected:
            raise DataError(
                f"{idx_path(prefix)}: {name}: got {got}, expected {expected} as in {what}; the index is of another corpus: "
                f"{again}"
            )
    _check_hash(idx_path(prefix), manifest.idx_sha256, what, f"the index is of another corpus or was changed: {again}")
    try:
        size = bin_path(prefix).stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {bin_path(prefix)}: {error.strerror or error}; {again}") from error
    if size != manifest.num_tokens * index.dtype.itemsize:
        raise DataError(
            f"{bin_path(prefix)}: got {size:,} bytes, expected {manifest.num_tokens * index.dtype.itemsize:,} "
            f"({manifest.num_tokens:,} values of {index.dtype.itemsize} bytes); the file is cut short or of another corpus: "
            f"{again}"
        )
    if full:
        verify_values(prefix, manifest)


def verify_values(
    prefix: str | Path, manifest: CorpusManifest | SidecarManifest, *, on_block: Callable[[], None] = lambda: None
) -> None:
    """Read all values of a corpus or sidecar, and compare their hash; `on_block` is called after every few megabytes.

    Raises:
        DataError: they are not those the manifest speaks of.
    """
    remedy = f"the content was changed: copy the files again, or run {manifest.made_by} again"
    _check_hash(bin_path(prefix), manifest.bin_sha256, manifest_path(prefix).name, remedy, on_block)


def _check_hash(
    path: Path, expected: str, manifest_name: str, remedy: str, on_block: Callable[[], None] = lambda: None
) -> None:
    got = hash_file(path, on_block)
    if got != expected:
        raise DataError(f"{path}: got sha256 {got}, expected {expected} as in {manifest_name}; {remedy}")


def hash_file(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            on_block()
    return digest.hexdigest()


def _largest_id(prefix: str | Path, manifest: CorpusManifest) -> int:
    """Negative ids count as larger than any vocabulary."""
    dtype, largest = np.dtype(manifest.dtype), -1
    unsigned = np.dtype(f"u{dtype.itemsize}")
    with open(bin_path(prefix), "rb", buffering=0) as file:
        while block := file.read(_TOKEN_BLOCK * dtype.itemsize):
            largest = max(largest, int(np.frombuffer(block, dtype=unsigned).max()))
    return largest


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
