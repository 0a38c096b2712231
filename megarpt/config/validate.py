"""Rules across sections: what each field alone cannot know.

A rule is a small function that returns what is wrong or None. Its message begins with the key to change, so that the loader
can say where that key was set. All rules run; nothing stops at the first. An option that cannot take effect is a mistake too:
whoever wrote it expected something from it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from megarpt.config.presets import ACTIVATIONS, PRESETS
from megarpt.config.schema import (
    LanguageModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    PretrainConfig,
    ProfileConfig,
    RLConfig,
    RolloutConfig,
    SftConfig,
    StabilityConfig,
    Stream,
    TrainConfig,
    TrainingConfig,
)
from megarpt.errors import ConfigError

Rule = Callable[[Any], str | None]  # of the configurations it is listed for, below

STREAM_OF_SCORER = {"excess_loss": "ref_nll", "reference_loss": "ref_nll", "reference_entropy": "ref_entropy"}
"""Which per-token stream of the reference model a scorer reads."""

STUDENT_SCORERS = {"excess_loss", "loss"}
"""Scorers that read what the model that trains makes of a token."""

COLLECTIVE_TIMEOUT_MINUTES = 30.0
"""How long a collective waits for a peer that is alive and silent: what `device.runtime` and megatron-core give a group."""

SET_BY_MEGARPT: dict[str, dict[str, str]] = {
    "model": {
        "tensor_model_parallel_size": "use parallel.tensor_model_parallel_size",
        "sequence_parallel": "use parallel.sequence_parallel",
        "pipeline_model_parallel_size": "use parallel.pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size": "use parallel.virtual_pipeline_model_parallel_size",
        "context_parallel_size": "use parallel.context_parallel_size",
        "expert_model_parallel_size": "use parallel.expert_model_parallel_size",
        "expert_tensor_parallel_size": "use parallel.expert_tensor_parallel_size",
        "overlap_p2p_comm": "it follows from the pipeline schedule; the other value computes wrong gradients without a word",
        "batch_p2p_comm": "it follows from the pipeline schedule; the other value computes wrong gradients without a word",
        "deallocate_pipeline_outputs": "it follows from the device and the schedule; remove it",
        "variable_seq_lengths": "all micro-batches have the same length; remove it",
        "window_size": "sliding-window attention is not supported in this version",
        "bf16": "use train.precision",
        "fp16": "use train.precision",
        "params_dtype": "use train.precision",
        "pipeline_dtype": "use train.precision",
        "autocast_dtype": "use train.precision",
        "enable_autocast": "use train.precision",
        "activation_func": "use model.mcore.activation: silu, gelu or gelu_tanh",
        "use_cpu_initialization": "it follows from run.device",
        "calculate_per_token_loss": "it is what makes losses sums over tokens; remove it",
    },
    "optimizer": {
        **{
            name: f"use optimizer.{name}"
            for name in ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
        },
        "use_distributed_optimizer": "use parallel.use_distributed_optimizer",
        "overlap_param_gather": "use parallel.overlap_param_gather",
        "optimizer": "AdamW is the optimizer of this version",
        "bf16": "use train.precision",
        "fp16": "use train.precision",
        "params_dtype": "use train.precision",
    },
}
"""megatron-core fields that cannot be set in an `mcore` block, and what to do instead."""

_UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def model_fields(cfg: TrainingConfig) -> Mapping[str, Any]:
    """Fields of megatron-core's TransformerConfig: the preset's, and model.mcore over them."""
    preset = PRESETS.get(cfg.model.preset)
    return {**(preset.transformer if preset else {}), **cfg.model.mcore}


def split_rule(cfg: LanguageModelConfig) -> ObjectiveConfig | None:
    """How evaluation tells kept-like from dropped-like tokens among all of a corpus; None when it does not.

    A baseline that trains on all tokens, or on some chosen without a reference, is split as the run it is compared with is.
    """
    objective, fraction = cfg.objective, cfg.evaluation.split_fraction
    if not reference_streams(objective):
        objective = ObjectiveConfig(scorer="excess_loss", weighting="top_fraction", fraction=objective.fraction)
    changes = {"scope": "global_batch"} | ({} if fraction is None else {"fraction": fraction})
    rule = objective.model_copy(update=changes)
    return None if rule.fraction == 1.0 and rule.second is None else rule


def reference_streams(cfg: ObjectiveConfig) -> tuple[str, ...]:
    """The per-token streams of the reference model that the objective reads."""
    streams = (STREAM_OF_SCORER.get(scorer) for scorer in _scorers(cfg).values())
    return tuple(dict.fromkeys(stream for stream in streams if stream is not None))


def ranks_by_student(cfg: ObjectiveConfig) -> bool:
    """Whether the model that trains has a say in what a token is worth; otherwise that follows from the data alone."""
    return not STUDENT_SCORERS.isdisjoint(_scorers(cfg).values())


def preset_exists(cfg: TrainingConfig) -> str | None:
    if cfg.model.preset in PRESETS:
        return None
    near = difflib.get_close_matches(cfg.model.preset, PRESETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"model.preset: got {cfg.model.preset!r}, expected one of {', '.join(sorted(PRESETS))}{hint}"


def sequence_fits_the_preset(cfg: TrainingConfig) -> str | None:
    preset, given = PRESETS.get(cfg.model.preset), cfg.model.gpt.max_sequence_length
    if preset is None or cfg.data.seq_length <= (given or preset.max_sequence_length):
        return None
    if given is not None:
        return f"data.seq_length: got {cfg.data.seq_length}, expected at most {given}, model.gpt.max_sequence_length"
    return (
        f"data.seq_length: got {cfg.data.seq_length}, expected at most {preset.max_sequence_length}, the positions of preset "
        f"{cfg.model.preset}"
    )


def rotary_settings_have_rotary_angles(cfg: TrainingConfig) -> str | None:
    preset, gpt = PRESETS.get(cfg.model.preset), cfg.model.gpt
    if preset is None or preset.gpt["position_embedding_type"] == "rope":
        return None
    for name in ("rotary_base", "rope_scaling_factor", "seq_len_interpolation_factor"):
        if getattr(gpt, name) is not None:
            return f"model.gpt.{name}: has no effect with preset {cfg.model.preset}, whose positions are learned; remove it"
    return None


def activation_is_known(cfg: TrainingConfig) -> str | None:
    got = cfg.model.mcore.get("activation")
    if got is None or got in ACTIVATIONS:
        return None
    return f"model.mcore.activation: got {got!r}, expected one of {', '.join(ACTIVATIONS)}"


def global_batch_is_whole_micro_batches(cfg: LanguageModelConfig) -> str | None:
    micro, total = cfg.batch.micro_batch_size, cfg.batch.global_batch_size
    if total % micro == 0:
        return None
    return f"batch.global_batch_size: got {total}, expected a multiple of batch.micro_batch_size ({micro})"


def min_lr_is_below_lr(cfg: TrainingConfig) -> str | None:
    lr, min_lr = cfg.optimizer.lr, cfg.optimizer.min_lr
    return None if min_lr <= lr else f"optimizer.min_lr: got {min_lr}, expected at most optimizer.lr ({lr})"


def warmup_ends_before_decay(cfg: TrainingConfig) -> str | None:
    warmup, decay_end = cfg.optimizer.lr_warmup_tokens, _decay_end(cfg)
    if decay_end is None:
        return None
    end, key = decay_end
    return None if warmup < end else f"optimizer.lr_warmup_tokens: got {warmup}, expected fewer than {key} ({end})"


def constant_has_no_decay(cfg: TrainingConfig) -> str | None:
    if cfg.optimizer.lr_decay_style != "constant" or cfg.optimizer.lr_decay_tokens is None:
        return None
    return (
        f"optimizer.lr_decay_tokens: got {cfg.optimizer.lr_decay_tokens}, which has no effect with "
        "optimizer.lr_decay_style constant; remove it or choose cosine, linear or WSD"
    )


def wsd_has_a_decay(cfg: TrainingConfig) -> str | None:
    if cfg.optimizer.lr_decay_style != "WSD" or cfg.optimizer.lr_wsd_decay_tokens > 0:
        return None
    return "optimizer.lr_wsd_decay_tokens: got 0, expected more than 0 with optimizer.lr_decay_style WSD"


def wsd_fits(cfg: TrainingConfig) -> str | None:
    optimizer, decay_end = cfg.optimizer, _decay_end(cfg)
    if decay_end is None:
        return None
    end, key = decay_end
    room = end - optimizer.lr_warmup_tokens
    if optimizer.lr_decay_style != "WSD" or optimizer.lr_wsd_decay_tokens <= room or room <= 0:
        return None
    return (
        f"optimizer.lr_wsd_decay_tokens: got {optimizer.lr_wsd_decay_tokens}, expected at most {room} "
        f"({key} minus optimizer.lr_warmup_tokens)"
    )


def wsd_tokens_need_wsd(cfg: TrainingConfig) -> str | None:
    return _only_with_wsd(cfg, "lr_wsd_decay_tokens")


def wsd_style_needs_wsd(cfg: TrainingConfig) -> str | None:
    return _only_with_wsd(cfg, "lr_wsd_decay_style")


def top_fraction_has_a_scorer(cfg: LanguageModelConfig) -> str | None:
    if cfg.objective.weighting != "top_fraction" or cfg.objective.scorer != "none":
        return None
    return "objective.scorer: got 'none', expected a scorer that objective.weighting top_fraction can rank by"


def scorer_is_used(cfg: LanguageModelConfig) -> str | None:
    if cfg.objective.scorer == "none" or cfg.objective.weighting != "uniform":
        return None
    return (
        f"objective.scorer: got {cfg.objective.scorer!r}, which has no effect with objective.weighting uniform; "
        "set objective.weighting=top_fraction or objective.scorer=none"
    )


def fraction_is_used(cfg: LanguageModelConfig) -> str | None:
    return _only_with_top_fraction(cfg, "fraction")


def scope_is_used(cfg: LanguageModelConfig) -> str | None:
    return _only_with_top_fraction(cfg, "scope")


def second_set_is_used(cfg: LanguageModelConfig) -> str | None:
    return _only_with_top_fraction(cfg, "second")


def second_set_has_another_scorer(cfg: LanguageModelConfig) -> str | None:
    second = cfg.objective.second
    if second is None or second.scorer != cfg.objective.scorer:
        return None
    return (
        f"objective.second.scorer: got {second.scorer!r}, which objective.scorer is too: one of the two sets would lie within "
        "the other and have no effect; choose another scorer"
    )


def combine_has_two_sets(cfg: LanguageModelConfig) -> str | None:
    if cfg.objective.second is not None or cfg.objective.combine == ObjectiveConfig.model_fields["combine"].default:
        return None
    return (
        f"objective.combine: got {cfg.objective.combine!r}, which has no effect without objective.second; set "
        "objective.second.scorer and objective.second.fraction or remove it"
    )


def kept_share_is_known_to_the_routers(cfg: LanguageModelConfig) -> str | None:
    fields = model_fields(cfg)
    coefficient = fields.get("moe_aux_loss_coeff", 0.0)
    is_balanced = any(coefficient) if isinstance(coefficient, list) else bool(coefficient)
    if cfg.objective.second is None or fields.get("num_moe_experts") is None or not is_balanced:
        return None
    return (
        "objective.second: the balance loss of a mixture of experts is weighed by the share of tokens that are kept, which for "
        "two combined sets is not known before the step; remove it or set model.mcore.moe_aux_loss_coeff=0.0"
    )


def reference_is_used(cfg: LanguageModelConfig) -> str | None:
    if cfg.objective.reference is None or reference_streams(cfg.objective):
        return None
    return (
        f"objective.reference: objective.scorer {cfg.objective.scorer} reads nothing from a reference model; "
        f"remove it or choose one of {', '.join(STREAM_OF_SCORER)}"
    )


def reference_losses_have_one_origin(cfg: PretrainConfig) -> str | None:
    mistakes = (_stream_has_one_origin(cfg, key, scorer) for key, scorer in _scorers(cfg.objective).items())
    return next((mistake for mistake in mistakes if mistake is not None), None)


def streams_are_known(cfg: PretrainConfig) -> str | None:
    known = get_args(Stream)
    sources = {f"data.train.{index}": source.streams for index, source in enumerate(cfg.data.train)}
    for where, streams in (sources | {f"data.valid.{name}": each.streams for name, each in cfg.data.valid.items()}).items():
        for name in streams:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
                return f"{where}.streams.{name}: unknown stream; {hint}"
    return None


def held_out_streams_are_read(cfg: PretrainConfig) -> str | None:
    rule = split_rule(cfg)
    for name, corpus in cfg.data.valid.items():
        for stream in corpus.streams:
            key = f"data.valid.{name}.streams.{stream}"
            if rule is None:
                return f"{key}: nothing reads it, as this run selects no tokens; set evaluation.split_fraction or remove it"
            if stream not in reference_streams(rule):
                scorers, read = (" and ".join(names) for names in (_scorers(rule).values(), reference_streams(rule)))
                return f"{key}: held-out tokens are ranked by {scorers}, which reads {read}; remove it"
            if cfg.objective.reference is not None:
                return f"{key}: given together with objective.reference, so one of them has no effect; keep one"
    return None


def split_has_a_reference(cfg: PretrainConfig) -> str | None:
    fraction, rule = cfg.evaluation.split_fraction, split_rule(cfg)
    if fraction is None or rule is None or cfg.objective.reference is not None:
        return None
    needed = reference_streams(rule)
    if any(set(needed) <= set(corpus.streams) for corpus in cfg.data.valid.values()):
        return None
    stream, missing = needed[0], " and ".join(needed)
    return (
        f"evaluation.split_fraction: got {fraction}, but no corpus of data.valid has the stream {missing} to rank tokens by; "
        f"write it with `megarpt score` and name it: data.valid.NAME={{path: PREFIX, streams: {{{stream}: SIDECAR}}}}"
    )


def held_out_names_are_plain(cfg: TrainingConfig) -> str | None:
    for name in cfg.data.valid:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            return (
                f"data.valid.{name}: got the name {name!r}, expected letters, digits, _ and - only (it becomes a metric's name)"
            )
    return None


def evaluation_has_corpora(cfg: LanguageModelConfig | RLConfig) -> str | None:
    if cfg.data.valid:
        return None
    for name, field in type(cfg.evaluation).model_fields.items():
        got = getattr(cfg.evaluation, name)
        if name != "at_start" and got != field.default:
            return f"evaluation.{name}: got {got}, but data.valid names no corpus to evaluate"
    return None


def kept_checkpoints_are_saved(cfg: TrainingConfig) -> str | None:
    keep, interval = cfg.checkpoint.keep_every_steps, cfg.checkpoint.interval_steps
    if keep == 0 or (interval > 0 and keep % interval == 0):
        return None
    expected = f"a multiple of checkpoint.interval_steps ({interval})" if interval else "checkpoint.interval_steps to be set"
    return f"checkpoint.keep_every_steps: got {keep}, expected {expected}: no other step is saved"


def sequence_parallel_has_tensor_parallel(cfg: TrainingConfig) -> str | None:
    if not cfg.parallel.sequence_parallel or cfg.parallel.tensor_model_parallel_size > 1:
        return None
    return "parallel.sequence_parallel: got true, expected parallel.tensor_model_parallel_size greater than 1 with it"


def sequence_parallel_divides_the_tokens(cfg: TrainingConfig) -> str | None:
    tp, cp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.context_parallel_size
    tokens = cfg.batch.micro_batch_size * cfg.data.seq_length
    if not cfg.parallel.sequence_parallel or tokens % (tp * cp) == 0:
        return None
    return (
        f"parallel.sequence_parallel: {tokens} tokens per micro-batch (batch.micro_batch_size x data.seq_length) do not divide "
        f"over parallel.tensor_model_parallel_size ({tp}) x parallel.context_parallel_size ({cp})"
    )


def context_parallel_divides_the_tokens(cfg: TrainingConfig) -> str | None:
    cp, tokens = cfg.parallel.context_parallel_size, cfg.batch.micro_batch_size * cfg.data.seq_length
    if cp == 1 or tokens % (2 * cp) == 0:
        return None
    return (
        f"parallel.context_parallel_size: {tokens} tokens per micro-batch (batch.micro_batch_size x data.seq_length) do not "
        f"divide into 2 x {cp} pieces; every rank takes two of them, one from each end, so that all have the same work"
    )


def context_parallel_divides_the_evaluation(cfg: TrainingConfig) -> str | None:
    parallel, micro = cfg.parallel, cfg.evaluation.micro_batch_size if isinstance(cfg, LanguageModelConfig) else None
    if micro is None:
        return None
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    pieces = (2 if parallel.context_parallel_size > 1 else 1) * parallel.context_parallel_size * tp
    tokens = micro * cfg.data.seq_length
    if tokens % pieces == 0:
        return None
    return (
        f"evaluation.micro_batch_size: {tokens} tokens per micro-batch (times data.seq_length) do not divide into the {pieces} "
        "pieces of the parallel layout"
    )


def pipeline_divides_the_layers(cfg: TrainingConfig) -> str | None:
    stages, pieces = cfg.parallel.pipeline_model_parallel_size, cfg.parallel.virtual_pipeline_model_parallel_size or 1
    layers = model_fields(cfg).get("num_layers")
    if layers is None or layers % (stages * pieces) == 0 or any(name in cfg.model.mcore for name in _UNEVEN_STAGES):
        return None
    key = "virtual_pipeline_model_parallel_size" if layers % stages == 0 else "pipeline_model_parallel_size"
    return (
        f"parallel.{key}: {layers} layers do not divide into {stages} stages x {pieces} pieces; choose divisors, or say how "
        f"with one of {', '.join(f'model.mcore.{name}' for name in _UNEVEN_STAGES)}"
    )


def interleaving_has_a_pipeline(cfg: TrainingConfig) -> str | None:
    pieces = cfg.parallel.virtual_pipeline_model_parallel_size
    if pieces is None or cfg.parallel.pipeline_model_parallel_size > 1:
        return None
    return (
        f"parallel.virtual_pipeline_model_parallel_size: got {pieces}, expected parallel.pipeline_model_parallel_size greater "
        "than 1 with it"
    )


def expert_parallel_has_experts(cfg: TrainingConfig) -> str | None:
    experts = model_fields(cfg).get("num_moe_experts")
    for name, unset in (("expert_model_parallel_size", 1), ("expert_tensor_parallel_size", None)):
        got = getattr(cfg.parallel, name)
        if got != unset and experts is None:
            return f"parallel.{name}: got {got}, but the model {cfg.model.preset} has no experts to divide"
    ep = cfg.parallel.expert_model_parallel_size
    if experts is not None and experts % ep:
        return f"parallel.expert_model_parallel_size: {experts} experts do not divide over {ep} ranks"
    return None


def experts_with_tensor_parallel_have_sequence_parallel(cfg: TrainingConfig) -> str | None:
    tp = cfg.parallel.tensor_model_parallel_size
    if model_fields(cfg).get("num_moe_experts") is None or tp == 1 or cfg.parallel.sequence_parallel:
        return None
    return (
        f"parallel.sequence_parallel: got false, expected true for a mixture of experts with tensor_model_parallel_size {tp}: "
        "the router must see each token once"
    )


def param_gather_has_a_distributed_optimizer(cfg: TrainingConfig) -> str | None:
    parallel = cfg.parallel
    if not parallel.overlap_param_gather or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        return None
    return (
        "parallel.overlap_param_gather: got true, expected parallel.use_distributed_optimizer and "
        "parallel.overlap_grad_reduce with it"
    )


def profiled_steps_are_trained(cfg: LanguageModelConfig) -> str | None:
    if cfg.profile.steps is None:
        return None
    first, last = cfg.profile.steps
    steps = -(-cfg.train.train_tokens // (cfg.batch.global_batch_size * cfg.data.seq_length))
    if 2 <= first <= last <= steps:
        return None
    return (
        f"profile.steps: got [{first}, {last}], expected a first and a last step from 2 (the step before the first warms the "
        f"profiler up) to {steps}, the last one of the run"
    )


def profile_settings_are_used(cfg: LanguageModelConfig) -> str | None:
    if cfg.profile.steps is not None:
        return None
    for name in ("ranks", "record"):
        got = getattr(cfg.profile, name)
        if got != ProfileConfig.model_fields[name].get_default(call_default_factory=True):
            return f"profile.{name}: got {got}, which has no effect without profile.steps"
    return None


def spikes_are_looked_for(cfg: LanguageModelConfig) -> str | None:
    if cfg.stability.spike_threshold > 0.0:
        return None
    for name in ("spike_window_steps", "on_spike", "max_rollbacks"):
        got = getattr(cfg.stability, name)
        if got != StabilityConfig.model_fields[name].default:
            return f"stability.{name}: got {got!r}, which has no effect with stability.spike_threshold 0; set it to 6 or so"
    return None


def rollbacks_are_made(cfg: LanguageModelConfig) -> str | None:
    got = cfg.stability.max_rollbacks
    if got == StabilityConfig.model_fields["max_rollbacks"].default or cfg.stability.on_spike == "rollback":
        return None
    return f"stability.max_rollbacks: got {got}, which has no effect with stability.on_spike {cfg.stability.on_spike}"


def rollback_has_checkpoints(cfg: LanguageModelConfig) -> str | None:
    if cfg.stability.on_spike != "rollback" or cfg.checkpoint.interval_steps > 0:
        return None
    return (
        "stability.on_spike: got 'rollback', expected checkpoint.interval_steps greater than 0: nothing is saved to go back to"
    )


def hangs_are_seen_before_collectives_give_up(cfg: TrainingConfig) -> str | None:
    got = cfg.faults.hang_timeout_minutes
    if got < COLLECTIVE_TIMEOUT_MINUTES:
        return None
    return (
        f"faults.hang_timeout_minutes: got {got:g}, expected less than {COLLECTIVE_TIMEOUT_MINUTES:g}, after which collectives "
        "fail by themselves and nobody's stack is seen; 0 turns it off"
    )


def streaming_owns_recomputation(cfg: TrainingConfig) -> str | None:
    got = cfg.model.mcore.get("recompute_granularity")
    if not cfg.stream.layers or got is None:
        return None
    return (
        f"model.mcore.recompute_granularity: got {got!r} together with stream.layers, which recomputes every layer already; "
        "remove one of them"
    )


def streaming_settings_are_used(cfg: TrainingConfig) -> str | None:
    if cfg.stream.layers:
        return None
    for name in ("chunk_tokens", "memory_budget_gb"):
        got = getattr(cfg.stream, name)
        if got is not None:
            return f"stream.{name}: got {got:g}, which has no effect without stream.layers"
    return None


def chunks_have_one_origin(cfg: TrainingConfig) -> str | None:
    chunk, budget = cfg.stream.chunk_tokens, cfg.stream.memory_budget_gb
    if chunk is None or budget is None:
        return None
    return (
        f"stream.chunk_tokens: got {chunk} together with stream.memory_budget_gb ({budget:g}), which chooses it; remove one of "
        "them"
    )


def chunks_divide_among_sequence_parallel_ranks(cfg: TrainingConfig) -> str | None:
    chunk, tp = cfg.stream.chunk_tokens, cfg.parallel.tensor_model_parallel_size
    if chunk is None or not cfg.parallel.sequence_parallel or chunk >= tp:
        return None
    return (
        f"stream.chunk_tokens: got {chunk}, expected at least parallel.tensor_model_parallel_size ({tp}): under "
        "parallel.sequence_parallel every rank holds a part of each chunk"
    )


def answers_have_an_online_reference(cfg: SftConfig) -> str | None:
    needed = reference_streams(cfg.objective)
    if not needed or cfg.objective.reference is not None:
        return None
    return (
        f"objective.reference: objective.scorer {cfg.objective.scorer} reads {needed[0]}, and answers have no sidecars; set "
        "objective.reference.checkpoint, or choose scorer loss or random"
    )


def answers_are_not_split(cfg: SftConfig) -> str | None:
    if cfg.evaluation.split_fraction is None:
        return None
    return "evaluation.split_fraction: held-out answers have no reference losses to be split by; remove it"


def answers_start_from_weights(cfg: SftConfig) -> str | None:
    if cfg.model.init_from is not None:
        return None
    return "model.init_from: missing, expected the run folder or checkpoint of the model to start from"


def answers_are_kept_apart(cfg: SftConfig) -> str | None:
    if cfg.data.separate_documents:
        return None
    return "data.separate_documents: got false, expected true: records that share a row have nothing to do with each other"


def policy_starts_from_weights(cfg: RLConfig) -> str | None:
    if cfg.model.init_from is not None:
        return None
    return "model.init_from: missing, expected the run folder or checkpoint of the policy to start from"


def decay_of_rollouts_has_an_end(cfg: RLConfig) -> str | None:
    optimizer = cfg.optimizer
    if optimizer.lr_decay_style == "constant" or optimizer.lr_decay_tokens is not None:
        return None
    return (
        f"optimizer.lr_decay_tokens: missing, expected the tokens over which lr_decay_style {optimizer.lr_decay_style} goes "
        "down: how many tokens rollouts will have is not known beforehand"
    )


def rollouts_fit_into_a_row(cfg: RLConfig) -> str | None:
    longest, got = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens, cfg.data.seq_length
    if longest <= got:
        return None
    return (
        f"data.seq_length: got {got}, expected at least {longest}: data.max_prompt_tokens ({cfg.data.max_prompt_tokens}) + "
        f"rollout.max_new_tokens ({cfg.rollout.max_new_tokens}), as no rollout is cut"
    )


def server_settings_are_used(cfg: RLConfig) -> str | None:
    other = {"embedded": ("url", "weights_dir"), "server": ("max_batch",)}[cfg.rollout.engine]
    for name in other:
        got = getattr(cfg.rollout, name)
        if got != RolloutConfig.model_fields[name].default:
            return f"rollout.{name}: got {got!r}, which has no effect with rollout.engine {cfg.rollout.engine}; remove it"
    return None


def server_is_known(cfg: RLConfig) -> str | None:
    if cfg.rollout.engine != "server":
        return None
    for name, example in (("url", "http://localhost:8000"), ("weights_dir", "a folder that both can read")):
        if getattr(cfg.rollout, name) is None:
            return f"rollout.{name}: missing with rollout.engine server, expected {example}"
    return None


def updates_divide_the_prompts(cfg: RLConfig) -> str | None:
    prompts, updates = cfg.rollout.prompts_per_step, cfg.objective.updates_per_rollout
    if prompts % updates == 0:
        return None
    return f"objective.updates_per_rollout: got {updates}, expected a divisor of rollout.prompts_per_step ({prompts})"


def kl_settings_are_used(cfg: RLConfig) -> str | None:
    if cfg.objective.kl_coef > 0.0:
        return None
    for name in ("kl_in", "kl_estimator", "reference_reset_steps"):
        got = getattr(cfg.objective, name)
        if got != PolicyConfig.model_fields[name].default:
            return f"objective.{name}: got {got!r}, which has no effect with objective.kl_coef 0"
    return None


def overlong_buffer_is_used(cfg: RLConfig) -> str | None:
    got, overlong = cfg.objective.overlong_buffer_tokens, cfg.objective.overlong
    if got == 0 or overlong == "penalty":
        return None
    return f"objective.overlong_buffer_tokens: got {got}, which has no effect with objective.overlong {overlong}"


def overlong_buffer_fits(cfg: RLConfig) -> str | None:
    got, limit = cfg.objective.overlong_buffer_tokens, cfg.rollout.max_new_tokens
    if got <= limit:
        return None
    return f"objective.overlong_buffer_tokens: got {got}, expected at most rollout.max_new_tokens ({limit})"


def format_has_a_pattern(cfg: RLConfig) -> str | None:
    for index, each in enumerate(cfg.verifiers):
        if (each.kind == "format") != (each.pattern is not None):
            wanted = (
                "missing, expected a regular expression"
                if each.pattern is None
                else f"got {each.pattern!r}, which has no effect"
            )
            return f"verifiers.{index}.pattern: {wanted} with kind {each.kind}"
    return None


def rollouts_are_not_interleaved(cfg: RLConfig) -> str | None:
    got = cfg.parallel.virtual_pipeline_model_parallel_size
    if got is None:
        return None
    return f"parallel.virtual_pipeline_model_parallel_size: got {got}, which rollouts cannot be trained with; remove it"


def embedded_engine_has_whole_models(cfg: RLConfig) -> str | None:
    if cfg.rollout.engine != "embedded":
        return None
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        got = getattr(cfg.parallel, name)
        if got > 1:
            return f"parallel.{name}: got {got}, expected 1 with rollout.engine embedded; use rollout.engine=server"
    return None


def rollouts_have_no_budget(cfg: RLConfig) -> str | None:
    if cfg.stream.memory_budget_gb is None:
        return None
    return "stream.memory_budget_gb: not known for rollouts in this version; set stream.chunk_tokens instead"


def mcore_model_keys_are_not_ours(cfg: TrainingConfig) -> str | None:
    return _declared_twice("model", cfg.model.mcore)


def mcore_optimizer_keys_are_not_ours(cfg: TrainingConfig) -> str | None:
    return _declared_twice("optimizer", cfg.optimizer.mcore)


LAYOUT_RULES: tuple[Rule, ...] = (
    sequence_parallel_has_tensor_parallel,
    sequence_parallel_divides_the_tokens,
    context_parallel_divides_the_tokens,
    context_parallel_divides_the_evaluation,
    pipeline_divides_the_layers,
    interleaving_has_a_pipeline,
    expert_parallel_has_experts,
    experts_with_tensor_parallel_have_sequence_parallel,
    param_gather_has_a_distributed_optimizer,
)

TRAINING_RULES: tuple[Rule, ...] = (
    preset_exists,
    sequence_fits_the_preset,
    rotary_settings_have_rotary_angles,
    activation_is_known,
    min_lr_is_below_lr,
    warmup_ends_before_decay,
    constant_has_no_decay,
    wsd_has_a_decay,
    wsd_fits,
    wsd_tokens_need_wsd,
    wsd_style_needs_wsd,
    held_out_names_are_plain,
    evaluation_has_corpora,
    kept_checkpoints_are_saved,
    *LAYOUT_RULES,
    hangs_are_seen_before_collectives_give_up,
    streaming_owns_recomputation,
    streaming_settings_are_used,
    chunks_have_one_origin,
    chunks_divide_among_sequence_parallel_ranks,
    mcore_model_keys_are_not_ours,
    mcore_optimizer_keys_are_not_ours,
)

LANGUAGE_MODEL_RULES: tuple[Rule, ...] = (
    *TRAINING_RULES,
    global_batch_is_whole_micro_batches,
    top_fraction_has_a_scorer,
    scorer_is_used,
    fraction_is_used,
    scope_is_used,
    second_set_is_used,
    second_set_has_another_scorer,
    combine_has_two_sets,
    kept_share_is_known_to_the_routers,
    reference_is_used,
    profiled_steps_are_trained,
    profile_settings_are_used,
    spikes_are_looked_for,
    rollbacks_are_made,
    rollback_has_checkpoints,
)

RULES: Mapping[type[TrainingConfig], tuple[Rule, ...]] = {
    PretrainConfig: (
        *LANGUAGE_MODEL_RULES,
        reference_losses_have_one_origin,
        streams_are_known,
        held_out_streams_are_read,
        split_has_a_reference,
    ),
    SftConfig: (
        *LANGUAGE_MODEL_RULES,
        answers_start_from_weights,
        answers_are_kept_apart,
        answers_have_an_online_reference,
        answers_are_not_split,
    ),
    RLConfig: (
        *TRAINING_RULES,
        policy_starts_from_weights,
        decay_of_rollouts_has_an_end,
        rollouts_fit_into_a_row,
        server_settings_are_used,
        server_is_known,
        updates_divide_the_prompts,
        kl_settings_are_used,
        overlong_buffer_is_used,
        overlong_buffer_fits,
        format_has_a_pattern,
        rollouts_are_not_interleaved,
        embedded_engine_has_whole_models,
        rollouts_have_no_budget,
    ),
}
"""Which rules a configuration has to keep."""


def problems(cfg: TrainingConfig, *, world_size: int | None = None, partial: bool = False) -> list[str]:
    """Run every rule.

    Args:
        cfg: the configuration.
        world_size: number of ranks, when known.
        partial: `cfg` lacks the values that could not be parsed; a rule that needs one of those has nothing to say.
    """
    rules = list(RULES[type(cfg)])
    if world_size is not None:
        rules.append(lambda each: _layout_fits_the_world(each, world_size))
        if isinstance(cfg, LanguageModelConfig):
            rules.append(lambda each: _batch_fits_the_world(each, world_size))
            rules.append(lambda each: _profiled_ranks_exist(each, world_size))
        if isinstance(cfg, RLConfig):
            rules.append(lambda each: _prompts_fit_the_world(each, world_size))
    found = []
    for rule in rules:
        try:
            message = rule(cfg)
        except AttributeError:
            if not partial:
                raise
            continue
        if message is not None:
            found.append(message)
    return found


def layout_problems(cfg: TrainingConfig) -> list[str]:
    """Run the rules about how a model and its micro-batches are divided over ranks."""
    return [message for rule in LAYOUT_RULES if (message := rule(cfg)) is not None]


def check(cfg: TrainingConfig, *, world_size: int | None = None) -> None:
    """Raise one ConfigError with everything `problems` finds; for configurations that were built in Python."""
    found = problems(cfg, world_size=world_size)
    if found:
        raise ConfigError("\n  ".join([f"{len(found)} mistakes in the configuration", *found]))


def layout_mistakes(cfg: ParallelConfig, world_size: int) -> list[str]:
    """Why `world_size` ranks cannot be divided this way, with the whole product; empty when they can."""
    tp, pp, cp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, cfg.context_parallel_size
    ep, etp = cfg.expert_model_parallel_size, cfg.expert_tensor_parallel_size or tp
    mistakes = []
    if world_size % (tp * pp * cp):
        key = next(name for name, size in (("tensor", tp), ("pipeline", pp), ("context", cp)) if size > 1)
        name = "context_parallel_size" if key == "context" else f"{key}_model_parallel_size"
        mistakes.append(
            f"parallel.{name}: tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp} ranks hold one copy of the model, "
            f"got a world of {world_size} ranks; world = tensor x pipeline x context x data, so it must be a multiple of "
            f"{tp * pp * cp}"
        )
    elif world_size % (etp * ep * pp):
        mistakes.append(
            f"parallel.expert_model_parallel_size: expert tensor {etp} x expert {ep} x pipeline {pp} = {etp * ep * pp} ranks "
            f"hold one copy of the experts, got a world of {world_size} ranks; world = expert tensor x expert x pipeline x "
            f"expert data, so it must be a multiple of {etp * ep * pp}"
        )
    return mistakes


def _layout_fits_the_world(cfg: TrainingConfig, world_size: int) -> str | None:
    return next(iter(layout_mistakes(cfg.parallel, world_size)), None)


def _ranks_of_a_copy(cfg: ParallelConfig) -> int:
    return cfg.tensor_model_parallel_size * cfg.pipeline_model_parallel_size * cfg.context_parallel_size


def _prompts_fit_the_world(cfg: RLConfig, world_size: int) -> str | None:
    dp, prompts, updates = (
        world_size // _ranks_of_a_copy(cfg.parallel),
        cfg.rollout.prompts_per_step,
        cfg.objective.updates_per_rollout,
    )
    if dp == 0 or prompts % (dp * updates) == 0 or prompts % updates:
        return None
    return (
        f"rollout.prompts_per_step: got {prompts}, expected a multiple of {dp * updates}: data-parallel size ({dp}) x "
        f"objective.updates_per_rollout ({updates})"
    )


def _batch_fits_the_world(cfg: LanguageModelConfig, world_size: int) -> str | None:
    parallel = cfg.parallel
    if layout_mistakes(parallel, world_size):
        return None  # has its own rule
    pp, ranks = parallel.pipeline_model_parallel_size, _ranks_of_a_copy(parallel)
    dp, micro, total = world_size // ranks, cfg.batch.micro_batch_size, cfg.batch.global_batch_size
    if total % micro:
        return None  # has its own rule
    if total % (micro * dp):
        return (
            f"batch.global_batch_size: got {total}, expected a multiple of {micro * dp}: batch.micro_batch_size ({micro}) x "
            f"data-parallel size ({dp} = {world_size} ranks / {ranks} that hold one copy of the model)"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None and total // (micro * dp) % pp:
        return (
            f"batch.global_batch_size: {total // (micro * dp)} micro-batches per step and data-parallel rank, expected a "
            f"multiple of parallel.pipeline_model_parallel_size ({pp}), which the interleaved schedule needs"
        )
    return None


def _profiled_ranks_exist(cfg: LanguageModelConfig, world_size: int) -> str | None:
    missing = [rank for rank in cfg.profile.ranks if rank >= world_size]
    if not missing:
        return None
    return f"profile.ranks: got {missing[0]}, expected ranks from 0 to {world_size - 1}, those of the run"


def _decay_end(cfg: TrainingConfig) -> tuple[int, str] | None:
    """Where the learning rate has come down, and which key says so; None where nothing does."""
    if cfg.optimizer.lr_decay_tokens is not None:
        return cfg.optimizer.lr_decay_tokens, "optimizer.lr_decay_tokens"
    return (cfg.train.train_tokens, "train.train_tokens") if isinstance(cfg.train, TrainConfig) else None


def _only_with_wsd(cfg: TrainingConfig, name: str) -> str | None:
    got, default = getattr(cfg.optimizer, name), OptimizerConfig.model_fields[name].default
    if got == default or cfg.optimizer.lr_decay_style == "WSD":
        return None
    return f"optimizer.{name}: got {got!r}, which has no effect with optimizer.lr_decay_style {cfg.optimizer.lr_decay_style}"


def _only_with_top_fraction(cfg: LanguageModelConfig, name: str) -> str | None:
    got, default = getattr(cfg.objective, name), ObjectiveConfig.model_fields[name].default
    if got == default or cfg.objective.weighting == "top_fraction":
        return None
    return (
        f"objective.{name}: got {got!r}, which has no effect with objective.weighting {cfg.objective.weighting}; "
        f"set objective.weighting=top_fraction or remove it"
    )


def _scorers(cfg: ObjectiveConfig) -> dict[str, str]:
    """Key -> scorer."""
    second = {} if cfg.second is None else {"objective.second.scorer": cfg.second.scorer}
    return {"objective.scorer": cfg.scorer, **second}


def _stream_has_one_origin(cfg: PretrainConfig, key: str, scorer: str) -> str | None:
    stream = STREAM_OF_SCORER.get(scorer)
    if stream is None:
        return None
    without = [index for index, source in enumerate(cfg.data.train) if stream not in source.streams]
    if cfg.objective.reference is None and without:
        index = without[0]
        return (
            f"data.train.{index}.streams: no {stream}, which {key} {scorer} reads; "
            f"write it with `megarpt score` and name it here, or set objective.reference.checkpoint"
        )
    if cfg.objective.reference is not None and len(without) < len(cfg.data.train):
        index = next(index for index in range(len(cfg.data.train)) if index not in without)
        return (
            f"data.train.{index}.streams.{stream}: given together with objective.reference, so one of them has no effect; "
            "keep one"
        )
    return None


def _declared_twice(section: str, block: dict[str, object]) -> str | None:
    found = [
        f"{section}.mcore.{name}: cannot be set here; {instead}"
        for name, instead in SET_BY_MEGARPT[section].items()
        if name in block
    ]
    return "\n  ".join(found) or None
