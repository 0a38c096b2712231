"""Every error a user can meet. Each message says what, got, expected, where, and what to do.

`exit_code` is what the process returns when the error ends it; the numbers follow sysexits.h where it has one, so that a
batch script can tell "wait and retry" from "never requeue".
"""

EXIT_OK = 0
EXIT_RESUMABLE = 75  # stopped on a signal after a checkpoint: run the same command again
EXIT_UNSTABLE = 76  # too many skipped steps in a row, or too many rollbacks; checkpoints are intact
EXIT_CONFIG = 78  # a mistake in the configuration: running again cannot help
EXIT_DATA = 79  # corpus, sidecar or checkpoint damaged or mismatched
EXIT_ENVIRONMENT = 80  # the machine lacks something the job needs
EXIT_HANG = 81  # no progress for longer than faults.hang_timeout_minutes; checkpoints are intact
EXIT_NOT_REPRODUCED = 82  # verify-resume: the resumed run is not the uninterrupted one


class MegarptError(Exception):
    """Base of all expected errors; the command line prints the message without a traceback."""

    exit_code: int = 1


class ConfigError(MegarptError):
    """The configuration, an override or a command-line argument is wrong."""

    exit_code = EXIT_CONFIG


class DataError(MegarptError):
    """A corpus, a sidecar, a tokenizer or an input file is damaged, missing or does not belong."""

    exit_code = EXIT_DATA


class CheckpointError(MegarptError):
    """A checkpoint is damaged, missing or does not fit the model."""

    exit_code = EXIT_DATA


class ShapeError(MegarptError):
    """A tensor handed to an operation has the wrong shape, dtype or layout."""


class NumericsError(MegarptError):
    """Loss or gradients stayed non-finite, or kept spiking, for longer than the configuration allows."""

    exit_code = EXIT_UNSTABLE


class RolloutError(MegarptError):
    """Completions cannot be drawn: a prompt has no room for one, or the server that draws them failed."""

    exit_code = EXIT_ENVIRONMENT


class StopRequested(MegarptError):
    """The run was told to stop, has saved a checkpoint, and can go on."""

    exit_code = EXIT_RESUMABLE


class PeerFailedError(MegarptError):
    """Another rank failed and this one ended because of it; the exit code is that of the other's error."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ExtensionError(MegarptError):
    """A library or compiled extension that was asked for by name cannot be used."""

    exit_code = EXIT_ENVIRONMENT
