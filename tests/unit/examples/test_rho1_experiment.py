"""The experiment compares what it says it compares, and reports what its runs wrote."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megarpt.config.load import load_config
from megarpt.config.schema import PretrainConfig
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.testing.tiny import write_corpus, write_sidecar

EXAMPLES = Path(__file__).parents[3] / "examples"
for folder in ("demo", "rho1"):
    sys.path.insert(0, str(EXAMPLES / folder))

corpus = importlib.import_module("corpus")
experiment = importlib.import_module("experiment")
mixes = importlib.import_module("mixes")
pipeline = importlib.import_module("pipeline")
results = importlib.import_module("results")

SIZES = {"base": 100_000, "mix": 80_000, "reference": 40_000, "finetune": 15_000, "heldout": 15_000, "code": 10_000}


# The stages.


@pytest.fixture(params=sorted(experiment.SCALES))
def scale(request: pytest.FixtureRequest) -> Any:
    return experiment.SCALES[request.param]


@pytest.fixture
def stages(scale: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.chdir(experiment.ROOT)
    return experiment.build_stages(Path("runs/x"), 2, scale, "cpu")


def configurations(stages: list[Any]) -> dict[str, PretrainConfig]:
    return {
        stage.name: load_config(command.argv[2], command.argv[3:])
        for stage in stages
        for command in stage.commands
        if command.argv[:2] == ("megarpt", "pretrain")
    }


def test_every_stage_needs_only_earlier_ones(stages: list[Any]) -> None:
    seen: set[str] = set()
    for stage in stages:
        assert set(stage.needs) <= seen and stage.name not in seen
        assert all(path.exists() for path in stage.files)
        seen.add(stage.name)


def test_every_run_is_a_valid_configuration_with_the_seed(stages: list[Any], scale: Any) -> None:
    configs = configurations(stages)
    runs = (*results.BEFORE, *scale.arms, *results.TUNED)
    assert set(configs) == {f"{mix}-{run}" for mix in results.MIXES for run in runs}
    assert {config.run.seed for config in configs.values()} == {2}


@pytest.mark.parametrize("mix", results.MIXES)
def test_arms_differ_in_the_choice_of_tokens_alone(stages: list[Any], scale: Any, mix: str) -> None:
    configs = configurations(stages)
    arms = {arm: configs[f"{mix}-{arm}"].model_dump() for arm in scale.arms}
    objectives = {arm: config.pop("objective") for arm, config in arms.items()}
    for config in arms.values():
        config["run"].pop("dir")
        config["data"]["train"][0].pop("streams")
    assert all(config == arms["clm"] for config in arms.values())
    chosen = {arm: (each["scorer"], each["weighting"], each["fraction"]) for arm, each in objectives.items()}
    expected = {
        "clm": ("none", "uniform", 1.0),
        "excess40": ("excess_loss", "top_fraction", 0.4),
        "excess60": ("excess_loss", "top_fraction", 0.6),
        "excess80": ("excess_loss", "top_fraction", 0.8),
        "random60": ("random", "top_fraction", 0.6),
        "loss60": ("loss", "top_fraction", 0.6),
    }
    assert set(expected) == set(experiment.ARMS)
    assert chosen == {arm: expected[arm] for arm in scale.arms}


def test_results_are_collected_after_every_stage_that_succeeded(tmp_path: Path) -> None:
    stages = [
        pipeline.Stage(name, name, (pipeline.Command(("sh", "-c", script), name),), ())
        for name, script in (("one", "true"), ("two", "true"), ("three", "exit 3"))
    ]
    seen: list[str] = []
    with (tmp_path / "shown").open("w") as stream, pytest.raises(pipeline.StageFailed):
        pipeline.Pipeline(tmp_path, stages, Console(file=stream), lambda stage: seen.append(stage.name)).run()
    assert seen == ["one", "two"]


# The corpora.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixes")
    mixes.build(out, SIZES, packages=(), seed=1, workers=1)
    return out


def read(out: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_one_mix_has_noise_and_the_other_has_none(built: Path) -> None:
    for part in ("base", "mix"):
        noisy, offtarget = read(built, f"{part}_noisy"), read(built, f"{part}_offtarget")
        assert {document["kind"] for document in noisy} == {"clean", "code", "noise"}
        assert any(document["noise"] for document in noisy if document["kind"] == "clean")
        assert not any(document["noise"] for document in offtarget)
        kinds = {document["kind"] for document in offtarget}
        assert "clean" in kinds and len(kinds) >= 3 and "noise" not in kinds


def test_both_mixes_have_the_same_share_of_target(built: Path) -> None:
    for part, size in (("base", SIZES["base"]), ("mix", SIZES["mix"])):
        for mix in results.MIXES:
            target = sum(len(d["text"].encode()) for d in read(built, f"{part}_{mix}") if d["kind"] == "clean")
            assert target / size == pytest.approx(mixes.OFFTARGET_SHARES["clean"], abs=0.12)


def test_nothing_held_out_is_trained_on(built: Path) -> None:
    training = [part for part in json.loads((built / "corpus.json").read_text())["parts"] if part not in ("heldout", "code")]
    seen = set().union(*(corpus.word_shingles(d["text"]) for part in training for d in read(built, part)))
    for document in read(built, "heldout"):
        shingles = corpus.word_shingles(document["text"])
        assert len(shingles & seen) <= corpus.MAX_OVERLAP * len(shingles)
    assert not {d["source"] for d in read(built, "code")} & {d["source"] for p in training for d in read(built, p)}


def test_another_seed_is_another_corpus(built: Path, tmp_path: Path) -> None:
    mixes.build(tmp_path, SIZES, packages=(), seed=2, workers=1)
    for path in built.glob("*.jsonl"):
        assert path.read_bytes() != (tmp_path / path.name).read_bytes(), path.name


def test_a_kind_of_text_that_the_machine_lacks_is_filled_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixes, "offtarget_files", lambda: {"header": [], "manual": [], "configuration": []})
    summary = mixes.build(tmp_path, SIZES, packages=(), seed=1, workers=1)["parts"]["mix_offtarget"]
    assert summary["bytes"] == summary["clean_bytes"] + summary["code_bytes"] >= SIZES["mix"]


def test_files_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.gz").write_bytes(gzip.compress(b".TH LS 1\n"))
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8b broken")
    (tmp_path / "latin1.h").write_bytes(b"/* caf\xe9 */")
    (tmp_path / "large.json").write_bytes(b"1" * (mixes.MAX_FILE_BYTES + 1))
    assert mixes.read_text(tmp_path / "good.gz") == ".TH LS 1\n"
    assert [mixes.read_text(tmp_path / name) for name in ("bad.gz", "latin1.h", "large.json", "none")] == [None] * 4


# The report.


def write_run(out: Path, seed: int, name: str, nats: list[float], *, status: str = "finished", order: str = "same") -> None:
    folder = out / f"seed{seed}" / f"noisy-{name}"
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text(json.dumps({"status": status}))
    lines = [
        {
            "kind": "valid",
            "step": step,
            "tokens/seen": 100 * step,
            "data/order": f"{order}{step}",
            "valid/heldout/loss_nats": each,
            "valid/heldout/top1": 1.0 / each,
            "valid/code/loss_nats": each + 1.0,
            "valid/code/top1": 0.1,
        }
        for step, each in enumerate(nats)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def two_seeds(tmp_path: Path) -> Path:
    for seed, shift in ((1, 0.0), (2, 1.0)):
        write_run(tmp_path, seed, "base", [6.0 + shift])
        write_run(tmp_path, seed, "clm", [6.0 + shift, 5.0 + shift])
        write_run(tmp_path, seed, "excess60", [6.0 + shift, 4.5 + 1.1 * shift])
    write_run(tmp_path, 2, "loss60", [7.0, 6.5], status="running")
    return tmp_path


def test_differences_are_taken_within_a_seed(two_seeds: Path) -> None:
    rows = results.write_results(two_seeds)["summary"]["noisy"]
    assert set(rows) == {"base", "clm", "excess60"}  # not the one that is still running
    assert rows["clm"]["heldout_nats"]["mean"] == pytest.approx(5.5)
    assert rows["clm"]["heldout_nats"]["sd"] == pytest.approx(0.5**0.5)
    difference = rows["excess60"]["heldout_nats_minus_clm"]
    assert difference["by_seed"] == pytest.approx({"1": -0.5, "2": -0.4})
    assert difference["mean"] == pytest.approx(-0.45) and difference["sd"] == pytest.approx(0.005**0.5)
    assert "heldout_nats_minus_clm" not in rows["clm"]


def test_a_loss_of_selection_is_reported_as_one(two_seeds: Path) -> None:
    write_run(two_seeds, 1, "random60", [6.0, 5.25])
    _, lines = results.table(results.write_results(two_seeds)["summary"]["noisy"])
    assert next(line for line in lines if line[0] == "random 60% (1 of the seeds)")[1:3] == ["5.250", "+0.250"]


@pytest.mark.parametrize(
    ("nats", "order", "message"), [([6.0, 5.0], "other", "same tokens"), ([6.5, 5.0], "same", "same weights")]
)
def test_arms_that_cannot_be_compared_are_refused(two_seeds: Path, nats: list[float], order: str, message: str) -> None:
    write_run(two_seeds, 1, "excess80", nats, order=order)
    with pytest.raises(ValueError, match=message):
        results.write_results(two_seeds)


def test_everything_promised_is_written(two_seeds: Path) -> None:
    with (two_seeds / "shown").open("w") as stream:
        results.write(two_seeds, Console(file=stream, width=160))
    assert "top 60% by excess loss" in (two_seeds / "shown").read_text()
    assert "| top 60% by excess loss | 5.050 ± 0.778 | -0.450 ± 0.071 |" in (two_seeds / "results.md").read_text()
    assert (two_seeds / "rho1.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((two_seeds / "results.json").read_text())["runs"][0]["points"]


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as stream:
        results.write(tmp_path, Console(file=stream))
    assert "No student" in (tmp_path / "shown").read_text()


def test_kept_shares_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [("abcdef", "clean", [[4, 6]]), ("ghijk", "header", [])]
    lines = [json.dumps({"text": text, "source": "", "kind": kind, "noise": noise}) for text, kind, noise in documents]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "corpus" / "mix_noisy.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(results, "load_tokenizer", lambda path: load_tokenizer("bytes"))
    eod = load_tokenizer("bytes").eod
    mix = tmp_path / "data" / "mix_noisy"
    write_corpus(mix, [[*text.encode(), eod] for text, _, _ in documents])
    nan = float("nan")  # the first token of a document is never predicted
    reference = [[nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [nan, 1.0, 1.0, 1.0, 1.0, 1.0]]
    student = [[nan, 9.0, 8.0, 0.5, 0.1, 0.2, 9.9], [nan, 7.0, 6.0, 5.0, 0.3, 9.9]]
    write_sidecar(f"{mix}_ref_nll", mix, reference, seq_length=4, separate_documents=True)
    assert results.kept_shares(tmp_path, "noisy") is None
    write_sidecar(f"{mix}_student_nll", mix, student, seq_length=4, separate_documents=True)
    shares = results.kept_shares(tmp_path, "noisy", fraction=0.5)
    assert shares == {"clean": pytest.approx(2 / 3), "injected": 0.0, "header": pytest.approx(3 / 4)}
