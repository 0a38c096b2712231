"""What preflight.sh asks: is every node fit for the run, and which one is not?

    preflight.py node REPORTS --gpus 8       on every node: GPUs, the run folder, versions
    preflight.py network REPORTS --gpus 8    one process a GPU under torchrun: all-reduce bandwidth, clocks
    preflight.py judge REPORTS --stage node --nodes a,b,c    on the batch host: prints the names of failing nodes

Every node writes REPORTS/<stage>-<node>.json on the shared file system; the judge compares them, so a node that cannot even
report is found as well. Only `network` loads torch; the judge runs with the system's Python (3.7 or newer).
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import Any, Dict, Iterator, List, Tuple

PROBE_BYTES = 32 << 20
GPU_FIELDS = (
    "index,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total,remapped_rows.pending,remapped_rows.failure"
)
FREE_GPU_MB = 2048  # more than this in use before the job starts belongs to somebody else
CLOCK_LIMIT_S = 2.0
SLOW_SHARE = 0.5  # a node slower than this share of the median node is slow
FIGURES = ("disk_mb_per_s", "all_gbps", "pair_gbps", "clock_s")
Report = Dict[str, Any]
Verdict = Tuple[Dict[str, List[str]], List[str]]  # reasons by node, and reasons without one

ALLREDUCE_BYTES = {"nccl": 256 << 20, "gloo": 4 << 20}
ALLREDUCE_ROUNDS = {"nccl": 20, "gloo": 3}


def node_name() -> str:
    """The name that Slurm knows this node by."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


# --- on every node ---


def probe_node(folder: str, gpus: int) -> None:
    """Look at this node alone and write the report."""
    report: Report = {"problems": [], "versions": versions()}
    if gpus > 0:
        check_gpus(report, gpus)
    try:
        report["disk_mb_per_s"] = check_folder(folder)
    except OSError as error:
        report["problems"].append(f"the run folder: {error}")
    write_report(folder, "node", report)


def check_gpus(report: Report, expected: int) -> None:
    """Count and health as the driver tells them."""
    command = ["nvidia-smi", "--query-gpu=" + GPU_FIELDS, "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        report["problems"].append(f"nvidia-smi: {error}")
        return
    text = output.stdout.decode(errors="replace").strip()
    if output.returncode != 0:
        report["problems"].append(f"nvidia-smi ends with {output.returncode}: {text[-300:]}")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    if len(rows) < expected:
        report["problems"].append(f"{len(rows)} GPUs, expected {expected}")
    for index, name, driver, used, errors, pending, failed in rows:
        report["versions"].update({"GPU": name, "driver": driver})
        if number(used) > FREE_GPU_MB:
            report["problems"].append(f"GPU {index} holds {used} MB before the job has started")
        if number(errors) > 0:
            report["problems"].append(f"GPU {index}: {errors} uncorrected memory errors")
        if pending.lower() in ("yes", "1") or failed.lower() in ("yes", "1"):
            report["problems"].append(f"GPU {index}: memory rows wait to be remapped or cannot be")


def number(text: str) -> int:
    """A count of nvidia-smi; [N/A], on GPUs that do not count, is none."""
    return int(text) if text.isdigit() else 0


def check_folder(folder: str) -> float:
    """Write, sync, rename, read back; MB/s of the writing. Raises OSError."""
    path = os.path.join(folder, f"probe-{node_name()}")
    content = os.urandom(1 << 20)
    started = time.monotonic()
    try:
        with open(path + ".tmp", "wb") as file:
            for _ in range(PROBE_BYTES >> 20):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - started
        os.rename(path + ".tmp", path)
        with open(path, "rb") as file:
            while True:
                block = file.read(1 << 20)
                if not block:
                    break
                if block != content:
                    raise OSError(f"{path} does not read back as it was written")
    finally:
        for left in glob.glob(path + "*"):
            os.unlink(left)
    return round(PROBE_BYTES / seconds / 1e6, 1)


def versions() -> dict[str, str]:
    """What must be equal on all nodes. Nothing is imported: the files say it."""
    from importlib import metadata  # not there in the Python 3.7 that may judge

    found = {"python": platform.python_version(), "megarpt": source_hash("megarpt")}
    for name in ("torch", "megatron-core", "numpy", "transformer-engine", "nvidia-nccl-cu12", "nvidia-nccl-cu13"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_hash(package: str) -> str:
    """sha256 over a package's Python files, so that a stale copy on a node shows."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return "not installed"
    root, digest = os.path.dirname(spec.origin), hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(root, "**", "*.py"), recursive=True)):
        digest.update(os.path.relpath(path, root).encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:12]


# --- between the nodes ---


def probe_network(folder: str, gpus: int, timeout_s: float) -> None:
    """Measure all-reduce over all ranks and over pairs of neighbouring nodes, and compare clocks.

    Every node notes how far it came, so that the one that others wait for can be named.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    report: Report = {"phase": 0, "problems": [], "nodes": world // per_node}

    def reached(phase: int) -> None:
        report["phase"] = phase
        if local == 0:
            write_report(folder, "network", report)

    reached(1)
    try:
        if gpus > 0:
            torch.cuda.set_device(local)
            matrix = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
            total = float((matrix @ matrix)[0].float().sum())
            if total != 4096.0 * 4096.0:
                raise RuntimeError(f"a matrix product gives {total}, expected {4096.0 * 4096.0}")
        backend, device = ("nccl", "cuda") if gpus > 0 else ("gloo", "cpu")
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        reached(2)
        buffer = torch.ones(ALLREDUCE_BYTES[backend] // 4, device=device)
        report["all_gbps"] = bandwidth(buffer, None, world, ALLREDUCE_ROUNDS[backend])
        reached(3)
        report["pair_gbps"] = pair_bandwidth(buffer, rank // per_node, world // per_node, per_node, ALLREDUCE_ROUNDS[backend])
        clocks = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(world)]
        dist.barrier()
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64, device=device))
        every_node = [float(clock) for clock in clocks[::per_node]]
        report["clock_s"] = every_node[rank // per_node] - statistics.median_low(every_node)
        reached(4)
        dist.destroy_process_group()
    except RuntimeError as error:  # CUDA, NCCL and gloo raise nothing narrower
        report["problems"].append(f"GPU {local}: {str(error).strip().splitlines()[0]}")
        write_report(folder, "network", report)
        raise


def bandwidth(buffer: Any, group: Any, ranks: int, rounds: int) -> float:
    """Bus bandwidth of an all-reduce in GB/s: what each rank's link carries, whatever the number of ranks."""
    import torch.distributed as dist

    dist.all_reduce(buffer, group=group)
    wait(buffer)
    started = time.perf_counter()
    for _ in range(rounds):
        buffer.fill_(1.0)
        dist.all_reduce(buffer, group=group)
    wait(buffer)
    seconds = (time.perf_counter() - started) / rounds
    return round(buffer.numel() * 4 * 2 * (ranks - 1) / ranks / seconds / 1e9, 3)


def wait(buffer: Any) -> None:
    """Until the device has done what was queued."""
    float(buffer[0])


def pair_bandwidth(buffer: Any, node: int, nodes: int, per_node: int, rounds: int) -> float | None:
    """The best bandwidth between this node and a neighbour: a slow node is slow with both of them, its neighbours only once."""
    import torch.distributed as dist

    if nodes < 3:
        return None
    best = 0.0
    for shift in (0, 1):
        mine = None
        for first in range(shift, nodes - 1 + shift, 2):
            pair = (first, (first + 1) % nodes)
            group = dist.new_group([each * per_node + local for each in pair for local in range(per_node)])
            if node in pair:
                mine = group
        if mine is not None:
            best = max(best, bandwidth(buffer, mine, 2 * per_node, rounds))
        dist.barrier()
    return best


# --- on the batch host ---


def judge(folder: str, stage: str, nodes: list[str], min_gbps: float = 0.0) -> Verdict:
    """{node: reasons} of the nodes that failed, and reasons that no node can be named for."""
    failed: dict[str, list[str]] = {}
    unnamed: list[str] = []
    reports = {node: read_report(folder, stage, node) for node in nodes}
    for node in [node for node in nodes if reports[node] is None]:
        failed[node] = [f"left no report: it did not start, hangs, or does not see {folder}"]
    there = {node: report for node, report in reports.items() if report is not None}
    for node, report in there.items():
        if report["problems"]:
            failed.setdefault(node, []).extend(report["problems"])
    if stage == "node":
        for node, reason in different_versions(there):
            failed.setdefault(node, []).append(reason)
    elif not failed:
        failed, unnamed = judge_network(there, min_gbps)
    return failed, unnamed


def different_versions(reports: dict[str, Report]) -> Iterator[tuple[str, str]]:
    """Nodes whose versions are not those of most nodes; between equally many, the first node is right."""
    for name in sorted({name for report in reports.values() for name in report["versions"]}):
        values = [(node, report["versions"].get(name, "absent")) for node, report in reports.items()]
        most, _ = Counter(value for _, value in values).most_common(1)[0]
        for node, value in values:
            if value != most:
                yield node, f"{name}: got {value}, the other nodes have {most}"


def judge_network(reports: dict[str, Report], min_gbps: float) -> Verdict:
    """Nodes that others waited for, that are slow with every neighbour, or whose clock is wrong."""
    failed: dict[str, list[str]] = {}
    unnamed: list[str] = []
    furthest = max(report["phase"] for report in reports.values())
    for node, report in reports.items():
        if report["phase"] < furthest:
            failed[node] = ["the network: stopped in phase {} of 4, others came to {}".format(report["phase"], furthest)]
    if failed:
        return failed, unnamed
    if furthest < 4:
        return failed, [f"the network: all nodes stopped in phase {furthest} of 4; see the messages above"]
    pairs = {node: report["pair_gbps"] for node, report in reports.items() if report["pair_gbps"] is not None}
    usual = statistics.median(pairs.values()) if pairs else 0.0
    for node, got in pairs.items():
        if len(pairs) > 3 and got < SLOW_SHARE * usual:
            failed[node] = [f"the network: {got} GB/s with its neighbours, other nodes {usual}"]
    slowest = min(report["all_gbps"] for report in reports.values())
    if slowest < min_gbps and not failed:
        unnamed.append(f"the network: {slowest} GB/s over all nodes, expected {min_gbps}")
    for node, report in reports.items():
        if abs(report["clock_s"]) > CLOCK_LIMIT_S:
            failed.setdefault(node, []).append("the clock is {:+.1f} s off".format(report["clock_s"]))
    return failed, unnamed


def write_report(folder: str, stage: str, report: Report) -> None:
    """Whole or not at all, and never an error: a node that cannot write is one that does not report."""
    path = os.path.join(folder, f"{stage}-{node_name()}.json")
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w") as file:
            json.dump(report, file)
        os.replace(temporary, path)
    except OSError as error:
        sys.stderr.write(f"{path}: {error}\n")


def read_report(folder: str, stage: str, node: str) -> Report | None:
    """The report of a node; None when there is none."""
    try:
        with open(os.path.join(folder, f"{stage}-{node}.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def show(folder: str, stage: str, nodes: list[str], failed: dict[str, list[str]], unnamed: list[str]) -> None:
    """The verdict and the figures, for people."""
    for node in nodes:
        report = read_report(folder, stage, node) or {}
        figures = [f"{name} {report[name]:.3g}" for name in FIGURES if report.get(name) is not None]
        sys.stderr.write("preflight, {}, {}: {}\n".format(stage, node, ", ".join(figures) or "no figures"))
    for node, reasons in failed.items():
        for reason in reasons:
            sys.stderr.write(f"preflight FAILED on {node}: {reason}\n")
    for reason in unnamed:
        sys.stderr.write(f"preflight FAILED: {reason}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["node", "network", "judge"])
    parser.add_argument("folder", metavar="REPORTS")
    parser.add_argument("--gpus", type=int, default=0, help="on each node")
    parser.add_argument("--timeout", type=float, default=600.0, help="network: seconds until a collective has failed")
    parser.add_argument("--stage", choices=["node", "network"], help="judge: which reports")
    parser.add_argument("--nodes", default="", help="judge: all nodes of the job, comma-separated")
    parser.add_argument("--min-gbps", type=float, default=0.0, help="judge: the slowest acceptable all-reduce")
    args = parser.parse_args()
    if args.verb == "node":
        probe_node(args.folder, args.gpus)
    elif args.verb == "network":
        probe_network(args.folder, args.gpus, args.timeout)
    else:
        nodes = args.nodes.split(",")
        failed, unnamed = judge(args.folder, args.stage, nodes, args.min_gbps)
        show(args.folder, args.stage, nodes, failed, unnamed)
        for node in failed:
            sys.stdout.write(node + "\n")
        sys.exit(1 if failed or unnamed else 0)


if __name__ == "__main__":
    main()
