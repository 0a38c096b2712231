"""`tools/build_rpt_prompts.py`: what is kept is what the proxy finds hard, whatever kills the job on its way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarpt.config.schema import ParallelConfig
from megarpt.corpus.indexed import CorpusIndex
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError, NumericsError, StopRequested
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.mining import Thresholds, is_validation
from megarpt.rl.prompts import load_prompts
from megarpt.run import mining, pretrain
from megarpt.run.mining import mine
from megarpt.run.mining_job import MiningOptions
from megarpt.run.pretrained import load_pretrained
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.tiny import byte_tokenizer, write_corpus

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "build_rpt_prompts.py"
spec = importlib.util.spec_from_file_location("build_rpt_prompts_tool", TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

S = 64
Mine = Callable[..., dict[str, Any]]
Records = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def proxy(corpora: Path, tmp_path_factory: pytest.TempPathFactory, cpu_runtime: Runtime) -> Path:
    """A run folder: a model that has learned a little of the corpora."""
    folder = tmp_path_factory.mktemp("proxy") / "run"
    cfg = tiny_config(
        **{
            "run.dir": str(folder),
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(corpora / "train")}],
            "data.seq_length": S,
            "batch": {"micro_batch_size": 4, "global_batch_size": 8},
            "optimizer": {"lr": 5e-3, "min_lr": 5e-4},
            "train.train_tokens": 60 * 512,
            "evaluation.at_start": False,
            "logging.tensorboard": False,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    return folder


def options(proxy: Path, corpora: Path, prefix: Path, **changes: Any) -> MiningOptions:
    """What is usual here, with what is given in its place."""
    usual = {
        "proxy": str(proxy),
        "corpus": str(corpora / "held"),
        "output_prefix": str(prefix),
        "valid_fraction": 0.3,
        "max_context_tokens": 40,
        "continuation_bytes": 12,
        "micro_batch_size": 4,
    }
    return MiningOptions(**usual | changes)


@pytest.fixture
def go(proxy: Path, corpora: Path, tmp_path: Path, cpu_runtime: Runtime) -> Mine:
    """Mines the held-out corpus in this process."""

    def run(prefix: str = "p", **changes: Any) -> dict[str, Any]:
        return mine(options(proxy, corpora, tmp_path / prefix, **changes), cpu_runtime)

    return run


@pytest.fixture(scope="module")
def whole(proxy: Path, corpora: Path, tmp_path_factory: pytest.TempPathFactory, cpu_runtime: Runtime) -> Path:
    """The prefix of what a job writes that nobody disturbed."""
    prefix = tmp_path_factory.mktemp("whole") / "whole"
    mine(options(proxy, corpora, prefix), cpu_runtime)
    return prefix


def read(prefix: Path) -> Records:
    return {
        split: [json.loads(line) for line in Path(f"{prefix}_{split}.jsonl").read_text().splitlines()]
        for split in ("train", "valid")
    }


def contents(prefix: Path) -> dict[str, bytes]:
    manifest = json.loads(Path(f"{prefix}.json").read_bytes())
    del manifest["created"], manifest["proxy"], manifest["corpus"]
    files = {split: Path(f"{prefix}_{split}.jsonl").read_bytes() for split in ("train", "valid")}
    return files | {"manifest": json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def entropies(proxy: Path, corpora: Path, cpu_runtime: Runtime) -> dict[tuple[int, int], float]:
    """(document, position) -> entropy in fp64 of the 16 likeliest tokens, from logits of the document alone, window by
    window as `windows` says for this length."""
    layout = ParallelLayout()
    trained = load_pretrained(str(proxy), cpu_runtime, layout, layout.initialize(0), ParallelConfig())
    index, found = CorpusIndex(corpora / "held"), {}
    for number in range(index.num_documents):
        ids = torch.from_numpy(index.read_document(number).astype(np.int64))
        begin = 0
        while begin < len(ids) - 1:
            start = max(0, begin - S // 2)
            part = ids[start : min(start + S, len(ids) - 1)]
            logits = trained.network(part[None], torch.arange(len(part))[None], None, runtime_gather_output=True)
            p = logits[0, :, :257].double().softmax(-1).topk(16, dim=-1).values
            p = p / p.sum(-1, keepdim=True)
            values = -(p * p.log()).sum(-1)
            for row in range(begin - start, len(part)):
                found[number, start + row + 1] = float(values[row])
            begin = start + len(part)
    return found


def test_exactly_the_hard_positions_are_kept(
    go: Mine, tmp_path: Path, corpora: Path, entropies: dict[tuple[int, int], float]
) -> None:
    manifest = go(max_per_document=10_000)
    records = read(tmp_path / "p")
    kept = {(each["document"], each["position"]): each for split in records.values() for each in split}
    index = CorpusIndex(corpora / "held")
    documents = [index.read_document(number).tolist() for number in range(index.num_documents)]
    expected = {at: value for at, value in entropies.items() if value >= 0.5 and documents[at[0]][at[1]] != 256}
    near = {at for at, value in entropies.items() if min(abs(value - edge) for edge in (0.5, 1.0, 1.5)) < 1e-5}
    assert kept.keys() - near == expected.keys() - near and len(kept) > 200
    bands = set()
    for (number, position), each in kept.items():
        assert each["entropy"] == pytest.approx(entropies[number, position], abs=1e-5)
        band = "easy" if each["entropy"] < 1.0 else "medium" if each["entropy"] < 1.5 else "hard"
        assert each["band"] == band
        bands.add(band)
        document = documents[number]
        assert each["context"] == document[max(0, position - 40) : position]
    assert bands == {"easy", "medium", "hard"}
    assert sum(manifest["positions"].values()) == len(kept)
    for split, prompts in records.items():
        counts = {band: sum(each["band"] == band for each in prompts) for band in bands}
        assert manifest["prompts"][split] == counts
        assert manifest["documents"][split] == len({each["document"] for each in prompts})
        assert all(is_validation(0, each["document"], 0.3) == (split == "valid") for each in prompts)
    assert not {each["document"] for each in records["train"]} & {each["document"] for each in records["valid"]}
    assert records["train"] and records["valid"]


def test_the_prompts_can_be_loaded_and_say_how_the_document_goes_on(whole: Path, corpora: Path) -> None:
    index = CorpusIndex(corpora / "held")
    prompts = load_prompts(f"{whole}_train.jsonl", byte_tokenizer(), template="minimal", max_prompt_tokens=30)
    for prompt in prompts:
        document = bytes(index.read_document(prompt.answer["document"])[:-1].tolist())
        position = prompt.answer["position"]
        following = document[position : position + 12]
        assert prompt.answer["continuation"] == following
        assert prompt.answer["boundaries"] == tuple(range(1, len(following) + 1))
        assert bytes(prompt.tokens) == document[max(0, position - 23) : position] + b"<think>"


def test_caps_choose_by_chance(go: Mine, tmp_path: Path) -> None:
    whole = go("everything", max_per_document=10_000)
    go("few", max_per_document=5, max_prompts=30, max_valid_prompts=7)
    go("other", max_per_document=5, max_prompts=30, max_valid_prompts=7, seed=1)
    everything, few, other = (read(tmp_path / name) for name in ("everything", "few", "other"))
    ids = {name: [each["id"] for each in few[name]] for name in few}
    assert {name: len(each) for name, each in ids.items()} == {"train": 30, "valid": 7}
    assert set(ids["train"]) < {each["id"] for each in everything["train"]} and sum(whole["prompts"]["train"].values()) > 30
    per_document = np.unique([each["document"] for each in few["train"]], return_counts=True)[1]
    assert per_document.max() <= 5 and len(per_document) > 5
    assert set(ids["train"]) != {each["id"] for each in other["train"]}
    places = [(each["document"], each["position"]) for each in few["train"]]
    assert places == sorted(places)


def test_easy_positions_and_short_contexts(go: Mine, tmp_path: Path) -> None:
    manifest = go(keep_easy=True, max_per_document=10_000, min_context_tokens=20, thresholds=Thresholds(1.0, 1.2, 1.4))
    records = read(tmp_path / "p")["train"]
    trivial = [each for each in records if each["band"] == "trivial"]
    assert trivial and all(each["entropy"] < 1.0 for each in trivial)
    assert manifest["prompts"]["train"]["trivial"] == len(trivial)
    assert min(each["position"] for each in records) >= 20


def test_batches_change_nothing_but_the_last_digits(go: Mine, whole: Path, tmp_path: Path) -> None:
    go("many", micro_batch_size=16)
    few, many = read(whole), read(tmp_path / "many")
    assert [each["id"] for each in few["train"]] == [each["id"] for each in many["train"]]
    differences = [abs(a["entropy"] - b["entropy"]) for a, b in zip(few["train"], many["train"], strict=True)]
    assert max(differences) < 1e-4


class Killed(BaseException):
    """Ends the job as a signal would, wherever it is."""


@pytest.mark.parametrize("at", [1, 8])
def test_a_killed_job_ends_with_the_same_files(
    go: Mine, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At the at-th batch, with all before it on disk, and something half-written behind that."""
    monkeypatch.setattr(mining, "_DURABLE_EVERY_S", -1.0)
    compute, calls = mining.next_token_entropy, []

    def dies(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == at:
            raise Killed
        return compute(*given)

    monkeypatch.setattr(mining, "next_token_entropy", dies)
    with pytest.raises(Killed):
        go("killed")
    assert not Path(tmp_path / "killed.json").exists() and not Path(tmp_path / "killed_train.jsonl").exists()
    with open(tmp_path / "killed.candidates.tmp", "ab") as file:
        file.write(b"half of a record")
    monkeypatch.setattr(mining, "next_token_entropy", lambda *given: calls.append(given) or compute(*given))
    go("killed")
    assert contents(tmp_path / "killed") == contents(whole)
    num_calls = len(calls)
    calls.clear()
    go("again")
    assert num_calls - len(calls) <= 3  # only the documents it died in, of which long ones are several batches
    assert sorted(each.name for each in tmp_path.glob("killed*")) == ["killed.json", "killed_train.jsonl", "killed_valid.jsonl"]


def test_a_job_killed_while_publishing(go: Mine, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, []

    def dies(source: Any, target: Any) -> None:
        calls.append(target)
        if str(target).endswith("valid.jsonl"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            go("killed")
    assert Path(tmp_path / "killed_train.jsonl").exists() and not Path(tmp_path / "killed.json").exists()
    go("killed")
    assert contents(tmp_path / "killed") == contents(whole)


CHILD = """
import runpy, sys, time
from megarpt.device import runtime
started = runtime.start("cpu")
from megarpt.run import mining
compute, mining._DURABLE_EVERY_S = mining.next_token_entropy, -1.0
mining.next_token_entropy = lambda *given: time.sleep(0.1) or compute(*given)  # long enough to be killed on its way
tool = runpy.run_path(sys.argv[1])
tool["run"](tool["parse"](sys.argv[2:]), started)
"""


def test_sigkill_of_the_command(
    proxy: Path, corpora: Path, tmp_path: Path, cpu_runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole process, once it has something on disk; then the same command again."""
    fixed = ["--proxy", str(proxy), "--corpus", str(corpora / "held"), "--micro-batch-size", "4", "--valid-fraction", "0.2"]
    arguments = {name: [*fixed, "--output-prefix", str(tmp_path / name)] for name in ("killed", "whole")}
    command = [sys.executable, "-c", CHILD, str(TOOL), *arguments["killed"]]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    journal = tmp_path / "killed.progress.json"
    while process.poll() is None and not (journal.exists() and json.loads(journal.read_bytes())["documents"] > 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert journal.exists() and not Path(tmp_path / "killed.json").exists()
    for name in ("killed", "whole"):
        tool.run(tool.parse(arguments[name]), cpu_runtime)
    assert "killed_train.jsonl" in (shown := capsys.readouterr().out) and "hard" in shown
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_signal_keeps_what_was_done(go: Mine, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = mining.next_token_entropy, []

    def signals(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*given)

    monkeypatch.setattr(mining, "next_token_entropy", signals)
    with pytest.raises(StopRequested, match="SIGTERM after"):
        go("stopped")
    go("stopped")
    assert contents(tmp_path / "stopped") == contents(whole)


def test_the_same_command_again(go: Mine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go()
    with monkeypatch.context() as patch:
        patch.setattr(mining, "next_token_entropy", None)
        assert go() == first
        with pytest.raises(DataError, match=r"another job, which differs in keep_easy, seed; .*--restart"):
            go(seed=1, keep_easy=True)
    train = tmp_path / "p_train.jsonl"
    train.write_bytes(train.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"p_train\.jsonl: the content is not what p\.json says"):
        go()
    train.unlink()
    assert go()["sha256"] == first["sha256"] and train.exists()
    assert go(seed=1, restart=True)["job"]["seed"] == 1
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(DataError, match="this is no manifest of prompts"):
        go()


@pytest.mark.parametrize("journal", [b"{", b'{"job": {}, "documents": 3, "candidates": 2}', b"[]"])
def test_a_journal_of_something_else_is_not_gone_on_with(go: Mine, whole: Path, tmp_path: Path, journal: bytes) -> None:
    (tmp_path / "p.progress.json").write_bytes(journal)
    (tmp_path / "p.candidates.tmp").write_bytes(b"\0" * 48)
    go()
    assert contents(tmp_path / "p") == contents(whole)


def test_a_proxy_of_another_tokenizer_is_refused(go: Mine, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", [[1, 2, 3]], vocab_size=257)
    with pytest.raises(DataError, match=r"other was tokenized with invented .*expected bytes"):
        go(corpus=str(tmp_path / "other"))


def test_a_damaged_corpus_is_refused(go: Mine, corpora: Path, tmp_path: Path) -> None:
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"held.{suffix}").write_bytes((corpora / f"held.{suffix}").read_bytes())
    content = bytearray((tmp_path / "held.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "held.bin").write_bytes(content)
    with pytest.raises(DataError, match="got sha256"):
        go(corpus=str(tmp_path / "held"))


def test_a_proxy_that_gives_nan_is_refused(go: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mining, "next_token_entropy", lambda network, parts, device: [torch.full((len(p),), torch.nan) for p in parts]
    )
    with pytest.raises(NumericsError, match="not finite in document 0"):
        go()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"valid_fraction": 1.0}, ConfigError, "--valid-fraction: got 1.0"),
        ({"min_context_tokens": 50}, ConfigError, "--min-context-tokens: got 50, expected at most"),
        ({"thresholds": Thresholds(1.0, 1.0, 2.0)}, ConfigError, "three rising numbers"),
        ({"seq_length": 1 << 20}, ConfigError, "--seq-length"),
        ({"thresholds": Thresholds(5.0, 6.0, 7.0)}, DataError, r"0 positions reach 5\.0 nats"),
    ],
)
def test_options_that_cannot_be_meant(go: Mine, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        go(**changes)


def test_arguments_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--proxy", "a", "--corpus", "b", "--output-prefix", "c"]
    assert tool.parse([*paths, "--thresholds", "1,2,3.5"]).thresholds == (1.0, 2.0, 3.5)
    given = {name: value for name, value in vars(tool.parse(paths)).items() if name != "device"}
    assert MiningOptions(**given | {"thresholds": Thresholds(*given["thresholds"])}) == MiningOptions(
        proxy="a", corpus="b", output_prefix="c"
    )
    for wrong in ("1,2", "a,b,c"):
        with pytest.raises(SystemExit):
            tool.parse([*paths, "--thresholds", wrong])
        assert "expected three numbers of nats" in capsys.readouterr().err
