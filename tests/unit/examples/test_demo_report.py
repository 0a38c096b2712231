"""The demo's verdict is computed from the curves, whatever they are."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.run.selection_page import Selection, ShownToken

DEMO = Path(__file__).parents[3] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

report = importlib.import_module("report")
run = importlib.import_module("run")
selection = importlib.import_module("selection")


def curve(*nats: float) -> list:
    return [report.Point(100 * number, value, 0.1) for number, value in enumerate(nats)]


@pytest.mark.parametrize(
    ("nats", "target", "expected"),
    [
        ((5.0, 4.0, 3.0), 3.5, 150.0),  # between two evaluations
        ((5.0, 4.0, 3.0), 4.0, 100.0),  # at one
        ((5.0, 4.0, 3.0), 2.9, None),  # never
        ((5.0, 4.0, 3.0), 5.5, 0.0),  # from the start
        ((5.0, 6.0, 4.0, 4.5, 3.0), 5.0, 0.0),
        ((5.0, 6.0, 4.0, 4.5, 3.0), 4.9, 155.0),  # the first time down counts
    ],
)
def test_tokens_to_reach(nats: tuple[float, ...], target: float, expected: float | None) -> None:
    assert report.tokens_to_reach(curve(*nats), target) == pytest.approx(expected)


def test_the_verdict_says_when_selection_loses() -> None:
    better, worse = curve(5.0, 4.0), curve(5.0, 4.5)
    assert "never reaches" in report.verdict_sentence(None, better, worse)
    assert "0.500 nats higher" in report.verdict_sentence(None, better, worse)
    assert "with 50% of the tokens" in report.verdict_sentence(0.5, worse, better)


@pytest.mark.parametrize("needed", [None, 120.0])
def test_plot(tmp_path: Path, needed: float | None) -> None:
    shares = {"clean": 0.8, "injected": None, "code": 0.4, "noise": 0.1}
    report.plot(tmp_path / "demo.png", curve(5.0, 4.8, 4.6), curve(5.0, 4.5, 4.2), needed, shares)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def page(kind: str, *tokens: tuple[str, str, bool | None]) -> selection.Page:
    made = (selection.Token(text, what, ShownToken(1, text, kept, 2.0, 1.5, 0.5, 1)) for text, what, kept in tokens)
    return selection.Page("module", kind, tuple(made))


def test_kept_shares_leave_out_what_is_never_predicted() -> None:
    pages = [
        page("clean", ("?", "clean", None), ("a", "clean", True), ("b", "clean", False), ("c", "injected", False)),
        page("code", ("d", "code", True)),
    ]
    assert selection.kept_shares(pages) == {"clean": 0.5, "injected": 0.0, "code": 1.0, "noise": None}


def test_the_page_for_the_browser_has_the_marks_and_the_shares() -> None:
    chosen = Selection("slm", "reference", "excess_loss", 0.6, "global_batch", 0.1, 100, 60, ())
    pages = [page("noise", ("<script>", "noise", False)), page("clean", ("word", "clean", True), ("x9", "injected", False))]
    text = selection.html_page(chosen, pages, {"noise": 0.25, "clean": None})
    assert "&lt;script&gt;" in text and "<script>" not in text
    assert "pages of noise</td>" in text and "25%" in text and "clean English</td>" not in text
    (injected,) = re.findall(r'<span class="([^"]*)"[^>]*>x9<', text)
    assert "m" in injected.split()
    assert text.index("module (clean English)") < text.index("module (pages of noise)")


def test_token_kinds_follow_the_recorded_noise() -> None:
    document = {"kind": "clean", "noise": [[3, 6]]}
    assert [selection.token_kind(document, n, n + 1) for n in (0, 2, 3, 5, 6)] == ["clean"] * 2 + ["injected"] * 2 + ["clean"]
    assert selection.token_kind({"kind": "code", "noise": []}, 0, 1) == "code"


@pytest.mark.parametrize("scale", sorted(run.SCALES))
def test_every_stage_needs_only_earlier_ones(scale: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    for stage in run.build_stages(tmp_path, run.SCALES[scale], "cpu"):
        assert set(stage.needs) <= seen
        assert all(path.exists() for path in stage.files)
        seen.add(stage.name)


def test_the_full_demo_shows_the_plainest_commands() -> None:
    stages = {stage.name: stage for stage in run.build_stages(Path("runs/demo"), run.SCALES["full"], "auto")}
    assert stages["base"].commands[0].echo() == "megarpt pretrain examples/demo/base.yaml"
    assert [command.echo() for command in stages["students"].commands] == [
        "megarpt pretrain examples/demo/clm.yaml",
        "megarpt pretrain examples/demo/slm.yaml",
    ]


@pytest.mark.parametrize("name", ["base", "reference", "clm", "slm"])
def test_the_yaml_files_hold_the_full_scale(name: str) -> None:
    config = yaml.safe_load((DEMO / f"{name}.yaml").read_text())
    assert config["train"]["train_tokens"] == run.SCALES["full"].tokens[name]
    assert config["run"]["dir"] == f"runs/demo/{name}"
    if name in ("clm", "slm"):
        assert config["evaluation"]["interval_steps"] == run.SCALES["full"].evaluation_interval_steps


def test_the_students_differ_in_what_counts_alone() -> None:
    clm, slm = (yaml.safe_load((DEMO / f"{name}.yaml").read_text()) for name in ("clm", "slm"))
    assert slm["data"]["train"][0].pop("streams") == {"ref_nll": "runs/demo/data/mix_ref_nll"}
    assert slm.pop("objective") != clm.pop("objective")
    assert slm["run"].pop("dir") != clm["run"].pop("dir")
    assert slm == clm


def test_tokens_find_their_characters() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = [*"aé’b".encode(), tokenizer.eod]
    spans = selection.token_spans(tokenizer, ids, "aé’b")
    assert ["aé’b"[begin:end] for begin, end in spans] == ["a", "", "é", "", "", "’", "b"]
    with pytest.raises(ValueError, match="differ"):
        selection.token_spans(tokenizer, ids, "aé’c")
