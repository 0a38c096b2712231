from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarpt.corpus.indexed import CorpusWriter, bin_path, idx_path, manifest_path
from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, TokenizerRecord, hash_file, verify_corpus, verify_files
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import DataError

DOCUMENTS = [[1, 2, 3, 256], [], [4, 256], list(range(100, 130)) + [256]]


def make(prefix: Path, documents: list[list[int]] = DOCUMENTS, **changes: Any) -> CorpusManifest:
    writer = CorpusWriter(prefix, np.uint16)
    for document in documents:
        writer.append(np.array(document, dtype=np.uint16))
    totals = writer.finish()
    fields = {
        "num_documents": totals.num_documents,
        "num_tokens": totals.num_values,
        "dtype": "uint16",
        "bin_sha256": totals.bin_sha256,
        "idx_sha256": totals.idx_sha256,
        "text_bytes": 40,
        "append_eod": True,
        "tokenizer": TokenizerRecord.of(load_tokenizer("bytes")),
        "inputs": [],
    }
    manifest = CorpusManifest(**fields | changes)
    writer.publish(manifest)
    return manifest


def sidecar(corpus: CorpusManifest, **changes: Any) -> SidecarManifest:
    fields = {
        "num_documents": corpus.num_documents,
        "num_tokens": corpus.num_tokens,
        "dtype": "float32",
        "bin_sha256": "0" * 64,
        "idx_sha256": "1" * 64,
        "stream": "ref_nll",
        "corpus_bin_sha256": corpus.bin_sha256,
        "corpus_idx_sha256": corpus.idx_sha256,
        "tokenizer_sha256": corpus.tokenizer_sha256,
        "seq_length": 64,
        "separate_documents": True,
        "reference": "runs/reference at step 100",
        "reference_sha256": "2" * 64,
    }
    return SidecarManifest(**fields | changes)


def test_written_and_read_back(tmp_path: Path) -> None:
    manifest = make(tmp_path / "c")
    assert (
        CorpusManifest.load(tmp_path / "c")
        == verify_corpus(tmp_path / "c")
        == verify_corpus(tmp_path / "c", full=True)
        == manifest
    )
    assert hash_file(bin_path(tmp_path / "c")) == manifest.bin_sha256


def test_sidecar_belongs(tmp_path: Path) -> None:
    corpus = make(tmp_path / "c")
    belonging = sidecar(corpus)
    belonging.save(tmp_path / "s")
    assert SidecarManifest.load(tmp_path / "s") == belonging
    belonging.check_belongs(corpus, seq_length=64, separate_documents=True, tokenizer_sha256=corpus.tokenizer_sha256)


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus_bin_sha256": "f" * 64},
        {"corpus_idx_sha256": "f" * 64},
        {"tokenizer_sha256": "f" * 64},
        {"seq_length": 128},
        {"separate_documents": False},
        {"num_tokens": 1, "num_documents": 9},
    ],
)
def test_sidecar_of_something_else_names_every_difference(tmp_path: Path, changes: dict[str, Any]) -> None:
    corpus = make(tmp_path / "c")
    with pytest.raises(DataError, match="does not belong") as caught:
        sidecar(corpus, **changes).check_belongs(
            corpus, seq_length=64, separate_documents=True, tokenizer_sha256=corpus.tokenizer_sha256
        )
    assert all(f"{name}: got" in str(caught.value) for name in changes)


def change(prefix: Path, **changes: Any) -> None:
    """A manifest that some other program might have written."""
    content = json.loads(manifest_path(prefix).read_bytes())
    del content["manifest_sha256"]
    content.update(changes)
    content = {key: value for key, value in content.items() if value != "REMOVE"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    signed = {**content, "manifest_sha256": hashlib.sha256(canonical.encode()).hexdigest()}
    manifest_path(prefix).write_text(json.dumps(signed))


def overwrite(prefix: Path, old: bytes, new: bytes) -> None:
    content = manifest_path(prefix).read_bytes()
    assert old in content
    manifest_path(prefix).write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: manifest_path(p).unlink(), "got only c.bin and c.idx, expected a tokenized corpus with its manifest"),
        (lambda p: manifest_path(p).write_text("{"), "not the manifest of a tokenized corpus"),
        (lambda p: overwrite(p, b'"num_tokens": 37', b'"num_tokens": 36'), "c.json: got sha256 .* of its fields"),
        (lambda p: overwrite(p, b'"created": "20', b'"created": "30'), "c.json: got sha256 .* of its fields"),
        (lambda p: overwrite(p, b"manifest_sha256", b"manifest_sha257"), "expected None as written in it"),
        (lambda p: change(p, num_tokens="REMOVE"), "num_tokens: Field required"),
        (lambda p: change(p, num_tokens=-1), "num_tokens"),
        (lambda p: change(p, num_tokens="37"), "num_tokens"),
        (lambda p: change(p, unknown=1), "unknown"),
        (lambda p: change(p, kind="sidecar"), "kind"),
        (lambda p: change(p, version=2), "version"),
        (lambda p: change(p, bin_sha256="xyz"), "bin_sha256"),
        (lambda p: change(p, num_tokens=38), "number of values: got 37, expected 38"),
        (lambda p: change(p, num_documents=5), "number of documents: got 4, expected 5"),
        (lambda p: change(p, dtype="int32"), "type of values: got uint16, expected int32"),
        (lambda p: bin_path(p).unlink(), "cannot read .*c.bin"),
        (lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes()[:-2]), "c.bin: got 72 bytes, expected 74"),
        (lambda p: bin_path(p).write_bytes(b""), "c.bin: got 0 bytes, expected 74"),
        (lambda p: idx_path(p).unlink(), "cannot read .*c.idx"),
        (lambda p: idx_path(p).write_bytes(idx_path(p).read_bytes()[:-8]), "c.idx: got"),
        (lambda p: shutil.copy(idx_path(p.with_name("d")), idx_path(p)), "of another corpus"),
    ],
)
def test_what_the_cheap_check_finds(tmp_path: Path, damage: Any, message: str) -> None:
    make(tmp_path / "c")
    make(tmp_path / "d", [[1], [2]])
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        verify_corpus(tmp_path / "c")


def test_index_of_another_corpus_of_the_same_counts(tmp_path: Path) -> None:
    """The same documents and tokens, cut elsewhere: the hash of the index tells."""
    make(tmp_path / "c", [[1, 2, 3], [4]])
    make(tmp_path / "d", [[1], [2, 3, 4]])
    shutil.copy(idx_path(tmp_path / "d"), idx_path(tmp_path / "c"))
    with pytest.raises(DataError, match=r"c\.idx: got sha256 .*of another corpus"):
        verify_corpus(tmp_path / "c")


def test_what_only_the_full_check_finds(tmp_path: Path) -> None:
    make(tmp_path / "c")
    content = bytearray(bin_path(tmp_path / "c").read_bytes())
    content[20] ^= 1
    bin_path(tmp_path / "c").write_bytes(bytes(content))
    verify_corpus(tmp_path / "c")
    with pytest.raises(DataError, match=r"c\.bin: got sha256"):
        verify_corpus(tmp_path / "c", full=True)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    make(tmp_path / "c", [[1, 257]])
    with pytest.raises(DataError, match="got id 257, expected less than 257"):
        verify_corpus(tmp_path / "c", full=True)


def test_sidecar_files(tmp_path: Path) -> None:
    corpus = make(tmp_path / "c")
    writer = CorpusWriter(tmp_path / "s", np.float32)
    for document in DOCUMENTS:
        writer.append(np.full(len(document), 0.5, dtype=np.float32))
    totals = writer.finish()
    manifest = sidecar(corpus, bin_sha256=totals.bin_sha256, idx_sha256=totals.idx_sha256)
    writer.publish(manifest)
    verify_files(tmp_path / "s", SidecarManifest.load(tmp_path / "s"), full=True)
    with pytest.raises(DataError, match="not the manifest of a tokenized corpus"):
        CorpusManifest.load(tmp_path / "s")
    with pytest.raises(DataError, match="not the manifest of a per-token sidecar"):
        SidecarManifest.load(tmp_path / "c")


def test_missing_altogether(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no file of this name"):
        CorpusManifest.load(tmp_path / "nothing")
