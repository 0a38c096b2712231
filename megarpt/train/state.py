"""All that a run must remember besides the model, the optimizer and the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megarpt.errors import CheckpointError
from megarpt.structs import Progress, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands, as plain values that are equal on every rank.

    The states of the random generators differ between ranks; the checkpoint manager collects and restores those itself.
    """

    progress: Progress = field(default_factory=Progress)
    data: Mapping[str, Any] = field(default_factory=dict)  # TokenBatches.state_dict(): position and fingerprint of the data
    skipped_in_a_row: int = 0  # steps since the last one that was applied
    skipped_total: int = 0
    spikes_total: int = 0
    left_out: Sequence[Sequence[int]] = ()  # [first, end) of the samples that each rollback left out
    restarts: int = 0  # how often the run was continued from a checkpoint
    selection: Mapping[str, Any] = field(default_factory=dict)  # what a selection rule carries from step to step
    spikes: Mapping[str, Any] = field(default_factory=dict)  # SpikeGuard.state_dict(): the window that steps are judged by

    def after_step(
        self, report: StepReport, *, samples: int, tokens_seen: int, data_order: str = "", is_spike: bool = False
    ) -> TrainState:
        """The state after one more step.

        Args:
            report: of the step.
            samples: sequences the step consumed over all ranks.
            tokens_seen: tokens it fed through the model over all ranks.
            data_order: fingerprint of the data after the step.
            is_spike: whether its loss or gradient norm was a spike.
        """
        progress = Progress(
            step=self.progress.step + 1,
            samples=self.progress.samples + samples,
            tokens_seen=self.progress.tokens_seen + tokens_seen,
            tokens_trained=self.progress.tokens_trained + (0 if report.skipped else report.num_tokens),
            data_order=data_order,
        )
        return replace(
            self,
            progress=progress,
            skipped_in_a_row=self.skipped_in_a_row + 1 if report.skipped else 0,
            skipped_total=self.skipped_total + int(report.skipped),
            spikes_total=self.spikes_total + int(is_spike),
        )

    def rolled_back_to(self, saved: TrainState, *, first: int, end: int) -> TrainState:
        """The saved state, knowing what has happened since: samples `first` up to `end` are left out from here on."""
        return replace(
            saved,
            restarts=self.restarts,
            spikes_total=self.spikes_total,
            left_out=(*self.left_out, (first, end)),
        )

    def counts(self) -> dict[str, int]:
        """What has gone wrong so far, by name."""
        return {"skipped_steps": self.skipped_total, "spikes": self.spikes_total, "rollbacks": len(self.left_out)}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; `from_dict` of it is equal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainState:
        """What `to_dict` returned.

        Raises:
            CheckpointError: entries are missing or unknown, as in a checkpoint of another version.
        """
        expected, got = {f.name for f in fields(cls)}, set(content)
        if expected != got:
            raise CheckpointError(
                f"train state: got the entries {sorted(got)}, expected {sorted(expected)}; "
                "the checkpoint was written by another version of megarpt: continue it with that version"
            )
        return cls(**{**content, "progress": Progress(**content["progress"])})
