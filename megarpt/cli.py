"""The `megarpt` command: reads arguments and configuration, sets up logging, calls one module of `run/`.

Handlers import what they need when they are called, so `--help` and `show-config` answer without loading torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megarpt import __version__
from megarpt.config.fields import iter_fields
from megarpt.config.load import AnySection, build_section, config_hash, dump_resolved, load_config
from megarpt.config.schema import (
    COMMANDS,
    Device,
    EvaluateAnswersOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    LanguageModelConfig,
    PlanOptions,
    PretrainConfig,
    RLConfig,
    ScoreOptions,
    ServeOptions,
    SftConfig,
    SubmitOptions,
    TrainingConfig,
    VerifyResumeOptions,
)
from megarpt.config.yaml_source import parse_yaml
from megarpt.errors import EXIT_CONFIG, EXIT_OK, EXIT_RESUMABLE, ConfigError, MegarptError
from megarpt.log import setup_logging

if TYPE_CHECKING:
    from megarpt.device.runtime import Runtime

logger = logging.getLogger(__name__)

Handler = Callable[[argparse.Namespace], int | None]

_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
_ONLY_CORPORA = ("corpus", "max_tokens", "micro_batch_size")  # options of `megarpt evaluate`, as those that follow
_ONLY_QUESTIONS = (
    *("mode", "template", "verifier", "greedy", "samples", "k", "temperature", "top_k", "top_p", "seed"),
    *("max_new_tokens", "max_prompt_tokens", "max_questions", "stop", "max_batch"),
)
_RANK_0_REPORTS_S = 20.0  # the launcher stops the other ranks once rank 0 has left
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for a program stopped by ctrl-c


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code: a mistake on the command line is a configuration error, which running again cannot help."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"{self.prog}: error: {message}\n")


def entry() -> None:
    """The process: `main`, and out. Of several ranks, one that failed leaves at once: peers may wait in a collective with it,
    and taking the process group down in order could wait for them in turn."""
    code = 1
    try:
        code = main()
    finally:
        kind, error, trace = sys.exc_info()
        if code != EXIT_OK and not isinstance(error, SystemExit) and os.environ.get("WORLD_SIZE", "1") != "1":
            if kind is not None and error is not None:
                sys.excepthook(kind, error, trace)  # torch's, which names the rank on every line
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (errors.py). Unexpected exceptions pass through with their traceback."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    rank = 0
    try:
        rank, world_size = _place_in_world()
        verbose = getattr(args, "verbose", False)
        setup_logging(rank=rank, world_size=world_size, verbose=verbose, log_format=getattr(args, "log_format", "auto"))
        code = args.handler(args)
        sys.stdout.flush()
        return EXIT_OK if code is None else int(code)
    except MegarptError as error:
        if rank > 0 and isinstance(error, ConfigError):
            # Every rank reads the same configuration, and one report of its mistakes is enough: rank 0's, which must not be
            # stopped before it has made it because this rank was quicker to leave.
            time.sleep(_RANK_0_REPORTS_S)
        where = f" [rank {rank}]" if rank else ""
        sys.stderr.write(f"megarpt{where}: {type(error).__name__}: {error}\n")
        logger.debug("where it was raised", exc_info=True)
        return _report_exit(error, rank)
    except KeyboardInterrupt:
        sys.stderr.write("megarpt: interrupted\n")
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # `megarpt show-config c.yaml | head`: the reader has enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _pretrain(args: argparse.Namespace) -> int | None:
    cfg = load_config(args.config, args.overrides, kind=PretrainConfig, world_size=_place_in_world()[1])
    with _machine(cfg.run.device) as runtime:
        from megarpt.run import pretrain

        return pretrain.run(cfg, runtime)


def _sft(args: argparse.Namespace) -> int | None:
    cfg = load_config(args.config, args.overrides, kind=SftConfig, world_size=_place_in_world()[1])
    with _machine(cfg.run.device) as runtime:
        from megarpt.run import pretrain

        return pretrain.run(cfg, runtime)


def _rl(args: argparse.Namespace) -> int | None:
    cfg = load_config(args.config, args.overrides, kind=RLConfig, world_size=_place_in_world()[1])
    with _machine(cfg.run.device) as runtime:
        from megarpt.run import rl

        return rl.run(cfg, runtime)


def _score(args: argparse.Namespace) -> int | None:
    streams = tuple(name.strip() for name in args.streams.split(","))
    options = _options(ScoreOptions, args, streams=streams, parallel=_layout(args))
    with _machine(options.device) as runtime:
        from megarpt.run import score

        return score.run(options, runtime)


def _evaluate(args: argparse.Namespace) -> int | None:
    others = _ONLY_CORPORA if args.questions else _ONLY_QUESTIONS
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) not in (None, [])]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: no effect {'with' if args.questions else 'without'} --questions; expected those of one kind, "
            "as held-out corpora and questions are evaluated apart"
        )
    return _evaluate_answers(args) if args.questions else _evaluate_corpora(args)


def _evaluate_corpora(args: argparse.Namespace) -> int | None:
    corpora: dict[str, str] = {}
    for text in args.corpus:
        name, equals, prefix = text.partition("=")
        if not equals or not name or name in corpora:
            reason = "given twice" if equals and name in corpora else "expected NAME=PREFIX, for example wiki=data/wiki"
            raise ConfigError(f"--corpus: got {text!r}, {reason}")
        corpora[name] = prefix
    options = _options(EvaluateOptions, args, corpora=corpora, parallel=_layout(args))
    with _machine(options.device) as runtime:
        from megarpt.run import evaluate

        return evaluate.run(options, runtime)


def _evaluate_answers(args: argparse.Namespace) -> int | None:
    questions: dict[str, str] = {}
    for text in args.questions:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else (Path(text).stem, text)
        if not name or name in questions:
            reason = "a second of this name; name it: NAME=FILE" if name else "expected FILE or NAME=FILE"
            raise ConfigError(f"--questions: got {text!r}, {reason}")
        questions[name] = path
    k = [each.strip() for each in (args.k or "").split(",") if each.strip()]
    if not all(each.isdecimal() for each in k):
        raise ConfigError(f"--k: got {args.k!r}, expected numbers with commas between them, for example 1,8")
    replaced: dict[str, object] = {"questions": questions, "parallel": _layout(args)}
    if args.verifier:
        replaced["verifiers"] = [_verifier(text) for text in args.verifier]
    if k:
        replaced["k"] = tuple(map(int, k))
    if args.stop is not None:
        replaced["stop"] = tuple(args.stop)
    options = _options(EvaluateAnswersOptions, args, **replaced)
    with _machine(options.device) as runtime:
        from megarpt.run import evaluate_answers

        return evaluate_answers.run(options, runtime)


def _verifier(text: str) -> dict[str, object]:
    """`math,require_box=true` as values of a VerifierConfig."""
    kind, *options = text.split(",")
    values: dict[str, object] = {"kind": kind}
    for option in options:
        name, equals, value = option.partition("=")
        parsed = parse_yaml(value)
        if not equals or not name or name in values or parsed.problems:
            raise ConfigError(f"--verifier: got {text!r}, expected KIND,OPTION=VALUE, for example math,require_box=true")
        values[name] = parsed.data
    return values


def _generate(args: argparse.Namespace) -> int | None:
    options = _options(GenerateOptions, args)
    with _machine(options.device) as runtime:
        from megarpt.run import generate

        return generate.run(options, runtime)


def _serve(args: argparse.Namespace) -> int | None:
    options = _options(ServeOptions, args)
    with _machine(options.device) as runtime:
        from megarpt.run import serve

        return serve.run(options, runtime)


def _verify_resume(args: argparse.Namespace) -> int | None:
    options = _options(VerifyResumeOptions, args)
    launched = _place_in_world()[1]
    world_size = launched if launched > 1 else options.nproc_per_node
    cfg = _text_config(args, world_size)
    # This process only watches and compares; the device is for those it starts.
    with _machine("cpu") as runtime:
        from megarpt.run import verify_resume

        return verify_resume.run(cfg, options, runtime)


def _export(args: argparse.Namespace) -> int | None:
    from megarpt.run import export

    return export.run(_options(ExportOptions, args))


def _show_config(args: argparse.Namespace) -> int | None:
    if args.help_fields:
        for field in iter_fields(COMMANDS[args.command]):
            sys.stdout.write(f"{field.key}: {field.type} = {field.default}\n    {field.doc}\n")
        return EXIT_OK
    if args.config is None:
        raise ConfigError("show-config: no CONFIG.yaml given; name one, or use --help-fields")
    cfg = load_config(args.config, args.overrides, world_size=args.world_size)
    if args.value is not None:
        sys.stdout.write(f"{_value(cfg, args.value)}\n")
    else:
        sys.stdout.write(f"{config_hash(cfg)}\n" if args.hash else dump_resolved(cfg))
    return EXIT_OK


def _plan(args: argparse.Namespace) -> int | None:
    options = _options(PlanOptions, args)
    cfg = _text_config(args, options.world_size)
    from megarpt.run import plan

    return plan.run(cfg, options)


def _inspect_run(args: argparse.Namespace) -> int | None:
    from megarpt.run import inspect_run

    return inspect_run.run(args.folder, as_json=args.json, plot=args.plot)


def _submit(args: argparse.Namespace) -> int | None:
    options = _options(SubmitOptions, args, sbatch=tuple(args.sbatch))
    cfg = load_config(args.config, args.overrides, world_size=options.nodes * options.ranks())
    from megarpt.run import submit

    return submit.run(cfg, options)


def _doctor(args: argparse.Namespace) -> int | None:
    from megarpt.run import doctor

    return doctor.run(as_json=args.json)


@contextmanager
def _machine(device: Device) -> Iterator[Runtime]:
    """The started device and process group. Modules of `run/` are imported inside: on a CPU megatron-core must not be imported
    before the layer that makes it run there is in place."""
    # Read by OpenMP when torch is loaded. Threads that wait by spinning stop each other wherever the cores are shared with
    # anything else: ten times slower was measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megarpt.device import runtime

    started = runtime.start(device)
    yield started
    started.close()  # not after an error: peers may be inside a collective, and leaving the group could wait for them


def _report_exit(error: MegarptError, rank: int) -> int:
    """The code to leave with, also written to the file that a launcher named in MEGARPT_EXIT_FILE.

    torchrun ends with 1 whatever its workers say, so a batch script that must tell one end from another names a file. The
    first rank to fail writes it. A stop that was asked for is then no failure of the process: with any other code than 0
    torchrun would take the other ranks down while they are still leaving.
    """
    path = os.environ.get("MEGARPT_EXIT_FILE")
    if not path:
        return error.exit_code
    record = {"exit_code": error.exit_code, "rank": rank, "error": f"{type(error).__name__}: {error}"}
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(record, file)
    except FileExistsError:
        pass
    except OSError as failure:
        sys.stderr.write(f"megarpt: MEGARPT_EXIT_FILE: cannot write {path}: {failure.strerror}\n")
        return error.exit_code  # unheard, a stop must not look like the end
    return EXIT_OK if error.exit_code == EXIT_RESUMABLE else error.exit_code


def _text_config(args: argparse.Namespace, world_size: int | None) -> LanguageModelConfig:
    """The configuration of `megarpt pretrain`, or of `megarpt sft` where its key `command` says so."""
    cfg = load_config(args.config, args.overrides, world_size=world_size)
    if not isinstance(cfg, LanguageModelConfig):
        raise ConfigError(f"command: got {cfg.command}, expected pretrain or sft: megarpt {args.verb} is for these two")
    return cfg


def _value(cfg: TrainingConfig, key: str) -> str:
    """One value of a resolved configuration, as a shell script wants it."""
    value: object = cfg.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f"--value: got {key!r}, expected a key such as run.dir; `show-config --help-fields` lists all")
        value = value[part]
    return value if isinstance(value, str) else json.dumps(value)


def _place_in_world() -> tuple[int, int]:
    """Rank and number of ranks as torchrun tells them; (0, 1) without it."""
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ConfigError(f"environment variable {name}: got {text!r}, expected a number, as torchrun sets it")
        values.append(int(text))
    return values[0], values[1]


def _options(model: type[AnySection], args: argparse.Namespace, **replaced: object) -> AnySection:
    """The record a command takes, from the arguments of the same names."""
    given = {name: getattr(args, name) for name in model.model_fields if getattr(args, name, None) is not None}
    return build_section(model, given | replaced, name=f"megarpt {args.verb}")


def _layout(args: argparse.Namespace) -> dict[str, int]:
    sizes = {name: getattr(args, name) for name in _LAYOUT if getattr(args, name) is not None}
    return {**sizes, "sequence_parallel": args.sequence_parallel}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _build_parser()
    args, extra = parser.parse_known_args(argv)
    # argparse takes positionals in one run only: with an option in between, later overrides arrive as unknown arguments.
    late = [each for each in extra if not each.startswith("-") and "=" in each]
    unknown = [each for each in extra if each not in late]
    if unknown or (late and not hasattr(args, "overrides")):
        hint = "; overrides are written section.key=value, without dashes" if any("=" in each for each in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown or late)}{hint}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def _build_parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show debug messages")
    common.add_argument(
        "--log-format",
        choices=("auto", "plain", "json"),
        default=argparse.SUPPRESS,
        help="auto: coloured on a terminal, plain otherwise",
    )
    parser = _Parser(
        prog="megarpt",
        description="Distributed pretraining that chooses what each token is worth.",
        epilog="`megarpt COMMAND --help` shows the options of a command and an example.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"megarpt {__version__}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def command(name: str, handler: Handler, summary: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            parents=[common],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(handler=handler)
        return made

    pretrain = command(
        "pretrain",
        _pretrain,
        "train a model from a configuration file",
        "megarpt pretrain examples/rho1/config.yaml optimizer.lr=3e-4 train.train_tokens=1e9\n"
        "  torchrun --nproc-per-node 8 -m megarpt pretrain examples/rho1/config.yaml",
    )
    _add_config(pretrain, None)
    sft = command(
        "sft",
        _sft,
        "train a model on the answers to given prompts, from a configuration file",
        "megarpt sft examples/rpt/sft.yaml data.train.0.path=data/answers.jsonl\n"
        "  torchrun --nproc-per-node 8 -m megarpt sft examples/rpt/sft.yaml",
    )
    _add_config(sft, None)
    rl = command(
        "rl",
        _rl,
        "train a policy on rewards that can be checked, from a configuration file",
        "megarpt rl examples/rpt/rl.yaml rollout.group_size=16\n"
        "  torchrun --nproc-per-node 8 -m megarpt rl examples/rpt/rl.yaml",
    )
    _add_config(rl, None)
    _add_score(
        command(
            "score",
            _score,
            "run a reference model over a corpus and write what it thinks of every token",
            "megarpt score --reference runs/reference --corpus data/mix   # writes data/mix_ref_nll.bin, .idx, .json",
        )
    )
    _add_evaluate(
        command(
            "evaluate",
            _evaluate,
            "measure a trained model on held-out corpora, or on questions",
            "megarpt evaluate runs/rho1 --corpus wiki=data/wiki_valid --output json\n"
            "  megarpt evaluate runs/rpt --questions gsm8k_test.jsonl --template question --verifier math --samples 8",
        )
    )
    _add_generate(
        command(
            "generate",
            _generate,
            "continue a text with a trained model",
            "megarpt generate runs/rho1 --prompt 'The function returns' --max-new-tokens 40 --temperature 0.8",
        )
    )
    _add_serve(
        command(
            "serve",
            _serve,
            "answer requests for completions over HTTP, as OpenAI's clients make them",
            "megarpt serve runs/rho1 --port 8000\n"
            """  curl localhost:8000/v1/completions -d '{"prompt": "The function returns", "max_tokens": 40}'""",
        )
    )
    _add_verify_resume(
        command(
            "verify-resume",
            _verify_resume,
            "train with and without a kill and a resume, and compare the two to the last bit",
            "megarpt verify-resume examples/rho1/config.yaml --steps 20 --nproc-per-node 8\n"
            "  torchrun --nnodes 2 --nproc-per-node 8 ... -m megarpt verify-resume examples/rho1/config.yaml",
        )
    )
    export = command(
        "export",
        _export,
        "copy the weights of a checkpoint into a folder of their own",
        "megarpt export runs/rho1 models/rho1   # usable as model.init_from, by score, evaluate and generate",
    )
    export.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder or one checkpoint of it")
    export.add_argument("output", metavar="OUT", help="the folder to make")
    show = command(
        "show-config",
        _show_config,
        "check a configuration and print it resolved, defaults included",
        "megarpt show-config examples/rho1/config.yaml optimizer.lr=3e-4\n  megarpt show-config --help-fields",
    )
    _add_config(show, "?")
    show.add_argument("--value", metavar="KEY", help="print only this value, for example run.dir")
    show.add_argument("--world-size", type=int, metavar="N", help="check also whether it fits this number of ranks")
    show.add_argument("--hash", action="store_true", help="print only the hash of the resolved configuration")
    show.add_argument("--help-fields", action="store_true", help="list every field with its type, default and meaning")
    show.add_argument("--command", choices=tuple(COMMANDS), default="pretrain", help="of this command (default: %(default)s)")
    _add_plan(
        command(
            "plan",
            _plan,
            "say what memory a training step needs and what it costs, plain, recomputed and streamed",
            "megarpt plan examples/rho1/config.yaml --card-gb 80 --plot plan.png   # allocates nothing and loads no torch",
        )
    )
    inspect = command(
        "inspect-run",
        _inspect_run,
        "report on a run folder: curve, speed, where the time went, restarts, stragglers, selection, checkpoints",
        "megarpt inspect-run runs/rho1   # of a running, killed or finished run; loads no torch",
    )
    inspect.add_argument("folder", metavar="RUN_FOLDER", help="run.dir of the run")
    inspect.add_argument("--json", action="store_true", help="one JSON object on standard output")
    inspect.add_argument("--plot", metavar="FILE", help="also draw loss and speed (.png, .svg, .pdf); needs matplotlib")
    submit = command(
        "submit",
        _submit,
        "submit a training run to Slurm",
        "megarpt submit examples/rho1/config.yaml optimizer.lr=3e-4 --nodes 4 --time 24:00:00",
    )
    _add_config(submit, None)
    _add_submit(submit)
    doctor = command(
        "doctor",
        _doctor,
        "say what this machine can do, what it cannot, and why",
        "megarpt doctor   # exits with 80 when something needed is broken",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _add_config(parser: argparse.ArgumentParser, nargs: str | None) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", nargs=nargs, help="the configuration file")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="replaces a value of the file, read as YAML; list items go by index (data.train.0.weight=2); later ones win",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, None)
    parser.add_argument("--card-gb", type=float, metavar="GB", help="memory of a device, in GB of 10^9 bytes (default: 80)")
    parser.add_argument(
        "--budget-gb", type=float, metavar="GB", help="choose a chunk for this (default: stream.memory_budget_gb)"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="number of ranks (default: one copy of the model)")
    parser.add_argument("--plot", metavar="FILE", help="also draw memory by length (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--json", dest="json_output", action="store_true", help="one JSON object on standard output")
    _add_device(parser)


def _add_verify_resume(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, None)
    parser.add_argument("--steps", type=int, metavar="N", help="steps of each run; the resume is in the middle (default: 20)")
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="ranks to run on this machine (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the runs also when they are equal")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    for name in _LAYOUT:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, metavar="N", help="ranks that share a copy of the model (default: 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="as parallel.sequence_parallel of a run")


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", required=True, metavar="RUN_OR_CHECKPOINT", help="the reference model")
    parser.add_argument("--corpus", required=True, metavar="PREFIX", help="the corpus to score (PREFIX.bin, .idx, .json)")
    parser.add_argument("--output-prefix", metavar="P", help="where to write; default <corpus>_<stream>")
    parser.add_argument(
        "--streams", default="ref_nll", metavar="A,B", help="ref_nll, ref_entropy or both (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens per window, as in training (default: the reference's)"
    )
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="windows per forward pass (default: 8)")
    parser.add_argument(
        "--no-separate-documents",
        dest="separate_documents",
        action="store_false",
        help="let documents in one window see each other, as a run with data.separate_documents=false does",
    )
    _add_layout(parser)
    _add_device(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder or one checkpoint of it")
    parser.add_argument(
        "--corpus", action="append", default=[], metavar="NAME=PREFIX", help="repeatable; default: the run's own data.valid"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="limit per corpus (default: all of it)")
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="windows per forward pass (default: the run's)")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="default: %(default)s")
    _add_questions(parser.add_argument_group("on questions or next-token prompts instead"))
    _add_layout(parser)
    _add_device(parser)


def _add_questions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--questions", action="append", default=[], metavar="[NAME=]FILE", help="repeatable; JSON Lines, with the answers"
    )
    group.add_argument("--template", metavar="T", help="a name or a text with a placeholder (default: that of an RL run)")
    group.add_argument(
        "--verifier",
        action="append",
        default=[],
        metavar="KIND[,OPTION=VALUE]",
        help="repeatable; next_token, math, multiple_choice, exact or format (default: those of an RL run)",
    )
    group.add_argument(
        "--mode", choices=("both", "reasoning", "plain"), help="next tokens: after a thought, without (default: both)"
    )
    group.add_argument(
        "--greedy", action=argparse.BooleanOptionalAction, help="one answer of the likeliest tokens to each (default: yes)"
    )
    group.add_argument("--samples", type=int, metavar="N", help="also draw N answers to each, for pass@k (default: 0)")
    group.add_argument("--k", metavar="K,K", help="of pass@k, up to N (default: 1, 2, 4, ... and N)")
    group.add_argument("--temperature", type=float, metavar="T", help="of the samples (default: 1)")
    group.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens (default: all)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the top tokens of total probability P (default: 1)"
    )
    group.add_argument("--seed", type=int, metavar="S", help="of samples and intervals (default: 1234)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the RL run's, else 256)")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="default: what the run's data.seq_length leaves")
    group.add_argument("--max-questions", type=int, metavar="N", help="the first N of each file (default: all)")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="repeatable; a token that ends an answer (default: the RL run's)"
    )
    group.add_argument("--max-batch", type=int, metavar="N", help="answers drawn at the same time (default: 64)")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder or one checkpoint of it")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the top tokens of total probability P (default: 1)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="default: 1234")
    parser.add_argument("--num-samples", type=int, metavar="N", help="continuations to write (default: 1)")
    _add_device(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder or one checkpoint of it")
    parser.add_argument("--host", metavar="ADDRESS", help="to listen at (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, metavar="N", help="to listen at (default: 8000; 0 takes a free one)")
    parser.add_argument("--max-batch", type=int, metavar="N", help="completions drawn at the same time (default: 64)")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="completions that may wait or be drawn (default: 65536)")
    parser.add_argument(
        "--max-sequence-length", type=int, metavar="N", help="of a prompt with its completion (default: the run's seq_length)"
    )
    parser.add_argument("--name", metavar="TEXT", help="of the model, for clients (default: RUN_OR_CHECKPOINT)")
    parser.add_argument(
        "--weights-dir", metavar="FOLDER", help="let clients replace the weights by those in a folder of this one (default: no)"
    )
    _add_device(parser)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the cluster")
    parser.add_argument("--time", required=True, metavar="LIMIT", help="of one allocation: minutes, H:M:S or D-H:M:S")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: 8; 0 trains on CPUs")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="processes on each node (default: one a GPU, or one)")
    parser.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    parser.add_argument("--account", metavar="NAME", help="default: yours")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="=--OPTION=VALUE",
        help="repeatable: another option, as sbatch takes it",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the script; submit and write nothing")
