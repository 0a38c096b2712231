"""`megarpt pretrain` and `megarpt sft`: every object of a run on given text, built once, top to bottom."""

from __future__ import annotations

import logging
from functools import partial

import torch

from megarpt.config.schema import LanguageModelConfig, PretrainConfig
from megarpt.config.validate import reference_streams, split_rule
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.data.build import build_eval_sets, build_train_batches
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError
from megarpt.log import terminal
from megarpt.model.build import build_model, model_mistakes
from megarpt.model.parameters import total_parameters
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout, ProcessGroups, stage_seed
from megarpt.run.contents import verify_contents
from megarpt.run.opening import open_run, perf_meter
from megarpt.run.pretrained import load_pretrained
from megarpt.run.tokenizer_files import keep_tokenizer
from megarpt.streaming.plan import within_budget
from megarpt.structs import Progress
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.dump import BatchDumper
from megarpt.train.evaluation import evaluate
from megarpt.train.failures import Peers, together
from megarpt.train.held_out_split import HeldOutSplit
from megarpt.train.metrics import MetricLog
from megarpt.train.monitor import Monitor
from megarpt.train.optimizer import build_optimizer, optimizer_mistakes
from megarpt.train.profiler import StepProfiler
from megarpt.train.progress import ProgressLine
from megarpt.train.reference import OnlineReference
from megarpt.train.rundir import RunDir
from megarpt.train.sharded import from_rank_0
from megarpt.train.signals import StopSignal, any_rank
from megarpt.train.spikes import SpikeGuard
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.stragglers import StragglerWatch, rank_places, ranks_by_host
from megarpt.train.timers import StepTimers, attach
from megarpt.train.trainer import Trainer, total_steps
from megarpt.train.watchdog import Watchdog
from megarpt.train.weights import load_weights

logger = logging.getLogger(__name__)


def run(cfg: LanguageModelConfig, runtime: Runtime) -> int:
    """Train to the end of the configuration; the exit code. Errors say theirs by themselves."""
    mistakes = [*model_mistakes(cfg.model), *optimizer_mistakes(cfg.optimizer)]
    if mistakes:
        raise ConfigError("\n  ".join([f"{len(mistakes)} mistakes in the configuration", *mistakes]))
    layout = ParallelLayout.resolve(cfg.parallel, runtime.world_size)
    is_writer = runtime.rank == 0
    groups = layout.initialize(cfg.run.seed)
    places = rank_places(stage=groups.collection.pp.rank())
    with (
        StopSignal(runtime) as stop,
        together(partial(open_run, cfg, runtime, ranks_by_host(places))) as folder,
        Peers(folder.faults_dir(from_rank_0(folder.restarts)), runtime.rank, runtime.world_size) as peers,
        Watchdog(
            folder, peers, hang_timeout_s=60.0 * cfg.faults.hang_timeout_minutes, flight_record=runtime.flight_record
        ) as watchdog,
    ):

        def begin(phase: str) -> None:
            watchdog.beat(phase)
            stop.check(f"before {phase}")

        def wait_in(phase: str) -> None:  # of this rank alone
            watchdog.beat(phase)
            stop.check_here(f"while {phase}")

        begin("building the model")
        tokenizer = load_tokenizer(cfg.data.tokenizer)
        torch.manual_seed(stage_seed(cfg.run.seed, groups.pp.rank()))
        planned = within_budget(cfg, world_size=runtime.world_size, vocab_size=tokenizer.vocab_size, on_cpu=not runtime.is_cuda)
        chunks = build_model(planned, layout, groups, runtime, vocab_size=tokenizer.vocab_size)
        optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
        timers = StepTimers(runtime.clock())
        attach(timers, chunks, optimizer)
        objective = build_objective(cfg.objective, cfg.run.seed, num_sources=len(cfg.data.train))
        reference = _online_reference(cfg, runtime, layout, groups, tokenizer.sha256)
        begin("opening the data")
        batches = build_train_batches(
            cfg,
            tokenizer,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            device=runtime.device,
            streams=() if reference else objective.streams,
            share_over=groups.tp,
        )
        rule = split_rule(cfg)
        eval_sets = build_eval_sets(cfg, tokenizer, reference_streams(rule) if rule is not None else ())
        if isinstance(cfg, PretrainConfig) and cfg.data.verify == "values":  # answers were read whole
            datasets = [*batches.datasets, *eval_sets.values()]
            verify_contents(datasets, runtime, on_block=partial(wait_in, "reading the data"), record=folder.verified_path)
        checkpoints = CheckpointManager(
            folder.checkpoint_dir, cfg, tokenizer_sha256=tokenizer.sha256, runtime=runtime, groups=groups
        )
        spikes = None
        if cfg.stability.spike_threshold > 0.0:
            spikes = SpikeGuard(cfg.stability, agree=partial(any_rank, runtime=runtime), shows=is_writer)

        def restore() -> TrainState | None:
            saved = checkpoints.load_latest(chunks, optimizer, scheduler)
            if saved is not None:
                folder.record(saved.progress, checkpoints.newest, counts=saved.counts())
                batches.load_state_dict(saved.data)
                objective.load_state_dict(saved.selection)
                if spikes is not None:
                    spikes.load_state_dict(saved.spikes)
            return saved

        begin("reading the checkpoint")
        state = restore()
        if state is None and cfg.model.init_from is not None:
            load_weights(cfg.model.init_from, chunks, tokenizer_sha256=tokenizer.sha256)
            optimizer.reload_model_params()
        begin("the first step")
        if is_writer:
            keep_tokenizer(folder.path, cfg.data.tokenizer)
        resume = state.progress if state else None
        parameters = total_parameters(chunks, groups)
        logger.info(
            "%s: %s parameters on %s, %d ranks; %s",
            folder.path,
            f"{parameters.total:,}",
            runtime.device_name,
            runtime.world_size,
            f"resuming at step {resume.step}" if resume else "starting",
        )
        with (
            checkpoints,
            batches,
            MetricLog.open(folder, cfg, resume=resume) as log,
            ProgressLine(
                "train",
                total_steps(cfg) * cfg.batch.global_batch_size * cfg.data.seq_length,
                completed=resume.tokens_seen if resume else 0,
                console=terminal(),
                is_writer=is_writer,
            ) as line,
            StepProfiler(cfg.profile, folder.profile_dir, runtime, timers, done=resume.step if resume else 0) as profiler,
        ):
            step = TrainStep(chunks, objective, optimizer, scheduler, groups, annotate=reference, guard=spikes, timers=timers)
            perf = perf_meter(cfg, runtime, parameters, folder, timers)
            dumper = BatchDumper(
                folder.dump_dir,
                runtime.rank,
                tokenizer.decode,
                always=groups.speaks_for_the_loss,
                source_names=[source.path for source in cfg.data.train],
            )
            stragglers = StragglerWatch(perf, places, runtime.device, interval_steps=cfg.logging.straggler_interval_steps)
            trainer = Trainer(
                cfg,
                step,
                batches,
                state or TrainState(progress=Progress(data_order=batches.data_order)),
                evaluate=partial(
                    evaluate,
                    chunks,
                    eval_sets,
                    groups,
                    runtime.device,
                    micro_batch_size=cfg.evaluation.micro_batch_size or cfg.batch.micro_batch_size,
                    max_tokens=cfg.evaluation.max_tokens,
                    split=_held_out_split(cfg, folder, groups, reference, resume),
                ),
                save=partial(checkpoints.save, model=chunks, optimizer=optimizer, scheduler=scheduler),
                restore=restore,
                checkpoints=checkpoints,
                monitor=Monitor(log, line, perf, stragglers, profiler, dumper, tokenizer.decode),
                run=folder,
                stop=stop,
                watchdog=watchdog,
                spikes=spikes,
            )
            end = trainer.fit()
        folder.finish("finished", f"{end.progress.step} steps")
    return EXIT_OK


def _online_reference(
    cfg: LanguageModelConfig, runtime: Runtime, layout: ParallelLayout, groups: ProcessGroups, tokenizer_sha256: str
) -> OnlineReference | None:
    """The reference model, when it scores during training instead of beforehand.

    Raises:
        ConfigError: it was trained with another tokenizer, so that its losses belong to other tokens.
    """
    if cfg.objective.reference is None:
        return None
    reference = load_pretrained(
        cfg.objective.reference.checkpoint,
        runtime,
        layout.without_interleaving(),
        groups,
        cfg.parallel.model_copy(update={"virtual_pipeline_model_parallel_size": None}),
        micro_batch_size=cfg.batch.micro_batch_size,
        seq_length=cfg.data.seq_length,
    )
    if reference.tokenizer.sha256 != tokenizer_sha256:
        raise ConfigError(
            f"objective.reference.checkpoint: {reference.checkpoint} was trained with tokenizer "
            f"{reference.tokenizer.sha256[:12]}, expected the run's ({cfg.data.tokenizer}, {tokenizer_sha256[:12]}); "
            "losses of different tokens cannot be compared: train a reference with this tokenizer"
        )
    return OnlineReference(reference.network, groups, reference_streams(cfg.objective))


def _held_out_split(
    cfg: LanguageModelConfig, folder: RunDir, groups: ProcessGroups, reference: OnlineReference | None, resume: Progress | None
) -> HeldOutSplit | None:
    """How evaluation tells kept-like from dropped-like tokens: by the run's own rule, among all tokens of a corpus."""
    rule = split_rule(cfg)
    if rule is None:
        return None
    return HeldOutSplit(
        folder.split_dir,
        build_objective(rule, cfg.run.seed),
        rule.model_dump(),
        groups,
        annotate=reference,
        resumes_at=resume.step if resume else None,
        is_writer=folder.is_writer,
    )
