import json
import logging
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megarpt import __version__, cli
from megarpt.config.load import load_config
from megarpt.config.schema import PretrainConfig, SftConfig
from megarpt.errors import EXIT_CONFIG, EXIT_DATA, CheckpointError, ConfigError, DataError, StopRequested

ROOT = Path(__file__).parents[2]
MINIMAL = "run: {dir: runs/x}\ndata: {tokenizer: bytes, train: [{path: a}]}\ntrain: {train_tokens: 1000}\n"
ROLLOUTS = (
    "command: rl\nrun: {dir: runs/x}\nmodel: {init_from: y}\ndata: {tokenizer: bytes, train: a}\n"
    "rollout: {max_new_tokens: 64}\nverifiers: [{kind: math}]\ntrain: {train_steps: 3}\n"
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, logging_as_before):
    for name in ("RANK", "WORLD_SIZE", "MEGARPT_EXIT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.fixture
def stage(monkeypatch):
    """Put a stand-in for `megarpt.run.<name>` in place; returns the list of what it is called with.

    The device is a stand-in too: `stage.machine` notes what is started and closed.
    """
    machine = []

    class FakeRuntime:
        def close(self):
            machine.append("closed")

    def start(device):
        machine.append(device)
        return FakeRuntime()

    monkeypatch.setattr("megarpt.device.runtime.start", start)

    def put(name, result=0):
        calls = []

        def run(options, runtime):
            assert isinstance(runtime, FakeRuntime)
            calls.append(options)
            if isinstance(result, BaseException):
                raise result
            return result

        module = types.ModuleType(f"megarpt.run.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules["megarpt.run"], name, module, raising=False)
        return calls

    import megarpt.run  # noqa: F401  the parent package must be importable for the stand-ins to be found

    put.machine = machine
    return put


def python(*code, **env):
    return subprocess.run(
        [sys.executable, *code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["show-config", "CONFIG"], ["show-config", "--help-fields"]]
)
def test_light_commands_load_neither_torch_nor_megatron(arguments, config):
    arguments = [config if each == "CONFIG" else each for each in arguments]
    code = (
        "import sys\nfrom megarpt.cli import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as stop: code = stop.code\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'numpy'}\n"
        "sys.exit(f'code {code}, loaded {heavy}' if code or heavy else 0)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_python_dash_m(config):
    result = python("-m", "megarpt", "show-config", config, "run.seed=7")
    assert result.returncode == 0, result.stderr
    assert "seed: 7" in result.stdout and result.stderr == ""


@pytest.mark.parametrize(
    "verb",
    [
        "pretrain",
        "sft",
        "score",
        "evaluate",
        "generate",
        "export",
        "verify-resume",
        "inspect-run",
        "show-config",
        "plan",
        "submit",
        "doctor",
    ],
)
def test_every_command_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  megarpt {verb}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"megarpt {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["bananas"], "invalid choice"),
        (["score"], "required: --reference, --corpus"),
        (["pretrain"], "required: CONFIG.yaml"),
        (["pretrain", "c.yaml", "--optimizer.lr=3"], "without dashes"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
        (["doctor", "a=b"], "unrecognized arguments: a=b"),
        (["generate", "r", "--prompt", "x", "--top-k", "many"], "invalid int value"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_the_config_code(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == EXIT_CONFIG
    assert words in capsys.readouterr().err


def test_show_config_prints_what_can_be_loaded_again(config, tmp_path, capsys):
    assert cli.main(["show-config", config, "optimizer.lr=1e-3"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_config(again) == load_config(config, ["optimizer.lr=1e-3"])


def test_show_config_hash_is_that_of_the_values(config, capsys):
    cli.main(["show-config", config, "--hash"])
    first = capsys.readouterr().out
    cli.main(["show-config", config, "--hash", "run.seed=1234"])
    assert capsys.readouterr().out == first and len(first.strip()) == 64


def test_show_config_prints_one_value(config, capsys):
    assert cli.main(["show-config", config, "--value", "run.dir", "run.dir=runs/a b"]) == 0
    assert capsys.readouterr().out == "runs/a b\n"
    assert cli.main(["show-config", config, "--value", "run.sed"]) == EXIT_CONFIG
    assert "--value: got 'run.sed'" in capsys.readouterr().err


def test_show_config_checks_a_world_that_is_not_there(config, capsys):
    assert cli.main(["show-config", config, "--world-size", "1"]) == 0
    assert cli.main(["show-config", config, "--world-size", "3"]) == EXIT_CONFIG
    assert "expected a multiple of 24" in capsys.readouterr().err


def test_show_config_help_fields(capsys):
    assert cli.main(["show-config", "--help-fields"]) == 0
    assert "optimizer.lr: number = 0.0003\n    Peak learning rate." in capsys.readouterr().out


def test_show_config_wants_something(capsys):
    assert cli.main(["show-config"]) == EXIT_CONFIG
    assert "--help-fields" in capsys.readouterr().err


def test_pretrain_gets_the_resolved_configuration_and_its_code_is_ours(config, stage):
    calls = stage("pretrain", result=75)
    assert cli.main(["pretrain", config, "run.seed=5", "-v", "run.device=cpu"]) == 75
    assert calls[0].run.seed == 5 and calls[0].run.device == "cpu"


@pytest.mark.parametrize(
    ("argv", "module", "kind"),
    [
        (["sft", "CONFIG"], "pretrain", SftConfig),
        (["verify-resume", "CONFIG", "command=sft"], "verify_resume", SftConfig),
        (["verify-resume", "CONFIG"], "verify_resume", PretrainConfig),
    ],
)
def test_given_text_is_trained_on_in_one_way(config, stage, monkeypatch, argv, module, kind):
    seen = []
    stage(module)
    monkeypatch.setattr(f"megarpt.run.{module}.run", lambda cfg, *_: seen.append(cfg) or 0)
    assert cli.main([*(config if each == "CONFIG" else each for each in argv), "model.init_from=runs/base"]) == 0
    assert [type(cfg) for cfg in seen] == [kind]


@pytest.mark.parametrize("verb", ["plan", "verify-resume"])
def test_commands_for_given_text_refuse_rollouts(tmp_path, stage, capsys, verb):
    calls = stage(verb.replace("-", "_"))
    (tmp_path / "rl.yaml").write_text(ROLLOUTS)
    assert cli.main([verb, str(tmp_path / "rl.yaml")]) == EXIT_CONFIG
    assert "command: got rl, expected pretrain or sft" in capsys.readouterr().err and calls == []


def test_the_process_group_is_left_after_success_and_not_after_an_error(config, stage):
    stage("pretrain")
    cli.main(["pretrain", config, "run.device=cpu"])
    assert stage.machine == ["cpu", "closed"]
    stage("pretrain", result=DataError("corpus: truncated"))
    cli.main(["pretrain", config])
    assert stage.machine == ["cpu", "closed", "auto"]


def test_a_wrong_configuration_never_reaches_the_run(config, stage, capsys):
    calls = stage("pretrain")
    assert cli.main(["pretrain", config, "run.sed=5"]) == EXIT_CONFIG
    error = capsys.readouterr().err
    assert calls == [] and stage.machine == [] and "did you mean run.seed?" in error and "Traceback" not in error


def test_pretrain_checks_the_batch_against_torchruns_world(config, stage, monkeypatch, capsys):
    calls = stage("pretrain")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["pretrain", config]) == EXIT_CONFIG
    assert "expected a multiple of 24" in capsys.readouterr().err and calls == []


def test_score_options(stage):
    calls = stage("score")
    assert cli.main(["score", "--reference", "runs/ref", "--corpus", "data/mix"]) == 0
    assert calls[0].prefixes() == {"ref_nll": "data/mix_ref_nll"}
    assert calls[0].seq_length is None and calls[0].separate_documents and calls[0].device == "auto"
    arguments = [
        "--streams",
        "ref_nll, ref_entropy",
        "--seq-length",
        "64",
        "--no-separate-documents",
        "--micro-batch-size",
        "2",
    ]
    cli.main(["score", "--reference", "r", "--corpus", "c", "--output-prefix", "o", *arguments, "--device", "cpu"])
    assert calls[1].prefixes() == {"ref_nll": "o_ref_nll", "ref_entropy": "o_ref_entropy"}
    assert (calls[1].seq_length, calls[1].micro_batch_size, calls[1].separate_documents) == (64, 2, False)


def test_evaluate_options(stage):
    calls = stage("evaluate", result=None)
    assert cli.main(["evaluate", "r", "--corpus", "a=x", "--corpus", "b=y=z", "--max-tokens", "9", "--output", "json"]) == 0
    assert calls[0].corpora == {"a": "x", "b": "y=z"} and calls[0].max_tokens == 9 and calls[0].output == "json"


def test_generate_options(stage):
    calls = stage("generate")
    cli.main(["generate", "r", "--prompt", "hello", "--temperature", "0", "--top-k", "5", "--top-p", "0.5", "--seed", "3"])
    options = calls[0]
    assert (options.prompt, options.temperature, options.top_k, options.top_p, options.seed) == ("hello", 0.0, 5, 0.5, 3)
    assert options.max_new_tokens == 64 and options.num_samples == 1


def test_verify_resume_options(config, stage, monkeypatch):
    calls = []
    stage("verify_resume")
    monkeypatch.setattr(sys.modules["megarpt.run.verify_resume"], "run", lambda *given: calls.append(given) or 82)
    arguments = ["verify-resume", config, "run.seed=5", "--steps", "12", "--nproc-per-node", "8", "--keep", "run.device=cuda"]
    assert cli.main([*arguments, "batch.global_batch_size=64"]) == 82
    cfg, options, _ = calls[0]
    assert (cfg.run.seed, cfg.run.device) == (5, "cuda") and stage.machine == ["cpu", "closed"]
    assert (options.steps, options.nproc_per_node, options.keep) == (12, 8, True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["verify-resume", config, "batch.global_batch_size=16"]) == 82
    assert calls[1][1].model_dump() == {"steps": 20, "nproc_per_node": 1, "keep": False}


def test_verify_resume_checks_the_batch_against_the_ranks_it_would_run(config, stage, capsys):
    stage("verify_resume")
    assert cli.main(["verify-resume", config, "--nproc-per-node", "3"]) == EXIT_CONFIG
    assert "expected a multiple of 24" in capsys.readouterr().err and stage.machine == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify-resume", "CONFIG", "--steps", "3"], "steps: got 3"),
        (["score", "--reference", "r", "--corpus", "c", "--streams", "ref_nnl"], "expected 'ref_nll' or 'ref_entropy'"),
        (["score", "--reference", "r", "--corpus", "c", "--seq-length", "0"], "seq_length: got 0"),
        (["evaluate", "r", "--corpus", "x"], "expected NAME=PREFIX"),
        (["evaluate", "r", "--corpus", "a=x", "--corpus", "a=y"], "given twice"),
        (["generate", "r", "--prompt", "x", "--top-p", "2", "--num-samples", "0"], "2 mistakes"),
    ],
)
def test_wrong_options_exit_with_the_config_code(arguments, words, stage, capsys):
    calls = [stage(name) for name in ("score", "evaluate", "generate")]
    assert cli.main(arguments) == EXIT_CONFIG
    assert words in capsys.readouterr().err and not any(calls)


@pytest.mark.parametrize("error", [DataError("corpus: truncated"), CheckpointError("a shard is missing")])
def test_expected_errors_end_with_their_code_and_no_traceback(error, config, stage, capsys):
    stage("pretrain", result=error)
    assert cli.main(["pretrain", config]) == EXIT_DATA
    assert capsys.readouterr().err == f"megarpt: {type(error).__name__}: {error}\n"


def test_a_launcher_that_loses_exit_codes_finds_them_in_a_file(config, stage, monkeypatch, tmp_path):
    path = tmp_path / "exit.json"
    monkeypatch.setenv("MEGARPT_EXIT_FILE", str(path))
    stage("pretrain", result=DataError("corpus: truncated"))
    assert cli.main(["pretrain", config]) == EXIT_DATA
    first = json.loads(path.read_text())
    assert first == {"exit_code": EXIT_DATA, "rank": 0, "error": "DataError: corpus: truncated"}
    stage("pretrain", result=CheckpointError("because the other rank left"))
    assert cli.main(["pretrain", config]) == EXIT_DATA
    assert json.loads(path.read_text()) == first


def test_a_stop_that_a_file_tells_of_is_no_failure_of_the_process(config, stage, monkeypatch, tmp_path):
    stage("pretrain", result=StopRequested("at step 3"))
    assert cli.main(["pretrain", config]) == 75
    monkeypatch.setenv("MEGARPT_EXIT_FILE", str(tmp_path / "exit.json"))
    assert cli.main(["pretrain", config]) == 0
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 75
    monkeypatch.setenv("MEGARPT_EXIT_FILE", str(tmp_path / "none" / "exit.json"))
    assert cli.main(["pretrain", config]) == 75


def test_verbose_shows_where_an_expected_error_was_raised(config, stage, capsys):
    stage("pretrain", result=DataError("corpus: truncated"))
    cli.main(["pretrain", config, "-v", "--log-format", "plain"])
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_leave_configuration_errors_to_rank_0_and_report_their_own(config, stage, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = []
    monkeypatch.setattr(time, "sleep", lambda seconds: before.append((seconds, capsys.readouterr().err)))
    assert cli.main(["pretrain", config, "run.sed=3"]) == EXIT_CONFIG
    assert before == [(cli._RANK_0_REPORTS_S, "")]  # the launcher stops this rank meanwhile, once rank 0 has left
    assert "[rank 1]: ConfigError" in capsys.readouterr().err
    stage("pretrain", result=DataError("only here"))
    assert cli.main(["pretrain", config, "batch.global_batch_size=16"]) == EXIT_DATA
    assert "[rank 1]: DataError: only here" in capsys.readouterr().err


def test_unexpected_exceptions_keep_their_traceback(config, stage):
    stage("pretrain", result=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["pretrain", config])


def leave(code, **env):
    """What is left of a process whose `main` ends with `code`, and which has a thread that never ends."""
    script = (
        "import sys, threading, time\nfrom megarpt import cli\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        f"def main():\n    {code}\ncli.main = main\ncli.entry()"
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )


@pytest.mark.parametrize(("code", "exit_code", "word"), [("return 79", 79, ""), ("raise KeyError('a bug')", 1, "a bug")])
def test_of_several_ranks_one_that_failed_leaves_at_once(code, exit_code, word):
    result = leave(code, RANK="1", WORLD_SIZE="2")
    assert result.returncode == exit_code and word in result.stderr and result.stderr.count("Traceback") == bool(word)


def test_a_process_that_is_alone_or_successful_leaves_in_order(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda: 79)
    with pytest.raises(SystemExit) as alone:
        cli.entry()
    monkeypatch.setattr(cli, "main", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as successful:
        cli.entry()
    assert (alone.value.code, successful.value.code) == (79, 0)


def test_interrupting_is_not_a_crash(config, stage, capsys):
    stage("pretrain", result=KeyboardInterrupt())
    assert cli.main(["pretrain", config]) == 130
    assert capsys.readouterr().err == "megarpt: interrupted\n"


def test_a_world_that_is_no_number(config, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "one")
    assert cli.main(["show-config", config]) == EXIT_CONFIG
    assert "environment variable RANK: got 'one'" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_not_an_error(config):
    command = f'"{sys.executable}" -m megarpt show-config --help-fields | true; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == ""


def test_json_log_lines(config, stage, capsys, monkeypatch):
    def run(cfg, runtime):
        logging.getLogger("megarpt.run").info("hello")
        return 0

    stage("pretrain")
    monkeypatch.setattr(sys.modules["megarpt.run.pretrain"], "run", run)
    assert cli.main(["--log-format", "json", "pretrain", config]) == 0
    assert json.loads(capsys.readouterr().err)["message"] == "hello"


def test_config_error_is_what_the_loader_raises(tmp_path):
    with pytest.raises(ConfigError):
        load_config(tmp_path / "missing.yaml")
