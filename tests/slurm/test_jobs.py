"""The scripts of `slurm/` on a real Slurm: a throw-away cluster of pretended nodes on this machine.

Jobs run side by side and are disturbed as soon as they are far enough; each test then looks at how its own came out. The jobs
of fake1 to fake3 do not notice the node that dies among fake4 to fake6.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.load import dump_resolved
from megarpt.corpus.indexed import bin_path, idx_path
from megarpt.device.runtime import Runtime
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.policy import policy_config, write_policy, write_questions
from megarpt.testing.slurm import Cluster, missing
from megarpt.testing.tiny import text_documents, write_text_corpus
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"no throw-away Slurm here: {missing()}"),
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0
STEPS, STEP_TOKENS = 600, 4 * 64
# CPUs only, and several jobs on one node.
ON_CPUS = ["--gpus-per-node=0", "--cpus-per-task=2", "--mem=1G", "--oversubscribe", "--time=60"]
CALM, DOOMED = "--exclude=fake[4-6]", "--exclude=fake[1-3]"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class World:
    """The cluster, a folder to submit from, and what was submitted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = {
            "MEGARPT_HOME": str(ROOT),
            "MEGARPT_PYTHON": sys.executable,
            "MEGARPT_PREFLIGHT": "off",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }

    def sbatch(self, *arguments: str, **environment: str) -> str:
        """Submit; the number of the job."""
        return self.cluster.run("sbatch", "--parsable", *arguments, cwd=self.folder, env=self.environment | environment)

    def train(
        self,
        name: str,
        *options: str,
        config: str = "config.yaml",
        overrides: tuple[str, ...] = (),
        nodes: int = 2,
        **environment: str,
    ) -> str:
        """Submit the shipped script, for a run in runs/<name>."""
        header = [*ON_CPUS, f"--nodes={nodes}", f"--job-name={name}", *(options or (CALM,))]
        script = str(ROOT / "slurm/train.sbatch")
        return self.sbatch(*header, script, config, f"run.dir=runs/{name}", *overrides, **environment)

    def wait(self, job: str, what: str, is_reached: Any) -> None:
        """Wait for something in a job, which must not end before."""

        def look() -> bool:
            if is_reached():
                return True
            assert self.cluster.job(job)["JobState"] not in ENDED, self.log(job)
            return False

        self.cluster.wait(look, what, PATIENCE_S)

    def end(self, job: str) -> dict[str, str]:
        """Wait for the end of a job; what Slurm says of it."""
        self.cluster.wait(lambda: self.cluster.job(job)["JobState"] in ENDED, f"the end of job {job}", PATIENCE_S)
        return self.cluster.job(job)

    def log(self, job: str) -> str:
        """What the job wrote, all attempts."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}.log"))

    def attempts(self, name: str, job: str) -> list[dict[str, Any]]:
        """What the job noted about its attempts."""
        path = self.folder / f"runs/{name}/slurm/{job}/attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def record(self, name: str) -> dict[str, Any]:
        """exit.json."""
        return json.loads((self.folder / f"runs/{name}/exit.json").read_text())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Everything a run measured that does not depend on the machine."""
        return [comparable(line) for line in read_metrics(self.folder / f"runs/{name}/metrics.jsonl")]

    def program(self, name: str, body: str) -> str:
        """A stand-in for the Python of the tasks, which does something and then is that Python."""
        path = self.folder / name
        path.write_text(f'#!/usr/bin/env bash\n{body}\nexec {sys.executable} "$@"\n')
        path.chmod(0o755)
        return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("slurm")
    write_text_corpus(folder / "train", text_documents(200, seed=1))
    config = tiny_config(
        **{
            "run": {"dir": "runs/x", "device": "cpu"},
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": "train"}],
            "batch": {"micro_batch_size": 2, "global_batch_size": 4},
            "train.train_tokens": STEPS * STEP_TOKENS,
            "checkpoint": {"interval_steps": 50},
            "logging": {"tensorboard": False},
        }
    )
    (folder / "config.yaml").write_text(dump_resolved(config))
    cluster = Cluster(folder / "cluster", nodes=6)
    try:
        yield World(cluster.up(), folder)
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def jobs(world: World) -> dict[str, str]:
    """All trainings: the long ones first, and what happens to two of them on their way."""
    jobs = {
        "orphaned": world.train("orphaned", DOOMED),
        "signalled": world.train("signalled", CALM, "--time=2", "--signal=B:USR1@100"),
        "straight": world.train("straight", CALM),
    }
    latest = world.folder / "runs/orphaned/checkpoints/latest"
    world.wait(jobs["orphaned"], "a checkpoint", latest.exists)
    world.cluster.kill_node(world.cluster.job(jobs["orphaned"])["BatchHost"])
    world.wait(jobs["signalled"], "a requeue", lambda: world.cluster.job(jobs["signalled"])["Restarts"] != "0")
    world.cluster.run("scontrol", "update", f"JobId={jobs['signalled']}", "TimeLimit=60")
    killer = world.program("dies", 'case "$*" in *torch.distributed.run*) kill -9 $$ ;; esac')
    stale = world.folder / "stale/megarpt"
    stale.mkdir(parents=True)
    (stale / "__init__.py").write_text('__version__ = "0.0"\n')
    aged = world.program(
        "aged",
        'if [ "$SLURM_NODEID" = 1 ] && [ -z "${SLURM_RESTART_COUNT:-}" ] && [[ "$*" == *"preflight.py node"* ]]; then\n'
        f"  export PYTHONPATH={stale.parent}\nfi",
    )
    few = f"train.train_tokens={3 * STEP_TOKENS}"
    return jobs | {
        "mistyped": world.train("mistyped", overrides=("train.train_tokens=none",)),
        "mistaken": world.train("mistaken", overrides=("model.mcore.hidden_sise=64",), nodes=1),
        "crashing": world.train("crashing", nodes=1, MEGARPT_PYTHON=killer, MEGARPT_MAX_FAILURES="2"),
        "unfit": world.train("unfit", overrides=(few,), MEGARPT_PYTHON=aged, MEGARPT_PREFLIGHT="full"),
    }


def test_signals_save_requeue_and_resume(world: World, jobs: dict[str, str]) -> None:
    """USR1 from Slurm's own clock before the time limit, then TERM, as preemption sends it, in the middle of the training."""
    job = jobs["signalled"]
    world.wait(job, "steps of the second attempt", lambda: resumed_steps(world, "signalled") > 5)
    world.cluster.run("scancel", "--signal=TERM", job)
    end = world.end(job)
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), world.log(job)
    record = world.record("signalled")
    *timed, last = record["attempts"]  # on a busy machine Slurm's clock may strike again before its limit is raised
    assert timed and all(each["status"] == "resumable" and "SIGUSR1" in each["message"] for each in timed)
    assert (last["status"], record["status"]) == ("resumable", "finished") and "SIGTERM" in last["message"]
    assert timed[-1]["step"] < last["step"] < STEPS
    world.end(jobs["straight"])
    assert world.lines("signalled") == world.lines("straight")


def resumed_steps(world: World, name: str) -> int:
    """Steps that the newest attempt, if it is not the first, has added."""
    record, path = world.record(name), world.folder / f"runs/{name}/metrics.jsonl"
    if record["restarts"] < 1 or record["status"] != "running" or not path.exists():
        return 0
    lines = path.read_bytes().splitlines()
    return json.loads(lines[-1])["step"] - record["attempts"][-1]["step"] if lines else 0


def test_a_corpus_made_by_an_array_has_the_bytes_of_one_process(world: World) -> None:
    texts, script = text_documents(210, seed=3), str(ROOT / "slurm/preprocess.sbatch")
    for number in range(7):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number * 30 : number * 30 + 30]]
        (world.folder / f"{number}.jsonl").write_text("".join(lines))
    arguments = ["--input", "[0-9].jsonl", "--tokenizer", "bytes", "--append-eod"]
    small = ["--cpus-per-task=1", "--mem=1G", "--time=10"]
    array = world.sbatch(*small, "--array=0-2", script, "array/web", *arguments)
    merge = world.sbatch(*small, f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", script, "array/web")
    tool = [sys.executable, str(ROOT / "tools/preprocess_corpus.py"), "--output-prefix", "one/web", *arguments]
    subprocess.run(tool, cwd=world.folder, check=True, capture_output=True, timeout=120)
    assert world.end(merge)["JobState"] == "COMPLETED", world.log(merge) + world.log(array)
    for path in (bin_path, idx_path):
        assert path(world.folder / "array/web").read_bytes() == path(world.folder / "one/web").read_bytes()
    assert len(list((world.folder / "array").glob("web.part-*-of-00003.json"))) == 3


def test_parts_of_another_array_are_not_joined(world: World) -> None:
    empty = world.sbatch("--cpus-per-task=1", "--mem=1G", str(ROOT / "slurm/preprocess.sbatch"), "nothing/web")
    (world.folder / "mixed").mkdir()
    for name in ("00000-of-00002", "00001-of-00002", "00000-of-00003"):
        (world.folder / f"mixed/web.part-{name}.json").touch()
    job = world.sbatch("--cpus-per-task=1", "--mem=1G", str(ROOT / "slurm/preprocess.sbatch"), "mixed/web")
    assert world.end(job)["ExitCode"] == "79:0"
    assert "got 3 finished parts, expected" in world.log(job)
    assert world.end(empty)["ExitCode"] == "79:0" and "got 0 finished parts" in world.log(empty)


def test_a_share_that_was_stopped_before_its_time_limit_goes_on(world: World) -> None:
    """The tool is told with TERM, and its 75 brings the job back; a stand-in waits so that it can be told."""
    waits = world.program(
        "waits",
        'if [ "$SLURM_ARRAY_TASK_ID" = 0 ] && [ -z "${SLURM_RESTART_COUNT:-}" ]; then\n'
        "  trap 'exit 75' TERM; touch waiting; while true; do sleep 0.1; done\nfi",
    )
    (world.folder / "more").mkdir()
    for number in range(2):
        (world.folder / f"more/{number}.jsonl").write_text('{"text": "a"}\n')
    arguments = ["stopped/web", "--input", "more/*.jsonl", "--tokenizer", "bytes"]
    job = world.sbatch(
        "--cpus-per-task=1",
        "--mem=1G",
        "--array=0-1",
        str(ROOT / "slurm/preprocess.sbatch"),
        *arguments,
        MEGARPT_PYTHON=waits,
    )
    first = f"{job}_0"
    world.cluster.wait((world.folder / "waiting").exists, "the first share", PATIENCE_S)
    world.cluster.run("scancel", "--batch", "--signal=USR1", first)
    world.cluster.wait(lambda: world.cluster.job(first)["Restarts"] == "1", "its return to the queue", PATIENCE_S)
    assert world.end(first)["JobState"] == "COMPLETED"
    assert len(list((world.folder / "stopped").glob("web.part-*.json"))) == 2


def test_a_wrong_configuration_is_not_tried_again(world: World, jobs: dict[str, str]) -> None:
    early, late = world.end(jobs["mistyped"]), world.end(jobs["mistaken"])
    for job, message in ((early, "train.train_tokens: got 'none'"), (late, "hidden_sise")):
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "78:0", "0"), world.log(job["JobId"])
        assert message in world.log(job["JobId"])
    assert not (world.folder / "runs/mistyped").exists()


def test_crashes_without_a_new_checkpoint_end(world: World, jobs: dict[str, str]) -> None:
    job = world.end(jobs["crashing"])
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "137:0", "1"), world.log(job["JobId"])
    ends = [each for each in world.attempts("crashing", job["JobId"]) if each["event"] == "end"]
    assert [(each["code"], each["action"]) for each in ends] == [(137, "requeue"), (137, 137)]
    assert "2 of 2 attempts in a row without a new checkpoint" in world.log(job["JobId"])


def test_a_node_that_fails_the_preflight_is_named_and_avoided(world: World, jobs: dict[str, str]) -> None:
    job = world.end(jobs["unfit"])
    log = world.log(job["JobId"])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    first, failed, second, *_ = world.attempts("unfit", job["JobId"])
    bad = failed["excluded"]
    hosts = [world.cluster.run("scontrol", "show", "hostnames", each["nodes"]).split() for each in (first, second)]
    assert failed["code"] == 80 and bad == hosts[0][1] and bad not in hosts[1]
    assert f"preflight FAILED on {bad}: megarpt: got" in log
    assert set(world.cluster.run("scontrol", "show", "hostnames", job["ExcNodeList"]).split()) == {
        bad,
        "fake4",
        "fake5",
        "fake6",
    }
    assert "all_gbps" in log and world.record("unfit")["status"] == "finished"


def test_two_nodes_train_to_the_end(world: World, jobs: dict[str, str]) -> None:
    job = world.end(jobs["straight"])
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), world.log(job["JobId"])
    record = world.record("straight")
    assert (record["status"], record["step"]) == ("finished", STEPS)
    environment = json.loads((world.folder / "runs/straight/environment.json").read_text())
    assert environment["world_size"] == 2


def test_a_run_survives_the_death_of_the_node_that_leads_it(world: World, jobs: dict[str, str]) -> None:
    job = jobs["orphaned"]
    end = world.end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), world.log(job)
    events = world.attempts("orphaned", job)
    assert [each["event"] for each in events] == ["begin", "begin", "end"]  # Slurm itself requeued: no one else could
    first, second = (world.cluster.run("scontrol", "show", "hostnames", each["nodes"]).split() for each in events[:2])
    assert first[0] not in second
    record = world.record("orphaned")
    assert (record["status"], [each["status"] for each in record["attempts"]]) == ("finished", ["running"])
    world.end(jobs["straight"])
    assert world.lines("orphaned") == world.lines("straight")


def test_reinforcement_is_requeued_and_goes_on(world: World, jobs: dict[str, str], cpu_runtime: Runtime) -> None:
    """The same script, whatever the command: a signal between two steps of `megarpt rl`, on two nodes."""
    policy = write_policy(world.folder / "policy", cpu_runtime)
    questions = write_questions(world.folder / "questions.jsonl")
    cfg = policy_config(Path("runs/rl"), policy, questions, **{"run.device": "cpu", "train.train_steps": 40})
    (world.folder / "rl.yaml").write_text(dump_resolved(cfg))
    straight, signalled = (world.train(name, CALM, config="rl.yaml") for name in ("rl", "rl_signalled"))
    metrics = world.folder / "runs/rl_signalled/metrics.jsonl"
    world.wait(signalled, "some steps", lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4)
    world.cluster.run("scancel", "--batch", "--signal=USR1", signalled)
    for job, restarts in ((straight, "0"), (signalled, "1")):
        end = world.end(job)
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", restarts), world.log(job)
    assert world.record("rl_signalled")["step"] == world.record("rl")["step"] == 40
    assert world.lines("rl_signalled") == world.lines("rl")


def test_a_corpus_is_scored_on_two_nodes(world: World, jobs: dict[str, str]) -> None:
    world.end(jobs["straight"])
    arguments = ["--reference", "runs/straight", "--corpus", "train", "--device", "cpu", "--output-prefix"]
    job = world.sbatch(*ON_CPUS, CALM, "--nodes=2", str(ROOT / "slurm/score.sbatch"), *arguments, "two")
    alone = [sys.executable, "-m", "megarpt", "score", *arguments, "one"]
    subprocess.run(alone, cwd=world.folder, env=os.environ | world.environment, check=True, capture_output=True, timeout=300)
    assert world.end(job)["JobState"] == "COMPLETED", world.log(job)
    assert bin_path(world.folder / "two").read_bytes() == bin_path(world.folder / "one").read_bytes()
