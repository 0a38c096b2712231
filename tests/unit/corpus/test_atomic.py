from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megarpt.corpus import atomic
from megarpt.corpus.atomic import atomic_write_bytes, atomic_write_json, free_bytes, require_free_bytes, write_errors
from megarpt.errors import DataError


def test_replaces_whole(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a", b"old")
    atomic_write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    atomic_write_json(tmp_path / "b", {"é": [1]})
    assert json.loads((tmp_path / "b").read_bytes()) == {"é": [1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_bytes(tmp_path / "a", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*a: No space left.*about 3 bytes needed, [\d,]+ free"):
        atomic_write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check that the folder exists"):
        atomic_write_bytes(tmp_path / "no" / "a", b"")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_out_of_space_says_what_is_free(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match="free space, then run the same command again"), write_errors(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path / "not" / "there") == free_bytes(tmp_path) > 0
    monkeypatch.setattr(atomic, "free_bytes", lambda _path: 100)
    require_free_bytes(tmp_path, 100)
    with pytest.raises(DataError, match="got 100 bytes free, expected at least 101"):
        require_free_bytes(tmp_path, 101)
