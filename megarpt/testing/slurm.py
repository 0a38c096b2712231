"""A throw-away Slurm of pretended nodes on this machine, for trying the scripts of `slurm/`.

    python -m megarpt.testing.slurm up DIR [NODES]    prints what to put into the environment
    python -m megarpt.testing.slurm down DIR          ends exactly the daemons that `up` started

Needs root and Debian's slurm-wlm; no systemd, no munge, no cgroups. Every node pretends to have 96 cores and 8 GPUs, and
jobs that together ask for less run side by side.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
GPUS, CORES, MEMORY_MB = 8, 96, 1_000_000
PATIENCE_S = 60.0

CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=cred_expire=5
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2
GresTypes=gpu
JobRequeue=1
# Jobs that ended can be asked about as long as the cluster lives.
MinJobAge=86400
KillWait=10
SlurmctldTimeout=20
# A node that does not answer for this long is dead, and its jobs are requeued.
SlurmdTimeout=10
ReturnToService=2
NodeName=fake[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \
Sockets=2 CoresPerSocket={half_cores} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=YES State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty when one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install -y --no-install-recommends slurm-wlm"
    return "" if os.geteuid() == 0 else "slurmd must run as root"


class Cluster:
    """Started daemons and the folder they live in."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"fake{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def up(self) -> Cluster:
        """Write the configuration and start everything; returns when all nodes are idle."""
        for name in ("state", "spool", "log", "run", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        for number in range(GPUS):
            (self.folder / f"dev/nvidia{number}").touch()
        ports = _free_ports(1 + len(self.nodes))
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname().partition(".")[0],
                folder=self.folder,
                nodes=len(self.nodes),
                port=ports[0],
                first_port=ports[1],
                last_port=ports[-1],
                half_cores=CORES // 2,
                memory=MEMORY_MB,
                gpus=GPUS,
            )
        )
        devices = f"NodeName=fake[1-{len(self.nodes)}] Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(devices)
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == len(self.nodes), "idle nodes")
        return self

    def down(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self._env(), capture_output=True, timeout=60)
        for path in sorted((self.folder / "run").glob("*.pid")):
            pid = int(path.read_text())
            if _command(pid).startswith("slurm"):
                os.kill(pid, signal.SIGTERM)
                self.wait(partial(_is_gone, pid), f"the end of {path.stem}")
        for pid in self._processes():
            _kill(pid)

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power failure does to a node: its daemon and everything it runs are gone at once."""
        _kill(int((self.folder / f"run/{node}.pid").read_text()))
        for pid in self._processes(node):
            _kill(pid)

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """The standard output of a command that sees this cluster."""
        result = subprocess.run(command, cwd=cwd, env=self._env() | (env or {}), capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(each.split("=", 1) for each in self.run("scontrol", "-o", "show", "job", job).split() if "=" in each)

    def wait(self, is_reached: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        """Look until it is so."""
        deadline = time.monotonic() + patience_s
        while not is_reached():
            assert time.monotonic() < deadline, (
                f"waited {patience_s:g} s for {what}; the daemons' logs are in {self.folder}/log"
            )
            time.sleep(0.2)

    def _env(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MEGARPT_"))}
        return clean | self.environment

    def _processes(self, node: str | None = None) -> list[int]:
        """Processes that jobs of this cluster run, on one node or on all, and the daemons that watch over them."""
        tasks = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            names = [
                each.removeprefix(b"SLURMD_NODENAME=").decode() for each in environment if each.startswith(b"SLURMD_NODENAME=")
            ]
            ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in environment
            if ours and names and node in (None, names[0]):
                tasks.append(int(path.name))
        watchers = {parent for parent in map(_parent, tasks) if _command(parent).startswith("slurmstepd")}
        return [*watchers, *tasks]


def _free_ports(count: int) -> range:
    """Consecutive ports that nobody listens on."""
    for first in range(17_000 + os.getpid() % 1000 * 10, 32_000, count):
        held = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        finally:
            for each in held:
                each.close()
        return range(first, first + count)
    raise AssertionError(f"no {count} free ports in a row below 32000")


def _command(pid: int) -> str:
    """The name of a running process; empty for one that has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
    return "" if state == "Z" else Path(command.split(" ")[0]).name


def _is_gone(pid: int) -> bool:
    return not _command(pid)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    """The command line."""
    verb, folder, *more = sys.argv[1:]
    if verb == "down":
        Cluster(Path(folder).absolute(), 0).down()
        return
    reason = missing()
    if reason:
        raise SystemExit(reason)
    cluster = Cluster(Path(folder).absolute(), int(more[0]) if more else 2).up()
    nodes = cluster.run("sinfo", "-N", "-o", "%N %T, %c cores, %m MB, %G")
    sys.stdout.write(f"{nodes}\nexport SLURM_CONF={cluster.environment['SLURM_CONF']}\n")


if __name__ == "__main__":
    main()
