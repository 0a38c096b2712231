"""`megarpt rl`: every object of a run that learns from rollouts, built once, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from megarpt.config.schema import RLConfig
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError
from megarpt.log import terminal
from megarpt.model.build import build_inference_network, build_model, model_mistakes, unwrap
from megarpt.model.parameters import total_parameters
from megarpt.objectives.policy_gradient import ClippedPolicyGradient
from megarpt.parallel.layout import ParallelLayout, ProcessGroups, stage_seed
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.evaluation import EvaluatedPrompts, evaluate_prompts, stop_tokens
from megarpt.rl.loop import PolicyLoop
from megarpt.rl.monitor import RlMonitor
from megarpt.rl.policy import ReferencePolicy
from megarpt.rl.prompts import PromptStream, load_prompts
from megarpt.rl.rollout import RolloutEngine, Sampling
from megarpt.rl.rollout_log import RolloutLog
from megarpt.rl.server_engine import ServerEngine
from megarpt.rl.structs import Prompt
from megarpt.rl.tasks import build_verifier
from megarpt.rl.verifiers import Closeable, Verifier
from megarpt.run.opening import open_run, perf_meter
from megarpt.run.policy_weights import PolicyExporter
from megarpt.run.tokenizer_files import keep_tokenizer
from megarpt.structs import Progress
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.failures import Peers, together
from megarpt.train.metrics import MetricLog
from megarpt.train.optimizer import build_optimizer, optimizer_mistakes
from megarpt.train.optimizer_state import restart_optimizer
from megarpt.train.progress import ProgressLine
from megarpt.train.run_loop import Surroundings
from megarpt.train.sharded import from_rank_0
from megarpt.train.signals import StopSignal
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.stragglers import rank_places, ranks_by_host
from megarpt.train.timers import StepTimers, attach
from megarpt.train.watchdog import Watchdog
from megarpt.train.weights import load_weights

logger = logging.getLogger(__name__)


def run(cfg: RLConfig, runtime: Runtime) -> int:
    """Train to the end of the configuration; the exit code. Errors say theirs by themselves."""
    mistakes = [*model_mistakes(cfg.model), *optimizer_mistakes(cfg.optimizer)]
    if mistakes:
        raise ConfigError("\n  ".join([f"{len(mistakes)} mistakes in the configuration", *mistakes]))
    layout = ParallelLayout.resolve(cfg.parallel, runtime.world_size)
    is_writer = runtime.rank == 0
    groups = layout.initialize(cfg.run.seed)
    hosts = ranks_by_host(rank_places(stage=groups.collection.pp.rank()))
    with (
        StopSignal(runtime) as stop,
        together(partial(open_run, cfg, runtime, hosts)) as folder,
        Peers(folder.faults_dir(from_rank_0(folder.restarts)), runtime.rank, runtime.world_size) as peers,
        Watchdog(
            folder, peers, hang_timeout_s=60.0 * cfg.faults.hang_timeout_minutes, flight_record=runtime.flight_record
        ) as watchdog,
        _verifier(cfg) as verifier,
    ):

        def begin(phase: str) -> None:
            watchdog.beat(phase)
            stop.check(f"before {phase}")

        begin("building the model")
        tokenizer = load_tokenizer(cfg.data.tokenizer)
        torch.manual_seed(stage_seed(cfg.run.seed, groups.pp.rank()))
        chunks = build_model(cfg, layout, groups, runtime, vocab_size=tokenizer.vocab_size)
        policy = unwrap(chunks[0])
        policy.temperature = cfg.rollout.temperature
        optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
        timers = StepTimers(runtime.clock())
        attach(timers, chunks, optimizer)
        reference = None
        if cfg.objective.kl_coef > 0.0:
            network = build_inference_network(cfg, layout, groups, runtime, vocab_size=tokenizer.vocab_size)
            network.temperature = cfg.rollout.temperature
            reference = ReferencePolicy(network, groups)
        checkpoints = CheckpointManager(
            folder.checkpoint_dir,
            cfg,
            tokenizer_sha256=tokenizer.sha256,
            runtime=runtime,
            groups=groups,
            reference=[reference.network] if reference is not None else [],
        )
        begin("opening the prompts")
        prompts = PromptStream(_prompts(cfg, tokenizer, cfg.data.train), seed=cfg.run.seed)
        held_out = {name: _prompts(cfg, tokenizer, path) for name, path in cfg.data.valid.items()}
        ends = stop_tokens(tokenizer, cfg.rollout.stop, where="rollout.stop")
        begin("reading the checkpoint")
        state = checkpoints.load_latest(chunks, optimizer, scheduler)
        if state is not None:
            folder.record(state.progress, checkpoints.newest, counts=state.counts())
            prompts.load_state_dict(state.data)
        else:
            assert cfg.model.init_from is not None, "a rule of the configuration"
            load_weights(cfg.model.init_from, chunks, tokenizer_sha256=tokenizer.sha256)
            optimizer.reload_model_params()
            if reference is not None:
                reference.reset(chunks[0])
        engine = _engine(cfg, chunks, tokenizer, groups, runtime)
        resume = state.progress if state else None
        engine.publish(resume.step if resume else 0)
        begin("the first step")
        if is_writer:
            keep_tokenizer(folder.path, cfg.data.tokenizer)
        parameters = total_parameters(chunks, groups)
        logger.info(
            "%s: %s parameters on %s, %d ranks; %d prompts; %s",
            folder.path,
            f"{parameters.total:,}",
            runtime.device_name,
            runtime.world_size,
            len(prompts.prompts),
            f"resuming at step {resume.step}" if resume else "starting",
        )
        with (
            checkpoints,
            MetricLog.open(folder, cfg, resume=resume) as log,
            ProgressLine(
                "rl",
                cfg.train.train_steps,
                unit="step",
                completed=resume.step if resume else 0,
                console=terminal(),
                is_writer=is_writer,
            ) as line,
        ):
            perf = perf_meter(cfg, runtime, parameters, folder, timers)
            end = PolicyLoop(
                cfg,
                TrainStep(chunks, _objective(cfg), optimizer, scheduler, groups, timers=timers),
                state or TrainState(progress=Progress()),
                Surroundings(
                    save=partial(checkpoints.save, model=chunks, optimizer=optimizer, scheduler=scheduler),
                    checkpoints=checkpoints,
                    log=log,
                    perf=perf,
                    run=folder,
                    stop=stop,
                    watchdog=watchdog,
                ),
                prompts,
                engine,
                verifier,
                stop_tokens=ends,
                reference=reference,
                restart_optimizer=partial(restart_optimizer, optimizer),
                evaluate=_evaluation(cfg, engine, verifier, held_out, ends, groups, watchdog),
                monitor=RlMonitor(log, line, perf),
                rollouts=RolloutLog(
                    folder.path,
                    tokenizer,
                    interval_steps=cfg.logging.histogram_interval_steps,
                    is_writer=is_writer,
                    resume_step=resume.step if resume else None,
                ),
                groups=groups,
                device=runtime.device,
            ).fit()
        folder.finish("finished", f"{end.progress.step} steps")
    return EXIT_OK


@contextmanager
def _verifier(cfg: RLConfig) -> Iterator[Verifier]:
    verifier = build_verifier(cfg.verifiers)
    try:
        yield verifier
    finally:
        if isinstance(verifier, Closeable):
            verifier.close()


def _prompts(cfg: RLConfig, tokenizer: Tokenizer, path: str) -> list[Prompt]:
    return load_prompts(path, tokenizer, template=cfg.data.template, max_prompt_tokens=cfg.data.max_prompt_tokens)


def _engine(
    cfg: RLConfig, chunks: Sequence[torch.nn.Module], tokenizer: Tokenizer, groups: ProcessGroups, runtime: Runtime
) -> RolloutEngine:
    network = unwrap(chunks[0])
    if cfg.rollout.engine == "server":
        assert cfg.rollout.url is not None and cfg.rollout.weights_dir is not None, "a rule of the configuration"
        export = PolicyExporter(
            chunks,
            groups,
            cfg.model,
            vocab_size=network.valid_vocab_size,
            tokenizer=tokenizer,
            dtype=next(network.parameters()).dtype,
        )
        return ServerEngine(cfg.rollout.url, Path(cfg.rollout.weights_dir), tokenizer, groups, export=export)
    return EmbeddedEngine(
        network,
        tokenizer,
        groups,
        runtime.device,
        max_sequence_length=cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens,
        max_batch=cfg.rollout.max_batch,
    )


def _objective(cfg: RLConfig) -> ClippedPolicyGradient:
    own = cfg.objective
    return ClippedPolicyGradient(
        clip_low=own.clip_low,
        clip_high=own.clip_high,
        dual_clip=own.dual_clip,
        kl_coef=own.kl_coef if own.kl_in == "loss" else 0.0,
        kl_estimator=own.kl_estimator,
        entropy_coef=own.entropy_coef,
        reduction=own.reduction,
        on_policy=own.updates_per_rollout == 1,
        max_importance_ratio=own.max_importance_ratio,
        log_entropy=own.log_entropy,
    )


def _evaluation(
    cfg: RLConfig,
    engine: RolloutEngine,
    verifier: Verifier,
    held_out: Mapping[str, Sequence[Prompt]],
    ends: Sequence[int],
    groups: ProcessGroups,
    watchdog: Watchdog,
) -> Callable[[int], Mapping[str, EvaluatedPrompts]]:
    """Rewards of held-out prompts, one completion each."""
    sampling = Sampling(
        max_new_tokens=cfg.rollout.max_new_tokens,
        temperature=cfg.evaluation.temperature,
        stop_tokens=tuple(ends),
        seed=cfg.run.seed,
    )

    def evaluate(step: int) -> dict[str, EvaluatedPrompts]:
        results = {}
        for name, prompts in held_out.items():
            watchdog.beat(f"evaluation of {name} after step {step}")
            chosen = prompts[: cfg.evaluation.max_prompts]
            results[name] = evaluate_prompts(engine, verifier, chosen, group_size=1, sampling=sampling, groups=groups)
        return results

    return evaluate
