"""Weights & Biases, in addition to `metrics.jsonl` and TensorBoard; never needed.

Offline unless asked otherwise: a training run must not depend on a server. The run's id lies in the run folder, so a resumed
run continues the same curve.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.errors import ExtensionError
from megarpt.structs import Progress


class WandbSink:
    """A `MetricSink` that writes to Weights & Biases."""

    def __init__(
        self,
        run_dir: Path,
        project: str,
        config: Mapping[str, Any],
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        """Start or continue the run whose id is in `run_dir/wandb_id`.

        Raises:
            ExtensionError: wandb is not installed.
        """
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ExtensionError(
                f"logging.wandb_project is {project!r}, but wandb cannot be imported ({error}); "
                "pip install 'megarpt[wandb]', or leave logging.wandb_project unset"
            ) from error
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            atomic_write_bytes(id_file, secrets.token_hex(8).encode())
        self._run: Any = self._wandb.init(
            project=project,
            id=id_file.read_text().strip(),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            mode=mode,
            resume="allow",
        )
        # Steps that are done again after a resume overwrite nothing in wandb's own step; ours is the axis instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None:
        self._run.log({**values, "step": progress.step, "tokens/seen": progress.tokens_seen})

    def histogram(self, tag: str, values: np.ndarray, progress: Progress) -> None:
        self._run.log({tag: self._wandb.Histogram(values), "step": progress.step})

    def rewind(self, progress: Progress) -> None:
        """Not possible there: steps that are done again are drawn again, on the same step."""

    def text(self, tag: str, markdown: str, progress: Progress) -> None:
        """Not sent: the decoded samples and settings are in TensorBoard, the configuration was given at the start."""

    def flush(self) -> None:
        """wandb writes continuously by itself."""

    def close(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)
