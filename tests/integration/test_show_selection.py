"""`tools/show_selection.py`: what it shows is what training would choose."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megarpt.config.schema import ScoreOptions
from megarpt.corpus.indexed import CorpusIndex
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError
from megarpt.run import pretrain, score
from megarpt.run.selection_page import Selection, ShownToken
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.tiny import byte_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "show_selection.py"
spec = importlib.util.spec_from_file_location("show_selection_tool", TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

S, B, FRACTION = 64, 4, 0.5
Show = Callable[..., Selection]


@pytest.fixture(scope="module")
def models(corpora: Path, tmp_path_factory: pytest.TempPathFactory, cpu_runtime: Runtime) -> Path:
    """A folder with a reference, a student that selects by it, and the losses of both on the held-out corpus."""
    folder = tmp_path_factory.mktemp("models")
    for name, steps, objective in (
        ("reference", 30, {}),
        ("student", 6, {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": FRACTION}),
    ):
        cfg = tiny_config(
            **{
                "run": {"dir": str(folder / name), "seed": steps},
                "model.mcore": TWO_LAYERS,
                "data.train": [{"path": str(corpora / "train")}],
                "data.valid": {"held": str(corpora / "held")},
                "data.seq_length": S,
                "batch": {"micro_batch_size": B, "global_batch_size": 8},
                "objective": objective | ({"reference": {"checkpoint": str(folder / "reference")}} if objective else {}),
                "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
                "train.train_tokens": steps * 512,
                "evaluation.at_start": False,
                "logging.tensorboard": False,
            }
        )
        assert pretrain.run(cfg, cpu_runtime) == 0
        options = ScoreOptions(reference=cfg.run.dir, corpus=str(corpora / "held"), output_prefix=str(folder / f"{name}_nll"))
        assert score.run(options, cpu_runtime) == 0
    return folder


@pytest.fixture
def show(cpu_runtime: Runtime, models: Path, tmp_path: Path) -> Show:
    """Runs the tool on the student in this process and returns what it wrote."""

    def go(*argv: str | Path) -> Selection:
        outputs = ["--output", str(tmp_path / "page.html"), "--json", str(tmp_path / "page.json")]
        tool.run(tool.parse([str(models / "student"), *map(str, argv), *outputs]), cpu_runtime)
        return Selection.read_json(tmp_path / "page.json")

    return go


def values(models: Path) -> tuple[np.ndarray, np.ndarray]:
    """Losses of student and reference by position in the held-out corpus; NaN where there is none."""
    student, reference = (np.fromfile(models / f"{name}_nll.bin", dtype=np.float32) for name in ("student", "reference"))
    return student, reference


def predicted(selection: Selection) -> list[ShownToken]:
    return [token for document in selection.documents for token in document.tokens if token.kept is not None]


@pytest.mark.parametrize("scope", ["global_batch", "sequence", "microbatch"])
def test_what_is_kept_follows_from_the_losses_of_both_models(show: Show, models: Path, corpora: Path, scope: str) -> None:
    found = show("--documents", "all", "--scope", scope)
    student, reference = values(models)
    excess = student - reference
    positions = np.flatnonzero(np.isfinite(excess))
    tokens = predicted(found)
    assert len(tokens) == len(positions) == found.num_competing
    assert [token.id for document in found.documents for token in document.tokens] == np.fromfile(
        corpora / "held.bin", dtype=np.uint16
    ).tolist()
    np.testing.assert_allclose([token.loss for token in tokens], student[positions], atol=1e-5)
    np.testing.assert_allclose([token.reference_loss for token in tokens], reference[positions], atol=1e-5)
    size = {"global_batch": len(excess), "sequence": S, "microbatch": S * B}[scope]
    shown = np.array([token.score for token in tokens])
    kept = np.array([token.kept for token in tokens])
    rank = np.array([token.rank for token in tokens])
    for number in np.unique((positions - 1) // size):
        members = np.flatnonzero((positions - 1) // size == number)
        count = max(1, int(np.floor(FRACTION * len(members) + 0.5)))
        best = members[np.argsort(-shown[members], kind="stable")]
        assert sorted(best[:count]) == np.flatnonzero(kept & np.isin(np.arange(len(kept)), members)).tolist()
        assert rank[best].tolist() == list(range(1, len(members) + 1))
    if scope == "global_batch":
        assert found.threshold == pytest.approx(shown[kept].min()) and found.num_kept == kept.sum()
    else:
        assert found.threshold is None


def test_a_sidecar_says_the_same_as_the_model(show: Show, models: Path) -> None:
    online = show("--documents", "0,3")  # the reference the student was trained with
    named = show("--documents", "0,3", "--reference", models / "reference")
    sidecar = show("--documents", "0,3", "--reference", models / "reference_nll")
    assert online == named and sidecar.reference.startswith("sidecar ")
    for a, b in zip(predicted(online), predicted(sidecar), strict=True):
        assert (a.id, a.kept, a.rank) == (b.id, b.kept, b.rank) and a.reference_loss == pytest.approx(
            b.reference_loss, abs=1e-6
        )


def test_a_document_competes_with_the_corpus_or_with_itself(show: Show, corpora: Path) -> None:
    length = max(range(20), key=lambda number: len(CorpusIndex(corpora / "held").read_document(number)))
    among_all, alone = show("--documents", length), show("--documents", length, "--max-tokens", "0")
    assert among_all.num_competing > 2 * alone.num_competing
    assert [token.loss for token in predicted(among_all)] == pytest.approx([t.loss for t in predicted(alone)], abs=1e-5)
    short = show("--documents", length, "--max-shown", "10")
    assert "the first 10 of" in short.documents[0].title and len(short.documents[0].tokens) == 10


def test_any_text_can_be_shown(show: Show, tmp_path: Path, corpora: Path) -> None:
    (tmp_path / "mine.txt").write_text("The word – is there.\n", encoding="utf-8")
    found = show("--text", "that was <not> all", "--file", tmp_path / "mine.txt", "--fraction", "0.25")
    assert [document.title for document in found.documents] == ["that was <not> all", "mine.txt"]
    tokenizer = byte_tokenizer()
    for document, text in zip(found.documents, ["that was <not> all", "The word – is there.\n"], strict=True):
        assert [token.id for token in document.tokens] == [*tokenizer.encode(text), tokenizer.eod]
        assert document.tokens[0].kept is None and all(token.kept is not None for token in document.tokens[1:])
    assert found.num_kept == int(np.floor(0.25 * found.num_competing + 0.5)) == sum(bool(t.kept) for t in predicted(found))
    among = show("--text", "that was <not> all", "--fraction", "0.25", "--corpus", corpora / "held")
    assert [t.loss for t in predicted(among)] == pytest.approx([t.loss for t in found.documents[0].tokens[1:]], abs=1e-5)
    assert among.num_competing > 20 * found.num_competing


@pytest.mark.parametrize("scorer", ["loss", "random", "reference_loss", "reference_entropy"])
def test_other_scorers_are_those_of_training(show: Show, models: Path, scorer: str) -> None:
    found = show("--documents", "all", "--scorer", scorer)
    tokens = predicted(found)
    kept = [token for token in tokens if token.kept]
    assert len(kept) == found.num_kept == int(np.floor(FRACTION * len(tokens) + 0.5))
    if scorer == "loss":
        assert [token.score for token in tokens] == [token.loss for token in tokens]
    elif scorer == "reference_loss":
        assert [token.score for token in tokens] == [-(token.reference_loss or 0.0) for token in tokens]
    elif scorer == "reference_entropy":
        assert all(token.score is not None and token.score <= 0.0 for token in tokens)
        assert all(token.reference_loss is not None for token in tokens)
    assert min(t.score or 0.0 for t in kept) >= max(t.score or 0.0 for t in tokens if not t.kept)


def test_mistakes_are_named(show: Show, models: Path, tmp_path: Path, cpu_runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"--documents: got 99, expected numbers from 0 to 19"):
        show("--documents", "99")
    with pytest.raises(ConfigError, match="knows the tokens of its corpus alone"):
        show("--text", "some words", "--reference", models / "reference_nll")
    with pytest.raises(ConfigError, match="--text: got an empty text"):
        show("--text", "")
    with pytest.raises(ConfigError, match=r"--fraction: got 1\.5"):
        show("--fraction", "1.5")
    with pytest.raises(DataError, match="cannot read"):
        show("--file", tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match="--reference: scorer excess_loss ranks by a reference model"):
        tool.run(tool.parse([str(models / "reference"), "--output", str(tmp_path / "x.html")]), cpu_runtime)
    with pytest.raises(SystemExit):
        tool.parse(["run", "--documents", "1", "--text", "x"])


def test_as_a_command(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(models / "student"), "--output", str(tmp_path / "s.html"), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "competing tokens are kept" in result.stdout
    assert (tmp_path / "s.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    refused = subprocess.run([*command, "--corpus", "nowhere"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 79 and refused.stderr.count("\n") <= 4 and "error: nowhere" in refused.stderr
