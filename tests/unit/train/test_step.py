"""A step whose selection follows from the step before."""

from __future__ import annotations

from pathlib import Path

from megarpt.device.runtime import Runtime
from megarpt.testing.tiny_run import tiny_run

LAGGED = {"scorer": "loss", "weighting": "top_fraction", "fraction": 0.6, "scope": "lagged_global_batch"}


def test_a_threshold_that_nothing_reaches_costs_one_step(cpu_runtime: Runtime, tmp_path: Path) -> None:
    """The step that keeps nothing has no gradient, and the next one has the threshold of its scores."""
    run = tiny_run(tmp_path, cpu_runtime, seed=1, objective=LAGGED)
    run.step.objective.load_state_dict({"threshold": 1e9})
    nothing, something = run.train(2)
    assert (nothing.num_tokens, nothing.loss_nats, nothing.grad_norm, nothing.skipped) == (0, 0.0, 0.0, False)
    assert nothing.metrics["select/kept_fraction"] == nothing.metrics["select/overlap_with_exact"] == 0.0
    assert something.num_tokens > 0 and something.grad_norm > 0.0 and something.metrics["select/overlap_with_exact"] > 0.5
