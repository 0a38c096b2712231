"""`megarpt submit`: a training job for Slurm, checked as far as possible before it waits in a queue.

The job is `slurm/train.sbatch` of the repository with its header filled in; nothing of it is kept here a second time.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import megarpt
from megarpt.config.load import config_hash, dump_resolved
from megarpt.config.schema import SubmitOptions, TrainingConfig
from megarpt.corpus.atomic import atomic_write_bytes, write_errors
from megarpt.errors import EXIT_ENVIRONMENT, EXIT_OK, ConfigError, MegarptError

logger = logging.getLogger(__name__)

_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


class SlurmError(MegarptError):
    """Slurm, or the scripts for it, cannot be used from here."""

    exit_code = EXIT_ENVIRONMENT


def run(cfg: TrainingConfig, options: SubmitOptions) -> int:
    """Render, check, submit, and say where to look.

    Raises:
        ConfigError: the request cannot be carried out: the time, an option, or what Slurm itself refuses.
        SlurmError: no scripts or no sbatch here, or the submission failed.
    """
    _check_devices(cfg, options)
    home = Path(megarpt.__file__).absolute().parents[1]
    folder = Path(cfg.run.dir).absolute() / "slurm"
    config = folder / f"config-{config_hash(cfg)[:12]}.yaml"  # a job that is requeued later reads what it was submitted with
    script = render(_template(home), options, config=config, home=home, output=folder / "%j.log")
    if options.dry_run:
        sys.stdout.write(script)
        return EXIT_OK
    estimate = _try(script)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(config, dump_resolved(cfg).encode())
    path = folder / "train.sbatch"
    atomic_write_bytes(path, script.encode())
    job = _submit(path)
    sys.stdout.write(
        f"job {job}: {options.nodes} nodes, {options.ranks()} ranks each, {options.time}\n"
        f"  Slurm says   {estimate}\n"
        f"  queue        squeue --jobs {job}\n"
        f"  log          {folder}/{job}.log\n"
        f"  run folder   {folder.parent}\n"
        f"  attempts     {folder}/{job}/attempts.jsonl\n"
        f"  curves       tensorboard --logdir {folder.parent}/tensorboard\n"
        f"  submitted    {path} with {config.name}\n"
    )
    return EXIT_OK


def render(template: str, options: SubmitOptions, *, config: Path, home: Path, output: Path) -> str:
    """The batch script with the options in its header and everything it was given as arguments written into it.

    Raises:
        ConfigError: an option is not what sbatch takes, or the time is over before the run would be told to save.
    """
    given: dict[str, str | None] = {
        "job-name": output.parents[1].name,
        "nodes": str(options.nodes),
        "gpus-per-node": str(options.gpus_per_node) if options.gpus_per_node else None,
        "time": options.time,
        "output": str(output),
        "chdir": str(Path.cwd()),
        "partition": options.partition,
        "account": options.account,
    }
    extra = dict(map(_sbatch_option, options.sbatch))
    lines = template.splitlines()
    first = next(index for index, line in enumerate(lines) if _DIRECTIVE.fullmatch(line))
    standing = {match[1]: match[2] or "" for match in map(_DIRECTIVE.fullmatch, lines) if match}
    header = {name: value for name, value in (standing | given | extra).items() if value is not None}
    _check_time(header["time"], header.get("signal", ""))
    ours = [
        *(f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in header.items()),
        f"export MEGARPT_HOME={shlex.quote(str(home))}",
        f"export MEGARPT_RANKS_PER_NODE={options.ranks()}",
        f'[ -n "${{MEGARPT_CONTAINER:-}}" ] || export MEGARPT_PYTHON={shlex.quote(sys.executable)}',
        f"set -- {shlex.quote(str(config))}",
    ]
    rest = [line for line in lines if not _DIRECTIVE.fullmatch(line)]
    return "\n".join([*rest[:first], *ours, *rest[first:]]) + "\n"


def seconds_of(text: str) -> int:
    """A time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is not one.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(each.isdecimal() for each in (*parts, *([days] if dash else []))) or len(parts) > 3:
        raise ConfigError(
            f"--time: got {text!r}, expected minutes, hours:minutes:seconds or days-hours:minutes:seconds, for example 24:00:00"
        )
    numbers = [int(each) for each in parts]
    if dash:
        numbers = [*numbers, 0, 0]  # what follows the days begins with hours
    elif len(parts) < 3:
        numbers = [0, *numbers, 0]  # without hours it begins with minutes
    hours, minutes, seconds = numbers[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _template(home: Path) -> str:
    path = home / "slurm" / "train.sbatch"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SlurmError(
            f"{path}: {error.strerror}; the batch scripts are in the repository, so megarpt must be installed from there "
            "(pip install -e .)"
        ) from error


def _sbatch_option(text: str) -> tuple[str, str]:
    """One line more for the header."""
    match = _DIRECTIVE.fullmatch(f"#SBATCH {text}")
    if match is None:
        raise ConfigError(f"--sbatch: got {text!r}, expected one option with two dashes, for example --sbatch=--qos=high")
    return match[1], match[2] or ""


def _check_devices(cfg: TrainingConfig, options: SubmitOptions) -> None:
    device, gpus, ranks = cfg.run.device, options.gpus_per_node, options.ranks()
    if device == "cpu" and gpus:
        raise ConfigError(
            f"--gpus-per-node: got {gpus}, but run.device is cpu and would leave them idle; use --gpus-per-node 0"
        )
    if device == "cuda" and not gpus:
        raise ConfigError("--gpus-per-node: got 0, but run.device is cuda; ask for GPUs or set run.device=cpu")
    if gpus and ranks > gpus:
        raise ConfigError(f"--ranks-per-node: got {ranks}, expected at most one for each of --gpus-per-node {gpus}")


def _check_time(time: str, signal: str) -> None:
    """The run needs time before it is told to save."""
    limit, (_, _, lead) = seconds_of(time), signal.partition("@")
    if limit <= int(lead or 0):
        raise ConfigError(
            f"--time: got {time} ({limit} s), expected more than {lead} s: that long before its end the job is told to save "
            f"(change it with --sbatch=--signal=B:USR1@SECONDS)"
        )


def _try(script: str) -> str:
    """Ask Slurm whether such a job could ever run; what it says of its start."""
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch: not found; submit from a login node of the cluster, or look at the script with --dry-run")
    answer = _sbatch("--test-only", text=script)
    if answer.returncode:
        raise ConfigError(f"Slurm refuses this job:\n  {answer.stderr.strip()}\nchange the options; nothing was submitted")
    return re.sub(r"^sbatch: Job \d+ ", "", answer.stderr.strip())  # the number is not the one it will get


def _submit(path: Path) -> str:
    answer = _sbatch("--parsable", str(path))
    if answer.returncode:
        raise SlurmError(f"sbatch {path} failed:\n  {answer.stderr.strip()}")
    return answer.stdout.strip().partition(";")[0]


def _sbatch(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sbatch", *arguments], input=text, capture_output=True, text=True, check=False)
