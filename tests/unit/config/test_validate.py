import copy

import pytest

from megarpt.config import validate
from megarpt.config.schema import PretrainConfig, RLConfig, SftConfig
from megarpt.errors import ConfigError

STREAMS = {"data.train": [{"path": "a", "streams": {"ref_nll": "a_ref"}}]}
RHO1 = {"objective.scorer": "excess_loss", "objective.weighting": "top_fraction", "objective.fraction": 0.6}
HELD_OUT = {"data.valid": {"h": {"path": "h", "streams": {"ref_nll": "h_ref"}}}}
EXPERTS = {"model.preset": "tiny-moe"}
WSD = {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_tokens": 100}
SPIKES = {"stability.spike_threshold": 6.0}
REFERENCE = {"objective.reference": {"checkpoint": "runs/ref"}}
SECOND = {"objective.second": {"scorer": "reference_entropy", "fraction": 0.7}}
BOTH_STREAMS = {"data.train": [{"path": "a", "streams": {"ref_nll": "a_ref", "ref_entropy": "a_entropy"}}]}


def make(**values):
    """A small valid configuration with some keys replaced."""
    tree = {
        "run": {"dir": "runs/x"},
        "data": {"tokenizer": "bytes", "train": [{"path": "a"}], "seq_length": 16},
        "train": {"train_tokens": 1000},
    }
    for key, value in values.items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return PretrainConfig.model_validate(tree)


# rule -> values that break it, and the key its message must begin with
BREAKS = [
    (validate.global_batch_is_whole_micro_batches, {"batch.global_batch_size": 12}, "batch.global_batch_size"),
    (validate.min_lr_is_below_lr, {"optimizer.lr": 1e-5}, "optimizer.min_lr"),
    (validate.warmup_ends_before_decay, {"optimizer.lr_warmup_tokens": 1000}, "optimizer.lr_warmup_tokens"),
    (
        validate.warmup_ends_before_decay,
        {"optimizer.lr_warmup_tokens": 500, "optimizer.lr_decay_tokens": 500},
        "optimizer.lr_warmup_tokens",
    ),
    (
        validate.constant_has_no_decay,
        {"optimizer.lr_decay_style": "constant", "optimizer.lr_decay_tokens": 10},
        "optimizer.lr_decay_tokens",
    ),
    (validate.wsd_has_a_decay, {"optimizer.lr_decay_style": "WSD"}, "optimizer.lr_wsd_decay_tokens"),
    (
        validate.wsd_fits,
        {**WSD, "optimizer.lr_wsd_decay_tokens": 901, "optimizer.lr_warmup_tokens": 100},
        "optimizer.lr_wsd_decay_tokens",
    ),
    (validate.wsd_tokens_need_wsd, {"optimizer.lr_wsd_decay_tokens": 5}, "optimizer.lr_wsd_decay_tokens"),
    (validate.wsd_style_needs_wsd, {"optimizer.lr_wsd_decay_style": "cosine"}, "optimizer.lr_wsd_decay_style"),
    (validate.top_fraction_has_a_scorer, {"objective.weighting": "top_fraction"}, "objective.scorer"),
    (validate.scorer_is_used, {"objective.scorer": "loss"}, "objective.scorer"),
    (validate.fraction_is_used, {"objective.fraction": 0.5}, "objective.fraction"),
    (validate.scope_is_used, {"objective.scope": "sequence"}, "objective.scope"),
    (validate.scope_is_used, {"objective.scope": "lagged_global_batch"}, "objective.scope"),
    (validate.second_set_is_used, SECOND, "objective.second"),
    (
        validate.second_set_has_another_scorer,
        {**RHO1, **STREAMS, "objective.second": {"scorer": "excess_loss", "fraction": 0.7}},
        "objective.second.scorer",
    ),
    (validate.combine_has_two_sets, {**RHO1, **STREAMS, "objective.combine": "union"}, "objective.combine"),
    (validate.kept_share_is_known_to_the_routers, {**RHO1, **SECOND, **BOTH_STREAMS, **EXPERTS}, "objective.second"),
    (validate.reference_losses_have_one_origin, {**RHO1, **SECOND, **STREAMS}, "data.train.0.streams"),
    (validate.reference_losses_have_one_origin, {**RHO1, **SECOND}, "data.train.0.streams"),
    (
        validate.reference_losses_have_one_origin,
        {**RHO1, **SECOND, **REFERENCE, "data.train": [{"path": "a", "streams": {"ref_entropy": "x"}}]},
        "data.train.0.streams.ref_entropy",
    ),
    (validate.reference_is_used, REFERENCE, "objective.reference"),
    (validate.reference_is_used, {**RHO1, "objective.scorer": "loss", **REFERENCE}, "objective.reference"),
    (validate.reference_losses_have_one_origin, RHO1, "data.train.0.streams"),
    (
        validate.reference_losses_have_one_origin,
        {**RHO1, "data.train": [*STREAMS["data.train"], {"path": "b"}]},
        "data.train.1.streams",
    ),
    (
        validate.reference_losses_have_one_origin,
        {**RHO1, **STREAMS, "objective.scorer": "reference_entropy"},
        "data.train.0.streams",
    ),
    (validate.reference_losses_have_one_origin, {**RHO1, **STREAMS, **REFERENCE}, "data.train.0.streams.ref_nll"),
    (validate.streams_are_known, {"data.train": [{"path": "a", "streams": {"ref_nnl": "x"}}]}, "data.train.0.streams.ref_nnl"),
    (validate.streams_are_known, {"data.valid": {"h": {"path": "h", "streams": {"nll": "x"}}}}, "data.valid.h.streams.nll"),
    (validate.held_out_streams_are_read, HELD_OUT, "data.valid.h.streams.ref_nll"),
    (
        validate.held_out_streams_are_read,
        {**HELD_OUT, "evaluation.split_fraction": 0.5, "objective.scorer": "reference_entropy"},
        "data.valid.h.streams.ref_nll",
    ),
    (validate.held_out_streams_are_read, {**HELD_OUT, **RHO1, **REFERENCE}, "data.valid.h.streams.ref_nll"),
    (
        validate.split_has_a_reference,
        {"data.valid": {"h": "h"}, "evaluation.split_fraction": 0.5},
        "evaluation.split_fraction",
    ),
    (validate.evaluation_has_corpora, {"evaluation.split_fraction": 0.5}, "evaluation.split_fraction"),
    (validate.held_out_names_are_plain, {"data.valid": {"a/b": "x"}}, "data.valid.a/b"),
    (validate.evaluation_has_corpora, {"evaluation.interval_steps": 5}, "evaluation.interval_steps"),
    (validate.evaluation_has_corpora, {"evaluation.max_tokens": 5}, "evaluation.max_tokens"),
    (validate.evaluation_has_corpora, {"evaluation.micro_batch_size": 5}, "evaluation.micro_batch_size"),
    (validate.kept_checkpoints_are_saved, {"checkpoint.keep_every_steps": 5}, "checkpoint.keep_every_steps"),
    (
        validate.kept_checkpoints_are_saved,
        {"checkpoint.keep_every_steps": 5, "checkpoint.interval_steps": 2},
        "checkpoint.keep_every_steps",
    ),
    (validate.sequence_parallel_has_tensor_parallel, {"parallel.sequence_parallel": True}, "parallel.sequence_parallel"),
    (
        validate.sequence_parallel_divides_the_tokens,
        {"parallel.sequence_parallel": True, "parallel.tensor_model_parallel_size": 3},
        "parallel.sequence_parallel",
    ),
    (
        validate.sequence_parallel_divides_the_tokens,
        {
            "parallel.sequence_parallel": True,
            "parallel.tensor_model_parallel_size": 2,
            "parallel.context_parallel_size": 3,
        },
        "parallel.sequence_parallel",
    ),
    (
        validate.context_parallel_divides_the_tokens,
        {"parallel.context_parallel_size": 3},
        "parallel.context_parallel_size",
    ),
    (
        validate.context_parallel_divides_the_evaluation,
        {"parallel.context_parallel_size": 2, "data.seq_length": 30, "evaluation.micro_batch_size": 1},
        "evaluation.micro_batch_size",
    ),
    (
        validate.pipeline_divides_the_layers,
        {"parallel.pipeline_model_parallel_size": 3},
        "parallel.pipeline_model_parallel_size",
    ),
    (
        validate.pipeline_divides_the_layers,
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 4},
        "parallel.virtual_pipeline_model_parallel_size",
    ),
    (
        validate.interleaving_has_a_pipeline,
        {"parallel.virtual_pipeline_model_parallel_size": 2},
        "parallel.virtual_pipeline_model_parallel_size",
    ),
    (validate.expert_parallel_has_experts, {"parallel.expert_model_parallel_size": 2}, "parallel.expert_model_parallel_size"),
    (validate.expert_parallel_has_experts, {"parallel.expert_tensor_parallel_size": 2}, "parallel.expert_tensor_parallel_size"),
    (
        validate.expert_parallel_has_experts,
        {"model.preset": "tiny-moe", "parallel.expert_model_parallel_size": 3},
        "parallel.expert_model_parallel_size",
    ),
    (
        validate.experts_with_tensor_parallel_have_sequence_parallel,
        {"model.preset": "tiny-moe", "parallel.tensor_model_parallel_size": 2},
        "parallel.sequence_parallel",
    ),
    (
        validate.param_gather_has_a_distributed_optimizer,
        {"parallel.overlap_param_gather": True},
        "parallel.overlap_param_gather",
    ),
    (
        validate.param_gather_has_a_distributed_optimizer,
        {"parallel.overlap_param_gather": True, "parallel.use_distributed_optimizer": True},
        "parallel.overlap_param_gather",
    ),
    (validate.mcore_model_keys_are_not_ours, {"model.mcore": {"batch_p2p_comm": True}}, "model.mcore.batch_p2p_comm"),
    (validate.mcore_model_keys_are_not_ours, {"model.mcore": {"overlap_p2p_comm": True}}, "model.mcore.overlap_p2p_comm"),
    (validate.profiled_steps_are_trained, {"profile.steps": [3, 2]}, "profile.steps"),
    (validate.profiled_steps_are_trained, {"profile.steps": [1, 2]}, "profile.steps"),
    (validate.profiled_steps_are_trained, {"profile.steps": [2, 9]}, "profile.steps"),  # 1000 tokens are 8 steps
    (validate.profile_settings_are_used, {"profile.ranks": [1]}, "profile.ranks"),
    (validate.profile_settings_are_used, {"profile.record": ["shapes"]}, "profile.record"),
    (validate.spikes_are_looked_for, {"stability.on_spike": "skip"}, "stability.on_spike"),
    (validate.spikes_are_looked_for, {"stability.spike_window_steps": 64}, "stability.spike_window_steps"),
    (validate.rollbacks_are_made, {**SPIKES, "stability.max_rollbacks": 1}, "stability.max_rollbacks"),
    (validate.rollback_has_checkpoints, {**SPIKES, "stability.on_spike": "rollback"}, "stability.on_spike"),
    (
        validate.hangs_are_seen_before_collectives_give_up,
        {"faults.hang_timeout_minutes": 30.0},
        "faults.hang_timeout_minutes",
    ),
    (validate.preset_exists, {"model.preset": "llama"}, "model.preset"),
    (validate.sequence_fits_the_preset, {"data.seq_length": 1 << 20}, "data.seq_length"),
    (
        validate.sequence_fits_the_preset,
        {"model.gpt": {"max_sequence_length": 32}, "data.seq_length": 64},
        "data.seq_length",
    ),
    (
        validate.rotary_settings_have_rotary_angles,
        {"model": {"preset": "gpt2-124m", "gpt": {"rotary_base": 5e5}}},
        "model.gpt.rotary_base",
    ),
    (validate.activation_is_known, {"model.mcore": {"activation": "relu6"}}, "model.mcore.activation"),
    (
        validate.streaming_owns_recomputation,
        {"stream.layers": True, "model.mcore": {"recompute_granularity": "full"}},
        "model.mcore.recompute_granularity",
    ),
    (validate.streaming_settings_are_used, {"stream.chunk_tokens": 128}, "stream.chunk_tokens"),
    (validate.streaming_settings_are_used, {"stream.memory_budget_gb": 60.0}, "stream.memory_budget_gb"),
    (
        validate.chunks_have_one_origin,
        {"stream.layers": True, "stream.chunk_tokens": 128, "stream.memory_budget_gb": 60.0},
        "stream.chunk_tokens",
    ),
    (
        validate.chunks_divide_among_sequence_parallel_ranks,
        {
            "stream.layers": True,
            "stream.chunk_tokens": 1,
            "parallel.tensor_model_parallel_size": 2,
            "parallel.sequence_parallel": True,
        },
        "stream.chunk_tokens",
    ),
    (validate.mcore_model_keys_are_not_ours, {"model.mcore": {"bf16": True}}, "model.mcore.bf16"),
    (validate.mcore_optimizer_keys_are_not_ours, {"optimizer.mcore": {"lr": 1.0}}, "optimizer.mcore.lr"),
]


@pytest.mark.parametrize(
    ("rule", "values", "key"), BREAKS, ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(BREAKS)]
)
def test_every_rule_fires(rule, values, key):
    message = rule(make(**values))
    assert message is not None and message.startswith(f"{key}: ")
    assert message in validate.problems(make(**values))


def test_no_rule_is_without_a_test_that_breaks_it():
    assert set(validate.RULES[PretrainConfig]) == {rule for rule, _, _ in BREAKS}


ANSWERS = {
    "run": {"dir": "runs/x"},
    "model": {"init_from": "runs/start"},
    "data": {"tokenizer": "bytes", "train": [{"path": "a"}]},
    "train": {"train_tokens": 1000},
}
ROLLOUTS = {
    "run": {"dir": "runs/x"},
    "model": {"init_from": "runs/start"},
    "data": {"tokenizer": "bytes", "train": "prompts.jsonl", "seq_length": 96, "max_prompt_tokens": 32},
    "rollout": {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 64},
    "verifiers": [{"kind": "next_token"}],
    "train": {"train_steps": 3},
}


def changed(kind, values):
    """A valid configuration of another command, with some keys replaced; None removes one."""
    tree = copy.deepcopy({SftConfig: ANSWERS, RLConfig: ROLLOUTS}[kind])
    for key, value in values.items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return kind.model_validate(tree)


SERVER = {"rollout.engine": "server", "rollout.url": "http://localhost:8000", "rollout.weights_dir": "weights"}
OTHER_BREAKS = [
    (SftConfig, validate.answers_start_from_weights, {"model.init_from": None}, "model.init_from"),
    (SftConfig, validate.answers_are_kept_apart, {"data.separate_documents": False}, "data.separate_documents"),
    (SftConfig, validate.answers_have_an_online_reference, {**RHO1}, "objective.reference"),
    (SftConfig, validate.answers_are_not_split, {"evaluation.split_fraction": 0.5}, "evaluation.split_fraction"),
    (RLConfig, validate.policy_starts_from_weights, {"model.init_from": None}, "model.init_from"),
    (RLConfig, validate.decay_of_rollouts_has_an_end, {"optimizer.lr_decay_style": "cosine"}, "optimizer.lr_decay_tokens"),
    (RLConfig, validate.rollouts_fit_into_a_row, {"data.seq_length": 95}, "data.seq_length"),
    (RLConfig, validate.server_settings_are_used, {"rollout.url": "http://localhost:8000"}, "rollout.url"),
    (RLConfig, validate.server_settings_are_used, {**SERVER, "rollout.max_batch": 8}, "rollout.max_batch"),
    (RLConfig, validate.server_is_known, {**SERVER, "rollout.url": None}, "rollout.url"),
    (RLConfig, validate.server_is_known, {**SERVER, "rollout.weights_dir": None}, "rollout.weights_dir"),
    (RLConfig, validate.updates_divide_the_prompts, {"objective.updates_per_rollout": 3}, "objective.updates_per_rollout"),
    (RLConfig, validate.kl_settings_are_used, {"objective.kl_in": "reward"}, "objective.kl_in"),
    (RLConfig, validate.kl_settings_are_used, {"objective.reference_reset_steps": 5}, "objective.reference_reset_steps"),
    (RLConfig, validate.overlong_buffer_is_used, {"objective.overlong_buffer_tokens": 5}, "objective.overlong_buffer_tokens"),
    (
        RLConfig,
        validate.overlong_buffer_fits,
        {"objective.overlong": "penalty", "objective.overlong_buffer_tokens": 65},
        "objective.overlong_buffer_tokens",
    ),
    (
        RLConfig,
        validate.rollouts_are_not_interleaved,
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2},
        "parallel.virtual_pipeline_model_parallel_size",
    ),
    (
        RLConfig,
        validate.embedded_engine_has_whole_models,
        {"parallel.pipeline_model_parallel_size": 2},
        "parallel.pipeline_model_parallel_size",
    ),
    (RLConfig, validate.format_has_a_pattern, {"verifiers": [{"kind": "format"}]}, "verifiers.0.pattern"),
    (RLConfig, validate.format_has_a_pattern, {"verifiers": [{"kind": "exact", "pattern": "a"}]}, "verifiers.0.pattern"),
    (
        RLConfig,
        validate.rollouts_have_no_budget,
        {"stream.layers": True, "stream.memory_budget_gb": 10.0},
        "stream.memory_budget_gb",
    ),
]


@pytest.mark.parametrize(("kind", "rule", "values", "key"), OTHER_BREAKS)
def test_rules_of_the_other_commands_fire(kind, rule, values, key):
    message = rule(changed(kind, values))
    assert message is not None and message.startswith(key + ":")
    assert message in validate.problems(changed(kind, values))


@pytest.mark.parametrize("kind", [SftConfig, RLConfig])
def test_no_rule_of_the_other_commands_is_without_a_test_that_breaks_it(kind):
    broken = {rule for each, rule, _, _ in OTHER_BREAKS if each is kind} | {rule for rule, _, _ in BREAKS}
    assert set(validate.RULES[kind]) <= broken


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (SftConfig, {}),
        (SftConfig, {**RHO1, **REFERENCE}),
        (RLConfig, {}),
        (RLConfig, SERVER),
        (RLConfig, {"objective.kl_coef": 0.1, "objective.kl_in": "reward", "objective.reference_reset_steps": 5}),
        (RLConfig, {"objective.overlong": "penalty", "objective.overlong_buffer_tokens": 64}),
        (RLConfig, {"optimizer.lr_decay_style": "cosine", "optimizer.lr_decay_tokens": 1000}),
        (RLConfig, {"verifiers": [{"kind": "format", "pattern": "a+"}, {"kind": "exact", "weight": 2.0}]}),
    ],
)
def test_sound_configurations_of_the_other_commands_pass(kind, values):
    assert validate.problems(changed(kind, values)) == []


@pytest.mark.parametrize(
    ("prompts", "updates", "is_fine"), [(4, 1, True), (4, 2, True), (6, 1, True), (6, 2, False), (3, 1, False)]
)
def test_prompts_divide_over_the_ranks(prompts, updates, is_fine):
    cfg = changed(RLConfig, {"rollout.prompts_per_step": prompts, "objective.updates_per_rollout": updates})
    found = validate.problems(cfg, world_size=2)
    assert (found == []) is is_fine
    assert is_fine or found[-1].startswith("rollout.prompts_per_step:")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**RHO1, **STREAMS},
        {**RHO1, **REFERENCE},
        {**RHO1, **STREAMS, "objective.scorer": "random"},  # an ablation keeps its data section
        {**RHO1, **STREAMS, "objective.fraction": 1.0},
        {**RHO1, "objective.scorer": "loss", "objective.scope": "sequence"},
        {**RHO1, **STREAMS, "objective.scope": "rank"},
        {**RHO1, **STREAMS, "objective.scope": "lagged_global_batch"},
        {**RHO1, **SECOND, **BOTH_STREAMS, "objective.combine": "union"},
        {**RHO1, **SECOND, **REFERENCE},
        {**RHO1, **SECOND, **REFERENCE, "objective.scorer": "loss"},  # of the two sets one needs the reference
        {**RHO1, **SECOND, **BOTH_STREAMS, **EXPERTS, "model.mcore": {"moe_aux_loss_coeff": 0.0}},
        {**WSD, "optimizer.lr_wsd_decay_style": "minus_sqrt"},
        {**WSD, "optimizer.lr_wsd_decay_tokens": 900, "optimizer.lr_warmup_tokens": 100},
        {"optimizer.lr_decay_tokens": 500},
        {"optimizer.lr_decay_style": "constant"},
        {"parallel.sequence_parallel": True, "parallel.tensor_model_parallel_size": 2},
        {"checkpoint.keep_every_steps": 6, "checkpoint.interval_steps": 2},
        {**SPIKES, "stability.spike_window_steps": 64},
        {**SPIKES, "stability.on_spike": "rollback", "stability.max_rollbacks": 1, "checkpoint.interval_steps": 5},
        {"faults.hang_timeout_minutes": 0.0},
        {"stream.layers": True, "stream.memory_budget_gb": 60.0},
        {"stream.layers": True, "stream.chunk_tokens": 1, "parallel.tensor_model_parallel_size": 2},
        {"data.valid": {"clean-docs_2": "x"}, "evaluation.interval_steps": 5},
        {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2},
        {"parallel.pipeline_model_parallel_size": 3, "model.mcore": {"num_layers_in_last_pipeline_stage": 2}},
        {"parallel.context_parallel_size": 4},
        {"model.preset": "tiny-moe", "parallel.expert_model_parallel_size": 4},
        {
            "parallel.use_distributed_optimizer": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.overlap_param_gather": True,
        },
        {"model.mcore": {"num_layers": 2}, "optimizer.mcore": {"log_num_zeros_in_grad": False}},
        {"profile.steps": [7, 8], "profile.ranks": [0, 1], "profile.record": ["shapes", "stacks"]},
    ],
    ids=str,
)
def test_what_is_right_passes(values):
    assert validate.problems(make(**values)) == []


def test_only_ranks_that_exist_are_profiled():
    cfg = make(**{"profile.steps": [2, 3], "profile.ranks": [0, 4], "batch.micro_batch_size": 1})
    assert validate.problems(cfg) == [] and validate.problems(cfg, world_size=8) == []
    (message,) = validate.problems(cfg, world_size=4)
    assert message.startswith("profile.ranks: got 4, expected ranks from 0 to 3")


def test_all_rules_report_not_only_the_first():
    found = validate.problems(
        make(**{"batch.global_batch_size": 12, "optimizer.lr": 1e-5, "optimizer.mcore": {"use_distributed_optimizer": True}})
    )
    assert len(found) == 3


def test_check_raises_one_error_with_everything():
    validate.check(make())
    with pytest.raises(ConfigError, match=r"(?s)2 mistakes.*optimizer\.min_lr.*batch\.global_batch_size"):
        validate.check(make(**{"batch.global_batch_size": 12, "optimizer.lr": 1e-5}))


@pytest.mark.parametrize(
    ("values", "world_size", "words"),
    [
        ({"parallel.tensor_model_parallel_size": 2}, 3, ["tensor 2 x pipeline 1 x context 1 = 2 ranks", "a world of 3"]),
        (
            {
                "parallel.tensor_model_parallel_size": 2,
                "parallel.pipeline_model_parallel_size": 2,
                "parallel.context_parallel_size": 2,
            },
            12,
            ["tensor 2 x pipeline 2 x context 2 = 8 ranks", "multiple of 8"],
        ),
        (
            {"model.preset": "tiny-moe", "parallel.expert_model_parallel_size": 4},
            6,
            ["expert tensor 1 x expert 4 x pipeline 1 = 4 ranks", "a world of 6", "expert data"],
        ),
        (
            {"batch.global_batch_size": 8, "parallel.pipeline_model_parallel_size": 2},
            6,
            ["multiple of 24", "data-parallel size (3"],
        ),
        (
            {
                "batch.global_batch_size": 24,
                "parallel.pipeline_model_parallel_size": 2,
                "parallel.virtual_pipeline_model_parallel_size": 2,
            },
            2,
            ["3 micro-batches per step", "multiple of parallel.pipeline_model_parallel_size (2)"],
        ),
    ],
)
def test_an_impossible_world_is_explained_with_the_whole_product(values, world_size, words):
    found = validate.problems(make(**values), world_size=world_size)
    assert len(found) == 1
    assert all(word in found[0] for word in words), found[0]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({}, None),
        (RHO1, ("excess_loss", 0.6)),
        ({**RHO1, "objective.scorer": "reference_loss"}, ("reference_loss", 0.6)),
        ({**RHO1, "objective.fraction": 1.0}, None),
        ({**RHO1, "evaluation.split_fraction": 0.5}, ("excess_loss", 0.5)),
        ({**RHO1, "objective.scorer": "random"}, ("excess_loss", 0.6)),  # a control is split as what it controls
        ({"evaluation.split_fraction": 0.5}, ("excess_loss", 0.5)),
        ({**RHO1, "objective.scope": "lagged_global_batch"}, ("excess_loss", 0.6)),
    ],
)
def test_held_out_tokens_are_split_by_the_rule_of_the_run(values, rule):
    found = validate.split_rule(make(**values))
    assert (None if found is None else (found.scorer, found.fraction)) == rule
    assert found is None or (found.weighting, found.scope, found.second) == ("top_fraction", "global_batch", None)


def test_held_out_tokens_are_split_by_combined_sets_too():
    second = {"scorer": "reference_entropy", "fraction": 0.8}
    found = validate.split_rule(make(**RHO1, **{"objective.second": second, "objective.combine": "union"}))
    assert found.second is not None and found.second.fraction == 0.8 and found.combine == "union"


def test_a_held_out_corpus_is_a_prefix_or_a_mapping():
    valid = make(**{"data.valid": {"a": "x", "b": {"path": "y", "streams": {"ref_nll": "z"}}}}).data.valid
    assert (valid["a"].path, valid["a"].streams) == ("x", {})
    assert (valid["b"].path, valid["b"].streams) == ("y", {"ref_nll": "z"})
