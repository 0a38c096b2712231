"""TensorBoard: grouped scalars over steps and over tokens, histograms, texts, a layout, and the run's settings.

    tensorboard/             everything, over steps
    tensorboard/by_tokens/   training and held-out curves over tokens seen

After a resume the writer tells TensorBoard to forget what lies beyond it (`purge_step`), so no curve runs back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megarpt.errors import ExtensionError
from megarpt.structs import Progress

_TOKEN_AXIS_GROUPS = ("train/", "valid/", "select/", "data/", "rl/", "policy/")
_HPARAM_SECTIONS = ("model", "data", "batch", "optimizer", "objective", "train")
_FLUSH_S = 10
_QUEUE = 1000
_BINS = 64

# Multiline entries are regular expressions over tags; a margin chart takes value, lower and upper.
_LAYOUT: Mapping[str, Mapping[str, list[Any]]] = {
    "loss": {
        "training and held-out loss (nats)": ["Multiline", ["train/loss_nats", r"valid/.*/loss_nats"]],
        "held-out bits per byte": ["Multiline", [r"valid/.*/bits_per_byte"]],
        "held-out top-1 accuracy": ["Multiline", [r"valid/.*/top1"]],
    },
    "selection": {
        "kept share per sequence": [
            "Margin",
            ["select/sequence_kept_mean", "select/sequence_kept_min", "select/sequence_kept_max"],
        ],
        "kept share": ["Multiline", ["select/kept_fraction"]],
        "excess loss quantiles (nats)": ["Multiline", [r"select/excess_nats_p\d\d"]],
    },
    "reinforcement": {
        "reward": ["Multiline", ["rl/reward_mean", "rl/format_rate", r"valid/.*/reward_mean"]],
        "groups": ["Multiline", ["rl/dead_groups", "rl/all_wrong_groups", "rl/all_right_groups"]],
        "tokens of a completion": ["Multiline", ["rl/length_mean_tokens", "rl/length_max_tokens"]],
        "cut off and not judged": ["Multiline", ["rl/truncated_share", "rl/no_room_share", "rl/unknown_share"]],
        "KL and entropy (nats)": ["Multiline", [r"policy/kl_.*_nats", "policy/entropy_nats"]],
        "clipped": ["Multiline", [r"policy/clipped_.*"]],
        "engine against trainer (nats)": ["Multiline", [r"policy/sampler_gap(_max)?_nats"]],
        "seconds of an iteration": ["Multiline", [r"time/(generate|verify|score|train|rest|iteration)_s"]],
    },
    "health": {
        "gradient norm": ["Multiline", ["optim/grad_norm"]],
        "tokens per second": ["Multiline", [r"perf/tokens_per_s.*"]],
        "memory (bytes)": ["Multiline", [r"mem/.*_bytes"]],
    },
}


class TensorBoardSink:
    """A `MetricSink` that writes event files."""

    def __init__(self, folder: Path, *, resume: Progress | None = None) -> None:
        """Open the event files; `resume` is where the run continues, None for a fresh start.

        Cost: imports tensorboard, about 0.3 s, here and not before.

        Raises:
            ExtensionError: tensorboard is not installed.
        """
        try:
            from torch.utils import tensorboard as torch_tensorboard
            from torch.utils.tensorboard import summary
        except ImportError as error:
            raise ExtensionError(
                f"logging.tensorboard is true, but tensorboard cannot be imported ({error}); "
                "pip install tensorboard, or set logging.tensorboard=false"
            ) from error
        self._protos: Any = summary
        self._writer: Any = torch_tensorboard.SummaryWriter
        self._end_of_session: Any = None
        self._folder = folder
        self._open(0 if resume is None else resume.step + 1, 0 if resume is None else resume.tokens_seen + 1)
        self._by_step.add_custom_scalars(_LAYOUT)

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None:
        """One event for all tags: a tenth of the cost of one for each."""
        self._add_scalars(self._by_step, values, progress.step)
        over_tokens = {tag: value for tag, value in values.items() if tag.startswith(_TOKEN_AXIS_GROUPS)}
        if over_tokens:
            self._add_scalars(self._by_tokens, over_tokens, progress.tokens_seen)

    def histogram(self, tag: str, values: np.ndarray, progress: Progress) -> None:
        """Distribution of finite numbers."""
        self._by_step.add_histogram(tag, values.astype(np.float64), progress.step, bins=_BINS)

    def text(self, tag: str, markdown: str, progress: Progress) -> None:
        """Markdown; raw HTML other than simple formatting is removed by TensorBoard."""
        self._by_step.add_text(tag, markdown, progress.step)

    def rewind(self, progress: Progress) -> None:
        """Go on in new files, which tell TensorBoard to forget what lies beyond `progress`."""
        self._by_step.close()
        self._by_tokens.close()
        self._open(progress.step + 1, progress.tokens_seen + 1)

    def settings(self, config: Mapping[str, Any], environment: Mapping[str, Any], yaml_text: str, progress: Progress) -> None:
        """The resolved configuration and the environment as text, and the settings that tell runs apart as hyperparameters."""
        self.text("run/config", f"```yaml\n{yaml_text}\n```", progress)
        self.text("run/environment", f"```json\n{json.dumps(environment, indent=2)}\n```", progress)
        names = [str(name) for name in config.get("data", {}).get("valid", {})]
        metrics = {"train/loss_nats": 0.0, **{f"valid/{name}/loss_nats": 0.0 for name in names}}
        experiment, start, end = self._protos.hparams(hyperparameters(config), metrics)
        self._file(self._by_step).add_summary(experiment)
        self._file(self._by_step).add_summary(start)
        self._end_of_session = end

    def flush(self) -> None:
        self._by_step.flush()
        self._by_tokens.flush()

    def close(self, is_finished: bool) -> None:
        """Close the files. Only a finished run is marked as a success in the table of hyperparameters."""
        if is_finished and self._end_of_session is not None:
            self._file(self._by_step).add_summary(self._end_of_session)
        self._by_step.close()
        self._by_tokens.close()

    def _open(self, step: int, tokens: int) -> None:
        folder, options = str(self._folder), {"max_queue": _QUEUE, "flush_secs": _FLUSH_S}
        self._by_step: Any = self._writer(folder, purge_step=step, **options)
        self._by_tokens: Any = self._writer(f"{folder}/by_tokens", purge_step=tokens, **options)

    def _add_scalars(self, writer: Any, values: Mapping[str, float], step: int) -> None:
        entries = [self._protos.Summary.Value(tag=tag, simple_value=_in_float32(value)) for tag, value in values.items()]
        self._file(writer).add_summary(self._protos.Summary(value=entries), step)

    @staticmethod
    def _file(writer: Any) -> Any:
        return writer.file_writer


def hyperparameters(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Settings that tell runs apart, by dotted key; lists and unset values as text."""
    flat: dict[str, str | float | bool] = {}
    if "seed" in config.get("run", {}):
        flat["run.seed"] = config["run"]["seed"]
    for section in _HPARAM_SECTIONS:
        for key, value in config.get(section, {}).items():
            if value is None or value == {} or value == []:
                continue
            flat[f"{section}.{key}"] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat


def _in_float32(value: float) -> float:
    """Event files hold 32-bit floats, and the writer refuses numbers beyond them."""
    return value if abs(value) <= 3.4e38 or not math.isfinite(value) else math.copysign(math.inf, value)
