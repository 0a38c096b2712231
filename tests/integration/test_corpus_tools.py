"""The tools as commands: what they write, what Megatron makes of it, and what survives kill -9."""

from __future__ import annotations

import inspect
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megarpt.corpus.manifest import verify_corpus

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
MODULES = (inspect, textwrap, subprocess, random, json)


def tool(name: str, *arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **more)


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOLS / "preprocess_corpus.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of source code, 3 MB of it, with what real files have: blank documents, repeated and long ones."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [inspect.getsource(module) for module in MODULES]
    lines = [line for text in texts for line in text.splitlines()]
    documents = ["", " ", "\n", "é<s>日本\u2028x", *texts]
    documents += ["\n".join(rng.choices(lines, k=rng.randrange(1, 120))) for _ in range(1200)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    assert (
        tool("train_tokenizer", "--input", folder / "a.jsonl", "--vocab-size", 1000, "--output", folder / "sp.model").returncode
        == 0
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.save(str(folder / "bpe.json"))
    return folder


def reference_encoder(path: Path) -> tuple[Callable[[str], list[int]], int, int]:
    """Encode, vocabulary size and eod by the libraries themselves."""
    if path.suffix == ".model":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return processor.encode_as_ids, processor.get_piece_size(), processor.eos_id()
    backend = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: backend.encode(text, add_special_tokens=False).ids, backend.get_vocab_size(), 0


@pytest.mark.parametrize("name", ["sp.model", "bpe.json"])
def test_bytes_equal_megatrons_preprocessing(folder: Path, tmp_path: Path, name: str) -> None:
    """Megatron's loop: one sequence per document, none for an empty one, eod only after tokens."""
    arguments = ("--input", folder / "a.jsonl", "--tokenizer", folder / name, "--append-eod", "--workers", 2, "--shard-mb", 1)
    done = tool("preprocess_corpus", *arguments, "--output-prefix", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "gigatoken" in done.stderr

    encode, vocab_size, eod = reference_encoder(folder / name)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    expected = []
    for line in (folder / "a.jsonl").read_text().splitlines():
        ids = encode(json.loads(line)["text"])
        ids += [eod] if ids else []
        expected += [ids] if ids else []
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")

    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(expected) and all(np.array_equal(dataset[i], ids) for i, ids in enumerate(expected))

    slow = tool("preprocess_corpus", *arguments, "--output-prefix", tmp_path / "slow", "--backend", "reference")
    assert slow.returncode == 0 and files(tmp_path / "slow") == files(tmp_path / "ours")


def test_killed_at_any_moment(folder: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole job or of the parent alone, at moments spread over a run, until a run gets through."""
    arguments = ("--input", folder / "a.jsonl", "--tokenizer", folder / "sp.model", "--append-eod", "--shard-mb", 1)
    began = time.monotonic()
    assert tool("preprocess_corpus", *arguments, "--workers", 2, "--output-prefix", tmp_path / "whole").returncode == 0
    duration = time.monotonic() - began
    rng = random.Random(7)
    outputs = 0
    for number in range(4):
        prefix = tmp_path / f"killed{number}"
        for attempt in range(20):
            process = start(*arguments, "--workers", rng.choice([1, 2, 3]), "--output-prefix", prefix)
            time.sleep(duration * rng.uniform(0.3, 1.0))
            if rng.random() < 0.5:
                os.kill(process.pid, signal.SIGKILL)  # the workers find out by themselves
            else:
                os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
            if process.returncode == 0 or attempt == 3:
                break
            assert process.returncode == -signal.SIGKILL, errors
            outputs += Path(f"{prefix}.json").exists()
        last = tool("preprocess_corpus", *arguments, "--output-prefix", prefix)
        assert last.returncode == 0, last.stderr
        assert files(prefix) == files(tmp_path / "whole")
        verify_corpus(prefix, full=True)
        assert not Path(f"{prefix}.partial").exists()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def big_input(tmp_path: Path, folder: Path, copies: int) -> Path:
    path = tmp_path / "big.jsonl"
    path.write_bytes((folder / "a.jsonl").read_bytes() * copies)
    return path


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_worker_ends_the_job_with_its_name(folder: Path, tmp_path: Path) -> None:
    source = big_input(tmp_path, folder, 8)
    arguments = ("--input", source, "--tokenizer", folder / "sp.model", "--backend", "reference", "--shard-mb", 2)
    process = start(*arguments, "--workers", 2, "--output-prefix", tmp_path / "c")
    wait_for(lambda: list((tmp_path / "c.partial").glob("shard-*")), process)
    victim = children(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"(process {victim}) was killed by SIGKILL while it worked on shard" in errors and "Traceback" not in errors
    assert not list(tmp_path.glob("c.bin")) and not list((tmp_path / "c.partial").glob("*.tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_cleanly_and_resumes(folder: Path, tmp_path: Path, number: int) -> None:
    source = big_input(tmp_path, folder, 8)
    arguments = ("--input", source, "--tokenizer", folder / "sp.model", "--shard-mb", 2)
    process = start(*arguments, "--workers", 2, "--output-prefix", tmp_path / "c", "--backend", "reference")
    wait_for(lambda: list((tmp_path / "c.partial").glob("shard-*.json")), process)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the workers get it too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and "run the same command again" in errors and "Traceback" not in errors
    again = tool("preprocess_corpus", *arguments, "--output-prefix", tmp_path / "c")
    assert again.returncode == 0 and "going on with" in again.stderr
    fresh = tool("preprocess_corpus", *arguments, "--output-prefix", tmp_path / "d")
    assert fresh.returncode == 0 and files(tmp_path / "c") == files(tmp_path / "d")


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    """A limit on file size stands for the disk: the same errors come from the same calls."""
    arguments = (
        "--input",
        folder / "a.jsonl",
        "--tokenizer",
        folder / "sp.model",
        "--output-prefix",
        tmp_path / "c",
        "--workers",
        1,
    )

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    for size in (1 << 18, 1 << 20):  # in a worker's shard, then in the joined file
        failed = tool("preprocess_corpus", *arguments, "--shard-mb", 1, preexec_fn=limit(size))
        assert failed.returncode == 79, failed.stderr
        assert "error: cannot write" in failed.stderr and "free on its file system" in failed.stderr
        assert "Traceback" not in failed.stderr and not list(tmp_path.glob("c.[bij]*"))
    done = tool("preprocess_corpus", *arguments, "--shard-mb", 1)
    assert done.returncode == 0, done.stderr
    verify_corpus(tmp_path / "c", full=True)


def test_inspect(folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    made = tool(
        "preprocess_corpus", "--input", folder / "a.jsonl", "--tokenizer", folder / "sp.model", "--output-prefix", prefix
    )
    assert made.returncode == 0
    shown = tool("inspect_corpus", prefix, "--tokenizer", folder / "sp.model", "--verify")
    assert shown.returncode == 0, shown.stderr
    assert "1,209" in shown.stdout and "tokens per document" in shown.stdout and "hashes agree" in shown.stdout
    assert tool("inspect_corpus", prefix, "--samples", 1).returncode == 0
    other = tool("inspect_corpus", prefix, "--tokenizer", folder / "bpe.json")
    assert other.returncode == 79 and "which made this corpus" in other.stderr

    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = tool("inspect_corpus", prefix, "--verify")
    assert damaged.returncode == 79 and "the content was changed" in damaged.stderr and "Traceback" not in damaged.stderr
    Path(f"{prefix}.bin").write_bytes(content[:-2])
    assert tool("inspect_corpus", prefix).returncode == 79
    Path(f"{prefix}.bin").write_bytes(content)
    Path(f"{prefix}.json").unlink()
    assert tool("inspect_corpus", prefix).returncode == 79
    assert tool("inspect_corpus", prefix, "--without-manifest").returncode == 0


def test_merge_equals_one_run(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"a": lines[:500], "b": lines[500:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    inputs = {"a": ["a"], "b": ["b"], "ab": ["a", "b"]}
    for name, sources in inputs.items():
        paths = [tmp_path / f"{source}.jsonl" for source in sources]
        arguments = ("--tokenizer", folder / "bpe.json", "--append-eod", "--output-prefix", tmp_path / name)
        assert tool("preprocess_corpus", "--input", *paths, *arguments).returncode == 0
    merged = tool("merge_corpora", "--input", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    assert files(tmp_path / "merged") == files(tmp_path / "ab")
    assert tool("inspect_corpus", tmp_path / "merged", "--verify").returncode == 0


@pytest.mark.parametrize("name", ["train_tokenizer", "preprocess_corpus", "inspect_corpus", "merge_corpora", "bench_tokenize"])
def test_help_and_mistakes(name: str) -> None:
    helped = tool(name, "--help")
    assert helped.returncode == 0 and f"tools/{name}.py" in helped.stdout
    wrong = tool(name, "--no-such-option")
    assert wrong.returncode == 78 and "error:" in wrong.stderr and "Traceback" not in wrong.stderr


def test_tools_load_neither_torch_nor_megatron() -> None:
    """Nor what only the demo or a terminal needs."""
    script = (
        "import runpy, sys\n"
        "path = sys.argv[1]\n"
        "sys.argv = [path, '--help']\n"
        "try:\n"
        "    runpy.run_path(path, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'pyarrow', 'sentencepiece'} & set(sys.modules)))\n"
    )
    for name in ("train_tokenizer", "preprocess_corpus", "inspect_corpus", "merge_corpora"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(TOOLS / f"{name}.py")],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_benchmark_of_a_small_input(tmp_path: Path) -> None:
    source = Path(inspect.__file__).parent
    folders = [source / name for name in ("asyncio", "email", "unittest", "multiprocessing")]
    arguments = ("--work", tmp_path, "--text", *folders, "--size-mb", 1, "--vocab-size", 2000)
    small = tool("bench_tokenize", *arguments, "--workers", 1, "--json", tmp_path / "figures.json")
    assert small.returncode == 0, small.stderr
    rows = json.loads((tmp_path / "figures.json").read_bytes())["rows"]
    assert {(row["tokenizer"], row["what"]) for row in rows} == {
        (name, what) for name in ("bpe.json", "sp.model") for what in ("preprocess_corpus, 1 workers", "limit", "peer")
    }
    by_name = {(row["tokenizer"], row["what"]): row for row in rows}
    for name in ("bpe.json", "sp.model"):
        assert by_name[name, "preprocess_corpus, 1 workers"]["tokens"] == by_name[name, "limit"]["tokens"]
        assert all(row["cpu_s"] > 0 and row["max_rss_mb"] > 1 and row["tree_pss_mb"] > 1 for row in rows)
