from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NODES = ["n1", "n2", "n3", "n4"]
HEALTHY = "0, NVIDIA H100, 550.1, 4, 0, No, No"


def judge(preflight: ModuleType, folder: Path, stage: str, reports: dict[str, dict[str, Any]], **more: Any) -> Any:
    for node, report in reports.items():
        (folder / f"{stage}-{node}.json").write_text(json.dumps({"problems": []} | report))
    return preflight.judge(str(folder), stage, NODES, **more)


def network(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    good = {"phase": 4, "all_gbps": 300.0, "pair_gbps": 350.0, "clock_s": 0.001}
    return {node: good | changes.get(node, {}) for node in NODES}


def test_healthy_nodes_pass(preflight: ModuleType, tmp_path: Path) -> None:
    reports = {node: {"versions": {"torch": "2.13"}} for node in NODES}
    assert judge(preflight, tmp_path, "node", reports) == ({}, [])
    assert judge(preflight, tmp_path, "network", network(), min_gbps=200.0) == ({}, [])


def test_a_node_without_a_report_is_named(preflight: ModuleType, tmp_path: Path) -> None:
    failed, _ = judge(preflight, tmp_path, "node", {node: {"versions": {}} for node in NODES if node != "n3"})
    assert list(failed) == ["n3"] and "left no report" in failed["n3"][0]


@pytest.mark.parametrize(("odd", "named"), [(["n3"], ["n3"]), (["n1"], ["n1"]), (["n3", "n4"], ["n3", "n4"])])
def test_other_versions_are_named(preflight: ModuleType, tmp_path: Path, odd: list[str], named: list[str]) -> None:
    failed, _ = judge(
        preflight, tmp_path, "node", {node: {"versions": {"torch": "2.12" if node in odd else "2.13"}} for node in NODES}
    )
    assert list(failed) == named
    assert failed[named[0]] == ["torch: got 2.12, the other nodes have 2.13"]


def test_a_missing_library_is_another_version(preflight: ModuleType, tmp_path: Path) -> None:
    failed, _ = judge(
        preflight, tmp_path, "node", {node: {"versions": {} if node == "n2" else {"nccl": "1"}} for node in NODES}
    )
    assert failed == {"n2": ["nccl: got absent, the other nodes have 1"]}


@pytest.mark.parametrize(
    ("changes", "named", "message"),
    [
        ({"n2": {"problems": ["GPU 3: NCCL error"]}}, "n2", "GPU 3: NCCL error"),
        ({"n4": {"phase": 1, "all_gbps": 0.0, "clock_s": 0.0}}, "n4", "stopped in phase 1 of 4, others came to 4"),
        ({"n2": {"pair_gbps": 80.0}}, "n2", "80.0 GB/s with its neighbours, other nodes 350.0"),
        ({"n3": {"clock_s": -61.5}}, "n3", "the clock is -61.5 s off"),
    ],
)
def test_trouble_with_one_node_names_it(
    preflight: ModuleType, tmp_path: Path, changes: dict[str, Any], named: str, message: str
) -> None:
    failed, unnamed = judge(preflight, tmp_path, "network", network(**changes))
    assert list(failed) == [named] and message in failed[named][0] and unnamed == []


def test_trouble_with_all_names_none(preflight: ModuleType, tmp_path: Path) -> None:
    failed, unnamed = judge(preflight, tmp_path, "network", network(), min_gbps=310.0)
    assert failed == {} and unnamed == ["the network: 300.0 GB/s over all nodes, expected 310.0"]
    stuck = {node: {"phase": 1} for node in NODES}
    failed, unnamed = judge(preflight, tmp_path, "network", network(**stuck))
    assert failed == {} and "all nodes stopped in phase 1 of 4" in unnamed[0]


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (HEALTHY, ""),
        ("0, NVIDIA H100, 550.1, 4, [N/A], [N/A], [N/A]", ""),
        ("", "0 GPUs, expected 1"),
        ("0, NVIDIA H100, 550.1, 60000, 0, No, No", "GPU 0 holds 60000 MB"),
        ("0, NVIDIA H100, 550.1, 4, 2, No, No", "GPU 0: 2 uncorrected memory errors"),
        ("0, NVIDIA H100, 550.1, 4, 0, Yes, No", "GPU 0: memory rows"),
        ("0, NVIDIA H100, 550.1, 4, 0, No, Yes", "GPU 0: memory rows"),
        ("No devices were found\n9", "nvidia-smi ends with 9"),
    ],
)
def test_gpus(preflight: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, problem: str) -> None:
    text, _, code = output.partition("\n")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ -z '{text}' ] || echo '{text}'\nexit {code or 0}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report: dict[str, Any] = {"problems": [], "versions": {}}
    preflight.check_gpus(report, 1)
    assert len(report["problems"]) == bool(problem) and problem in "".join(report["problems"])


def test_no_driver_is_a_problem(preflight: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report: dict[str, Any] = {"problems": [], "versions": {}}
    preflight.check_gpus(report, 8)
    assert "nvidia-smi" in report["problems"][0]


def test_a_folder_that_can_be_written(preflight: ModuleType, tmp_path: Path) -> None:
    assert preflight.check_folder(str(tmp_path)) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem(preflight: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        preflight.check_folder(str(tmp_path / "none"))


def test_a_folder_that_gives_back_something_else(
    preflight: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(source: str, target: str) -> None:
        Path(target).write_bytes(b"x" * 10)

    monkeypatch.setattr(preflight.os, "rename", rename)
    with pytest.raises(OSError, match="does not read back"):
        preflight.check_folder(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_stale_copy_of_the_package_shows(preflight: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aged").mkdir()
    (tmp_path / "aged" / "__init__.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = preflight.source_hash("aged")
    (tmp_path / "aged" / "__init__.py").write_text("a = 2\n")
    assert preflight.source_hash("aged") != before
    assert preflight.source_hash("absent_package") == "not installed"
