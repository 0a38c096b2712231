#!/usr/bin/env python
"""Measure tools/preprocess_corpus.py on real text: tokens per CPU second, everything included, and memory.

    python tools/bench_tokenize.py --rounds 2

It builds one jsonl file (200 MB by default) of the text that lies around on a machine with Python (sources, documentation,
manual pages), trains a 32,000-piece byte-level BPE and a sentencepiece model on a part of it, and runs in turn:

    preprocess_corpus   as a command, start-up and hashing included, with each number of --workers
    peer                the loop of Megatron-LM's preprocess_data.py in one process: parse a line, encode it with the reference
                        library, write; without the seconds that importing Megatron costs it
    limit               parse and encode with gigatoken in one process; nothing is written

CPU seconds are those of the whole process tree. Memory is the largest resident set of one process, and the largest sum of
proportional set sizes over the tree, sampled. Compare numbers of one run only: a shared machine changes by the minute.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megarpt.corpus.console import ToolParser, positive, run_tool
from megarpt.corpus.manifest import CorpusManifest
from megarpt.errors import DataError, MegarptError

PLACES = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc", "/usr/share/man"]
ENDINGS = (".py", ".txt", ".rst", ".md", ".html", ".h", ".c", ".pyi", ".js", ".gz", ".1", ".8")
TRAINING_BYTES = 8_000_000
TOOLS = Path(__file__).parent


@dataclass
class Measurement:
    """One command."""

    tokenizer: str
    what: str
    tokens: int
    mb: float
    cpu_s: float
    wall_s: float
    max_rss_mb: float
    tree_pss_mb: float

    @property
    def rate(self) -> float:
        """Million tokens per CPU second."""
        return self.tokens / self.cpu_s / 1e6


def texts(places: Sequence[str]) -> Iterator[str]:
    """Every readable text file under some folders, in a fixed shuffled order."""
    paths = [
        os.path.join(folder, name)
        for place in places
        for folder, _folders, names in os.walk(place)
        for name in names
        if name.endswith(ENDINGS) or "." not in name
    ]
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            content = Path(path).read_bytes()
            text = (gzip.decompress(content) if path.endswith(".gz") else content).decode()
        except (OSError, ValueError, EOFError):  # no text, or not ours to read
            continue
        if 64 < len(text) < 4_000_000 and "\0" not in text:
            yield text


def build_input(path: Path, places: Sequence[str], size: int) -> None:
    written, seen = 0, set()
    with open(path, "w", encoding="utf-8") as file:
        for text in texts(places):
            if hash(text) in seen:
                continue
            seen.add(hash(text))
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written >= size:
                return
    raise DataError(f"{', '.join(places)}: got {written:,} bytes of text, expected {size:,}; name more folders with --text")


def train_bpe(source: Path, target: Path, vocab_size: int) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def sample() -> Iterator[str]:
        read = 0
        with open(source, encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"][:20000]
                yield text
                read += len(text)
                if read > TRAINING_BYTES:
                    return

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.save(str(target))


def peer(source: Path, tokenizer: Path, output: Path, limit: int) -> int:
    """The peer's loop, in a process of its own; returns the tokens it wrote."""
    import numpy as np

    if tokenizer.suffix == ".json":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(tokenizer))
        encode = lambda text: backend.encode(text, add_special_tokens=False).ids  # noqa: E731
    else:
        import sentencepiece

        encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode
    tokens = read = 0
    with open(source, encoding="utf-8") as lines, open(output, "wb") as file:
        for line in lines:
            ids = np.array(encode(json.loads(line)["text"]), dtype=np.uint16)
            file.write(ids.tobytes())
            tokens += len(ids) + 1
            read += len(line)
            if read > limit:
                break
    return tokens


def limit(source: Path, tokenizer: Path, size: int) -> int:
    """gigatoken and the JSON parser, nothing else."""
    import gigatoken
    import orjson

    opened = (
        gigatoken.Tokenizer.from_json(tokenizer.read_bytes())
        if tokenizer.suffix == ".json"
        else gigatoken.Tokenizer.from_sentencepiece(tokenizer)
    )
    tokens = read = 0
    with open(source, "rb") as lines:
        for line in lines:
            tokens += len(opened.encode(orjson.loads(line)["text"])) + 1
            read += len(line)
            if read > size:
                break
    return tokens


def tree_pss(pid: int) -> int:
    """Bytes of a process and its descendants, shared pages divided among those that share them."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, StopIteration):
        return 0
    return total + sum(tree_pss(int(child)) for child in children)


def measure(name: str, what: str, mb: float, command: list[str]) -> Measurement:
    """Run a command to its end; its tokens are read from its last line of output or, failing that, set by the caller."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        most = 0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            most = max(most, tree_pss(process.pid))
            time.sleep(0.1)
        wall = time.monotonic() - began
        _pid, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stdout is not None and process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read()
    if process.returncode:
        raise MegarptError(f"{' '.join(command)} ended with code {process.returncode}:\n{errors}")
    tokens = int(output.split()[-1]) if output.split() else 0
    cpu = usage.ru_utime + usage.ru_stime
    return Measurement(name, what, tokens, mb, cpu, wall, usage.ru_maxrss / 1024, most / 1e6)


def run_all(work: Path, source: Path, tokenizer: Path, workers: Sequence[int], peer_mb: int, rounds: int) -> list[Measurement]:
    size_mb = source.stat().st_size / 1e6
    rows = []
    script = [sys.executable, __file__]
    for _ in range(rounds):
        for number in workers:
            prefix = work / "corpus"
            command = [
                sys.executable,
                str(TOOLS / "preprocess_corpus.py"),
                "--input",
                str(source),
                "--tokenizer",
                str(tokenizer),
            ]
            command += ["--append-eod", "--workers", str(number), "--output-prefix", str(prefix), "--restart"]
            row = measure(tokenizer.name, f"preprocess_corpus, {number} workers", size_mb, command)
            row.tokens = CorpusManifest.load(prefix).num_tokens
            rows.append(row)
        for what, mb in (("limit", size_mb), ("peer", min(peer_mb, size_mb))):
            command = [*script, "--work", str(work), "--inner", what, str(source), str(tokenizer), str(int(mb * 1e6))]
            rows.append(measure(tokenizer.name, what, mb, command))
    best: dict[str, Measurement] = {}
    for row in rows:
        if row.what not in best or row.cpu_s < best[row.what].cpu_s:
            best[row.what] = row
    return list(best.values())


def show(rows: Sequence[Measurement]) -> None:
    print(
        f"{'tokenizer':<10} {'':<28} {'M tok/CPU s':>12} {'x peer':>7} {'MB/s wall':>10} {'max RSS MB':>11} {'tree PSS MB':>12}"
    )
    peers = {row.tokenizer: row.rate for row in rows if row.what == "peer"}
    for row in rows:
        print(
            f"{row.tokenizer:<10} {row.what:<28} {row.rate:>12.2f} {row.rate / peers[row.tokenizer]:>7.1f} "
            f"{row.mb / row.wall_s:>10.1f} {row.max_rss_mb:>11.0f} {row.tree_pss_mb:>12.0f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--work",
        default="runs/bench_tokenize",
        metavar="DIR",
        help="for input, models and outputs; what is there is used again (default: %(default)s)",
    )
    parser.add_argument("--text", nargs="+", default=PLACES, metavar="DIR", help="where text is taken from")
    parser.add_argument("--input", metavar="FILE", help="use this jsonl file instead (key: text)")
    parser.add_argument("--size-mb", type=positive, default=200, metavar="MB", help="of the input that is built (default: 200)")
    parser.add_argument("--vocab-size", type=positive, default=32000, metavar="N", help="of both tokenizers (default: 32000)")
    parser.add_argument(
        "--peer-mb", type=positive, default=20, metavar="MB", help="the peer reads only this much (default: 20)"
    )
    parser.add_argument("--workers", type=positive, nargs="+", default=[2, 1], metavar="N", help="default: 2 1")
    parser.add_argument(
        "--rounds", type=positive, default=1, metavar="N", help="alternate this often, keep the best (default: 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    parser.add_argument("--inner", nargs=4, help="WHAT INPUT TOKENIZER BYTES: what the tool runs to measure itself")
    args = parser.parse_args(argv)
    work = Path(args.work)
    if args.inner:
        what, source, tokenizer, size = args.inner
        run = peer(Path(source), Path(tokenizer), work / "peer.bin", int(size)) if what == "peer" else 0
        print(run or limit(Path(source), Path(tokenizer), int(size)))
        return
    work.mkdir(parents=True, exist_ok=True)
    source = Path(args.input) if args.input else work / f"text-{args.size_mb}.jsonl"
    if not source.exists():
        build_input(source, args.text, args.size_mb * 1_000_000)
    bpe, model = work / "bpe.json", work / "sp.model"
    if not bpe.exists():
        train_bpe(source, bpe, args.vocab_size)
    if not model.exists():
        command = [sys.executable, str(TOOLS / "train_tokenizer.py"), "--input", str(source), "--output", str(model)]
        subprocess.run([*command, "--vocab-size", str(args.vocab_size), "--max-bytes", str(TRAINING_BYTES)], check=True)
    rows = [row for path in (bpe, model) for row in run_all(work, source, path, args.workers, args.peer_mb, args.rounds)]
    show(rows)
    if args.json:
        content = {
            "input_bytes": source.stat().st_size,
            "rows": [asdict(row) | {"million_tokens_per_cpu_s": row.rate} for row in rows],
        }
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
