"""Workers that hang, die, eat memory or talk, and what is left of them."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from megarpt.errors import ConfigError, ExtensionError, MegarptError
from megarpt.rl.judging import Died, Failed, Judges, NotJudged, TimedOut, TooLarge

LIMIT_S = 1.0
MIB = 1 << 20

FUNCTIONS = """
    import os, subprocess, sys, time
    import regex

    kept = []

    def double(item): return 2 * item

    def whoami(item): return os.getpid()

    def act(item):
        what, value = item
        if what == "hang":
            while True: time.sleep(60)
        if what == "spin":
            while True: pass
        if what == "gil":  # holds the interpreter's lock in C
            regex.fullmatch("(a|aa)+b", "a" * 5000)
        if what == "exit": os._exit(value)
        if what == "leave": sys.exit(value)
        if what == "kill": os.kill(os.getpid(), 11)
        if what == "raise": raise ValueError(value)
        if what == "base": raise KeyboardInterrupt
        if what == "grab": return len(bytearray(value))
        if what == "grow":
            pieces = []
            while True: pieces.append(bytearray(1 << 20))
        if what == "swallow":
            pieces = []
            try:
                while True: pieces.append(bytearray(1 << 20))
            except MemoryError: return "wrong"
        if what == "keep": kept.append(bytearray(value))
        if what == "deep":
            def down(n): return down(n + 1)
            down(0)
        if what == "print":
            for stream in (sys.stdout, sys.stderr):
                stream.write("x" * value); stream.flush()
            os.write(1, b"y" * value)
            print("said")
        if what == "child":
            return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
        if what == "child and hang":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            while True: time.sleep(60)
        if what == "local": return lambda: None
        if what == "large": return b"x" * value
        if what == "environment": return sorted(sys.modules)
        return value
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    (folder / "judged_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    (folder / "judged_badly.py").write_text("raise RuntimeError('no such thing here')\n")
    (folder / "judged_never.py").write_text("import os\nos._exit(3)\n")
    (folder / "judged_late.py").write_text("import time\ntime.sleep(600)\n")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("judged_functions")
    sys.path.remove(str(folder))
    del sys.modules["judged_functions"]


def children():
    return {each.pid for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE}


def wait_until_gone(process):
    """It is no child of this process, so that init reaps it, or nobody does."""
    until = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, process
            time.sleep(0.01)


@pytest.fixture
def act(functions):
    """Judges with small limits; nothing may run after them."""
    before = children()
    with Judges(functions.act, workers=2, limit_s=LIMIT_S, memory_bytes=256 * MIB, max_item_bytes=MIB) as judges:
        yield judges
    assert children() <= before


@pytest.fixture
def patient(functions):
    """For what does not hang, so that a busy machine changes nothing."""
    before = children()
    with Judges(functions.act, workers=2, limit_s=60.0, memory_bytes=256 * MIB, max_item_bytes=MIB) as judges:
        yield judges
    assert children() <= before


def test_results_keep_their_order(functions):
    with Judges(functions.double, workers=2) as judges:
        assert judges.judge(range(100)) == [2 * each for each in range(100)]
        assert judges.judge([]) == []
        assert judges.judge(iter(["a"])) == ["aa"]
        assert judges.counts == {"judged": 101}


def test_workers_start_late_and_stay(functions):
    before = children()
    with Judges(functions.whoami, workers=2) as judges:
        assert children() == before
        first = set(judges.judge([0]))
        assert children() - before == first
        judges.judge([0] * 50)
        pids = children() - before
        assert len(pids) == 2
        assert set(judges.judge([0] * 50)) <= pids and children() - before == pids
    assert children() == before


@pytest.mark.parametrize("how", ["hang", "spin", "gil", "child and hang"])
def test_what_hangs_is_killed_and_the_others_are_judged(act, how):
    began = time.monotonic()
    results = act.judge([("say", 1), (how, 0), ("say", 2), ("say", 3)])
    assert results[0] == 1 and results[2:] == [2, 3]
    assert isinstance(results[1], TimedOut) and "1 s" in results[1].why
    assert act.judge([("say", 4)] * 4) == [4] * 4
    assert act.counts == {"judged": 7, "TimedOut": 1}
    assert time.monotonic() - began < 60


def test_all_may_hang(act):
    assert all(isinstance(each, TimedOut) for each in act.judge([("spin", 0)] * 4))


@pytest.mark.parametrize(("how", "value", "why"), [("exit", 0, "code 0"), ("exit", 7, "code 7"), ("kill", 0, "SIGSEGV")])
def test_what_dies_is_replaced(patient, how, value, why):
    results = patient.judge([(how, value), ("say", 2), (how, value), ("say", 3)])
    assert isinstance(results[0], Died) and why in results[0].why
    assert isinstance(results[2], Died) and results[1::2] == [2, 3]


@pytest.mark.parametrize(
    ("how", "value", "why"),
    [
        ("raise", "what is this", "ValueError: what is this"),
        ("raise", "x" * 100_000, "ValueError: xxx"),
        ("leave", 3, "SystemExit: 3"),
        ("base", 0, "KeyboardInterrupt"),
        ("deep", 0, "RecursionError"),
        ("local", 0, "cannot be pickled"),
        ("large", 20 * MIB, "bytes"),
    ],
)
def test_an_error_is_not_a_time_out(patient, how, value, why):
    result, after = patient.judge([(how, value), ("say", 1)])
    assert type(result) is Failed and why in result.why and len(result.why) < 3000
    assert after == 1


def test_the_first_error_of_a_kind_is_logged(patient, caplog):
    patient.judge([("raise", "once"), ("raise", "twice")])
    patient.judge([("raise", "again")])
    assert len(caplog.records) == 1 and "said once" in caplog.text
    assert patient.counts == {"Failed": 3}


def test_memory_ends(patient):
    results = patient.judge([("grab", 4 << 30), ("grow", 0), ("swallow", 0), ("say", 1)])
    assert [type(each) for each in results[:3]] == [Failed] * 3
    assert "MemoryError" in results[0].why and "MemoryError" in results[1].why
    assert "limit of" in results[2].why  # though it returned
    assert results[3] == 1


def test_what_a_worker_keeps_is_not_held_against_later_items(patient):
    assert patient.judge([("keep", 20 * MIB)] * 40) == [20 * MIB] * 40


def test_what_it_prints_goes_nowhere(patient, capfd):
    assert patient.judge([("print", 10 * MIB), ("print", 1)]) == [10 * MIB, 1]
    out, err = capfd.readouterr()
    assert not out and "x" not in err


def test_large_items_are_not_sent(patient):
    results = patient.judge([("say", b"x" * (10 * MIB)), ("say", 1), ("say", b"x" * (MIB - 1000))])
    assert isinstance(results[0], TooLarge) and "1,048,576" in results[0].why
    assert results[1] == 1 and len(results[2]) == MIB - 1000


def test_only_large_items(patient):
    assert all(isinstance(each, TooLarge) for each in patient.judge([("say", b"x" * (2 * MIB))] * 3))


def test_what_a_worker_started_ends_with_it(functions):
    with Judges(functions.act) as judges:
        (pid,) = judges.judge([("child", 0)])
        child = psutil.Process(pid)
    wait_until_gone(child)


def test_workers_know_nothing_of_the_trainer(patient):
    (modules,) = patient.judge([("environment", 0)])
    assert not {"torch", "numpy", "pytest", "__mp_main__"} & set(modules)


def test_a_worker_that_died_between_calls_costs_nothing(functions):
    with Judges(functions.whoami, workers=1) as judges:
        (pid,) = judges.judge([0])
        os.kill(pid, signal.SIGKILL)
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        (other,) = judges.judge([0])
        assert other != pid
        assert judges.counts == {"judged": 2}


def test_a_stopped_worker_is_killed(functions):
    with Judges(functions.act, workers=1, limit_s=LIMIT_S) as judges:
        judges.judge([("say", 1)])
        (pid,) = {worker.process.pid for worker in judges._pool}
        os.kill(pid, signal.SIGSTOP)
        first, second = judges.judge([("say", b"x" * 900_000), ("say", 2)])  # more than the socket holds
        assert isinstance(first, TimedOut) and second == 2


def test_it_works_off_the_main_thread_and_on_several(functions):
    results = {}
    with Judges(functions.act, limit_s=LIMIT_S) as judges:

        def ask(number):
            results[number] = judges.judge([("say", number), ("hang", 0) if number == 0 else ("say", -number)])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert isinstance(results[0][1], TimedOut)
    assert [results[number] for number in (1, 2, 3)] == [[1, -1], [2, -2], [3, -3]]


def test_workers_outlive_the_thread_that_started_them(functions):
    with Judges(functions.whoami, workers=1) as judges:
        pids = []
        thread = threading.Thread(target=lambda: pids.extend(judges.judge([0])))
        thread.start()
        thread.join(60)
        assert judges.judge([0]) == pids


def test_nothing_is_left_when_the_caller_raises(functions):
    before = children()
    with pytest.raises(ZeroDivisionError), Judges(functions.act) as judges:
        judges.judge([("say", 1)] * 4)
        raise ZeroDivisionError
    assert children() == before


def test_an_interrupted_call_leaves_no_half_read_worker(functions):
    """An item that cannot be pickled stands for any error in the middle of a call."""
    with Judges(functions.act, workers=2, limit_s=60) as judges:
        judges.judge([("say", 1)] * 4)
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            judges.judge([("hang", 0), lambda: None])
        assert judges._pool == []
        assert judges.judge([("say", 1), ("say", 2)]) == [1, 2]


def test_closed_judges_judge_no_more(functions):
    judges = Judges(functions.act)
    judges.close()
    judges.close()
    with pytest.raises(MegarptError, match="closed"):
        judges.judge([("say", 1)])


def test_a_forked_process_leaves_the_workers_alone(functions, monkeypatch):
    with Judges(functions.whoami, workers=1) as judges:
        (pid,) = judges.judge([0])
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: 1)
            judges.close()
            with pytest.raises(MegarptError, match="belong to the process that made them"):
                judges.judge([0])
        assert judges.judge([0]) == [pid]


@pytest.mark.parametrize("how", ["idle", "hang", "gil"])
def test_workers_end_when_the_trainer_is_killed(functions, how):
    code = f"""
        import sys, threading, time
        sys.path[:] = {sys.path!r}
        import psutil
        from megarpt.rl.judging import Judges
        judges = Judges("judged_functions:act", workers=1, limit_s=600)
        judges.judge([("say", 1)])
        if {how!r} != "idle":
            threading.Thread(target=judges.judge, args=([({how!r}, 0)],), daemon=True).start()
            while not any(worker.item is not None and not worker.outgoing for worker in judges._pool): time.sleep(0.01)
        print(judges._pool[0].process.pid, flush=True)
        time.sleep(600)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        worker = psutil.Process(int(trainer.stdout.readline()))
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    wait_until_gone(worker)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"limit_s": 0.0}, "limit_s is 0"),
        ({"limit_s": float("nan")}, "limit_s is nan"),
        ({"limit_s": float("inf")}, "limit_s is inf"),
        ({"start_limit_s": -1.0}, "start_limit_s"),
        ({"memory_bytes": 1000}, "memory_bytes is 1,000"),
        ({"max_item_bytes": 0}, "max_item_bytes"),
    ],
)
def test_bad_numbers_are_refused(functions, options, message):
    with pytest.raises(ConfigError, match=message):
        Judges(functions.act, **options)


@pytest.mark.parametrize("function", [lambda item: item, "nothing", ":act", "__main__:act", "module:<lambda>"])
def test_functions_that_cannot_be_imported_are_refused(function):
    with pytest.raises(ConfigError, match="top of a module"):
        Judges(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("judged_badly:act", "RuntimeError: no such thing here"),
        ("judged_functions:missing", "AttributeError"),
        ("judged_nowhere:act", "ModuleNotFoundError"),
        ("judged_never:act", "3 workers in a row did not start: a worker ended with code 3"),
    ],
)
def test_a_function_that_does_not_load_ends_the_call(functions, function, message):
    before = children()
    with Judges(function) as judges, pytest.raises(ExtensionError, match=message):
        judges.judge([1, 2, 3])
    assert children() == before


def test_a_function_that_loads_for_ever_ends_the_call(functions):
    with Judges("judged_late:act", start_limit_s=0.3) as judges, pytest.raises(ExtensionError, match="not ready after"):
        judges.judge([1])


def test_kinds_are_told_apart():
    assert TimedOut("x") != Died("x") and TimedOut("x") == TimedOut("x") and isinstance(Failed("x"), NotJudged)
