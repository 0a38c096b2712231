"""The embedded engine against running the whole text anew for every token, and against itself in other company."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarpt.corpus.tokenizers import ByteTokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, RolloutError
from megarpt.model.build import build_network, transformer_config
from megarpt.model.forward import head_output
from megarpt.model.token_stats_gpt import HeadMode, TokenStatsGPT
from megarpt.ops.linear_logprob import linear_logprob
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.rollout import Sampling
from megarpt.rl.sampling import draw, stream_key, uniforms
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason
from megarpt.structs import TokenBatch
from megarpt.testing.configs import TWO_LAYERS, tiny_config

VOCAB, LONGEST = 257, 64
SHARP = {"init_method_std": 0.15}  # random weights whose distributions are far from uniform
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {"preset": "tiny", "mcore": TWO_LAYERS},
    "qwen": {"preset": "tiny", "mcore": {**TWO_LAYERS, "qk_layernorm": True, "add_qkv_bias": True, "kv_channels": 24}},
    "whole-heads": {"preset": "tiny", "mcore": {**TWO_LAYERS, "num_query_groups": 4}},
    "scaled-angles": {"preset": "tiny", "mcore": TWO_LAYERS, "gpt": {"rope_scaling_factor": 8.0}},
    "gpt2": {"preset": "gpt2-124m", "mcore": {**TWO_LAYERS, "num_query_groups": 4}},
    "experts": {"preset": "tiny-moe", "mcore": {**TWO_LAYERS, **EXPERTS}},
}
SAMPLED = Sampling(max_new_tokens=20, temperature=0.9)


def make_network(groups: ProcessGroups, kind: str = "llama", **train: object) -> TokenStatsGPT:
    torch.manual_seed(7)
    shape = NETWORKS[kind]
    cfg = tiny_config(**{"model": {**shape, "mcore": {**shape["mcore"], **SHARP}}, **train})
    config = transformer_config(cfg, ParallelLayout(), is_cuda=False)
    return build_network(cfg, config, groups, vocab_size=VOCAB, backend="torch").to(config.params_dtype)


def make_prompts(count: int = 5, seed: int = 0) -> list[Prompt]:
    rng = random.Random(seed)
    return [Prompt(id=f"p{i}", tokens=tuple(rng.choices(range(256), k=rng.randint(1, 20)))) for i in range(count)]


def make_engine(network: TokenStatsGPT, groups: ProcessGroups, max_batch: int = 64, longest: int = LONGEST) -> EmbeddedEngine:
    cpu = torch.device("cpu")
    return EmbeddedEngine(network, ByteTokenizer(), groups, cpu, max_sequence_length=longest, max_batch=max_batch)


@torch.no_grad()
def recomputed(network: TokenStatsGPT, prompt: Prompt, sample: int, sampling: Sampling) -> tuple[list[int], list[float]]:
    """A completion by the network's own forward pass over the whole text for every token."""
    network.eval()
    ids, logprobs = list(prompt.tokens), []
    key = stream_key(sampling.seed, prompt.id, sample)
    for position in range(sampling.max_new_tokens):
        logits = network(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, -1:, :VOCAB]
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        token, logprob = draw(logits, uniforms([key], [position]), **options)
        ids.append(int(token))
        logprobs.append(float(logprob))
        if ids[-1] in sampling.stop_tokens:
            break
    return ids[len(prompt.tokens) :], logprobs


def tokens_of(groups: list[RolloutGroup]) -> dict[str, list[tuple[int, ...]]]:
    return {group.prompt.id: [each.tokens for each in group.completions] for group in groups}


def trainer_logprobs(network: TokenStatsGPT, group: RolloutGroup, temperature: float) -> list[torch.Tensor]:
    """What the training forward pass gives for the tokens of a group's completions, packed as segments."""
    rows = [(*group.prompt.tokens, *each.tokens) for each in group.completions]
    lengths = torch.tensor([len(row) - 1 for row in rows])
    batch = TokenBatch(
        tokens=torch.tensor([[token for row in rows for token in row[:-1]]]),
        labels=torch.tensor([[token for row in rows for token in row[1:]]]),
        loss_mask=torch.ones(1, int(lengths.sum()), dtype=torch.bool),
        position_ids=torch.cat([torch.arange(int(length)) for length in lengths])[None],
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        sample_id=torch.zeros(1, dtype=torch.int64),
        source_id=torch.zeros(1, dtype=torch.int64),
        sample_index=torch.zeros(1, dtype=torch.int64),
    )
    if temperature == 1.0:
        logprob, _ = head_output(network, batch, HeadMode.LOGPROB)
    else:  # the head of training at another temperature, on the hidden states of the training forward pass
        hidden: list[torch.Tensor] = []
        handle = network.decoder.register_forward_hook(lambda _, __, out: hidden.append(out))
        head_output(network, batch, HeadMode.LOGPROB)
        handle.remove()
        tied = network.share_embeddings_and_output_weights
        weight = network.shared_embedding_or_output_weight() if tied else network.output_layer.weight
        shape = {"temperature": temperature, "vocab_size": VOCAB}
        logprob, _ = linear_logprob(hidden[0].squeeze(1), weight, batch.labels[0], **shape)
    skip = len(group.prompt.tokens) - 1
    return [part[skip:] for part in logprob.detach().flatten().split(lengths.tolist())]


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_equals_recomputing_the_whole_text(
    cpu_runtime: Runtime, one_rank: ProcessGroups, kind: str, temperature: float
) -> None:
    network, prompts = make_network(one_rank, kind), make_prompts(4)
    sampling = Sampling(max_new_tokens=12, temperature=temperature)
    groups = make_engine(network, one_rank).generate(prompts, group_size=2, sampling=sampling)
    for group in groups:
        for sample, completion in enumerate(group.completions):
            tokens, logprobs = recomputed(network, group.prompt, sample, sampling)
            assert list(completion.tokens) == tokens
            assert list(completion.logprobs) == pytest.approx(logprobs, abs=1e-5)
            assert completion.text == bytes(token for token in tokens if token < 256)
    sampled_apart = any(group.completions[0].tokens != group.completions[1].tokens for group in groups)
    assert sampled_apart == (temperature > 0.0)


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_training_head(
    cpu_runtime: Runtime, one_rank: ProcessGroups, kind: str, temperature: float
) -> None:
    network = make_network(one_rank, kind)
    sampling = replace(SAMPLED, temperature=temperature)
    for group in make_engine(network, one_rank, max_batch=7).generate(make_prompts(), group_size=3, sampling=sampling):
        for completion, expected in zip(group.completions, trainer_logprobs(network, group, temperature), strict=True):
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_bf16_log_probabilities_are_near_those_of_the_training_head(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    network = make_network(one_rank, **{"train.precision": "bf16"})
    gaps = []
    for group in make_engine(network, one_rank).generate(make_prompts(), group_size=3, sampling=SAMPLED):
        for completion, expected in zip(group.completions, trainer_logprobs(network, group, 0.9), strict=True):
            gaps.append((torch.tensor(completion.logprobs) - expected).abs())
    assert float(torch.cat(gaps).mean()) < 0.02


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"top_k": 30, "top_p": 0.8, "stop_tokens": (7, 9, 100)}])
def test_company_and_order_do_not_matter(
    cpu_runtime: Runtime, one_rank: ProcessGroups, max_batch: int, options: dict[str, Any]
) -> None:
    network, prompts = make_network(one_rank), make_prompts()
    sampling = replace(SAMPLED, **options)
    together = tokens_of(make_engine(network, one_rank).generate(prompts, group_size=4, sampling=sampling))
    shuffled = random.Random(1).sample(prompts, len(prompts))
    assert tokens_of(make_engine(network, one_rank, max_batch).generate(shuffled, group_size=4, sampling=sampling)) == together
    assert tokens_of(make_engine(network, one_rank).generate(prompts[2:3], group_size=2, sampling=sampling)) == {
        prompts[2].id: together[prompts[2].id][:2]
    }


def test_the_seed_and_the_prompts_name_matter(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    engine, (prompt,) = make_engine(make_network(one_rank), one_rank), make_prompts(1)
    first, again, other_seed, other_name = (
        engine.generate([each], group_size=1, sampling=sampling)[0].completions[0].tokens
        for each, sampling in (
            (prompt, SAMPLED),
            (prompt, SAMPLED),
            (prompt, replace(SAMPLED, seed=5)),
            (replace(prompt, id="other"), SAMPLED),
        )
    )
    assert first == again
    assert len({first, other_seed, other_name}) == 3


def test_waiting_completions_take_the_place_of_finished_ones(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    engine = make_engine(make_network(one_rank), one_rank, max_batch=2)
    prompt = make_prompts(1)[0]
    for key, most in (("a", 2), ("b", 6), ("c", 3), ("d", 1)):
        engine.add(key, prompt.tokens, replace(SAMPLED, max_new_tokens=most), prompt_id=key, sample=0)
    ended = []
    while not engine.is_idle:
        ended.append([key for key, _ in engine.step()])
    assert ended == [[], ["a"], [], [], ["c"], ["b", "d"]]
    assert engine.step() == []


@pytest.mark.parametrize("max_batch", [2, 64])
def test_a_shared_prefix_is_run_once(cpu_runtime: Runtime, one_rank: ProcessGroups, max_batch: int) -> None:
    prompts = make_prompts()
    engine = make_engine(make_network(one_rank), one_rank, max_batch)
    engine.generate(prompts, group_size=8, sampling=replace(SAMPLED, max_new_tokens=3))
    own = 5 * 8 * (3 - 1)  # the last token of a completion is never run
    assert engine.forward_tokens == sum(len(prompt.tokens) for prompt in prompts) + own


def test_prompts_of_waiting_completions_give_way_and_come_back(
    cpu_runtime: Runtime, one_rank: ProcessGroups, implementation: str
) -> None:
    network, (first, second, third) = make_network(one_rank), make_prompts(3)
    engine = make_engine(network, one_rank, max_batch=2)
    order = (first, second, third, first, third, second, first)
    for i, prompt in enumerate(order):
        engine.add(str(i), prompt.tokens, replace(SAMPLED, max_new_tokens=2 + i % 3), prompt_id=prompt.id, sample=i)
    done: dict[str, Completion] = {}
    while not engine.is_idle:
        done |= dict(engine.step())
    for i, prompt in enumerate(order):
        sampling = replace(SAMPLED, max_new_tokens=2 + i % 3)
        assert list(done[str(i)].tokens) == recomputed(network, prompt, i, sampling)[0]


def test_ends_at_a_stop_token_or_at_the_limit(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    network, prompts = make_network(one_rank), make_prompts()
    engine = make_engine(network, one_rank)
    free = tokens_of(engine.generate(prompts, group_size=4, sampling=SAMPLED))
    stop = free["p0"][0][3]
    groups = engine.generate(prompts, group_size=4, sampling=replace(SAMPLED, stop_tokens=(stop, 256)))
    kinds = set()
    for group in groups:
        for completion, whole in zip(group.completions, free[group.prompt.id], strict=True):
            end = next((i + 1 for i, token in enumerate(whole) if token in (stop, 256)), len(whole))
            assert completion.tokens == whole[:end]
            assert completion.stop is (StopReason.STOP if whole[end - 1] in (stop, 256) else StopReason.LENGTH)
            kinds.add(completion.stop)
    assert kinds == set(StopReason)


def test_a_completion_ends_where_the_model_does(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    engine = make_engine(make_network(one_rank), one_rank, longest=24)
    prompt = Prompt(id="long", tokens=tuple(range(21)))
    (group,) = engine.generate([prompt], group_size=2, sampling=SAMPLED)
    assert [(len(each.tokens), each.stop) for each in group.completions] == [(3, StopReason.LENGTH)] * 2


@pytest.mark.parametrize("options", [{"top_k": 10}, {"top_p": 0.7}, {"top_k": 10, "top_p": 0.7}])
def test_log_probabilities_are_of_the_truncated_distribution(
    cpu_runtime: Runtime, one_rank: ProcessGroups, options: dict[str, Any]
) -> None:
    network, prompt = make_network(one_rank), make_prompts(1)[0]
    (group,) = make_engine(network, one_rank).generate(
        [prompt], group_size=64, sampling=replace(SAMPLED, max_new_tokens=1, **options)
    )
    seen = {each.tokens[0]: each.logprobs[0] for each in group.completions}
    logits = network(torch.tensor([prompt.tokens]), torch.arange(len(prompt.tokens))[None], None)[0, -1, :VOCAB].detach() / 0.9
    ordered = logits.sort(descending=True)
    likeliest = ordered.indices[: options.get("top_k", VOCAB)]
    mass = logits[likeliest].softmax(0).cumsum(0)
    nucleus = likeliest[: int((mass < options.get("top_p", 1.0)).sum()) + 1] if "top_p" in options else likeliest
    expected = dict(zip(nucleus.tolist(), logits[nucleus].log_softmax(0).tolist(), strict=True))
    assert set(seen) <= set(expected) and len(seen) > 3
    assert all(logprob == pytest.approx(expected[token], abs=1e-5) for token, logprob in seen.items())


def test_weights_changed_in_place_are_drawn_from_after_publishing(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    network, prompts = make_network(one_rank), make_prompts(2)
    engine = make_engine(network, one_rank)
    before = engine.generate(prompts, group_size=2, sampling=SAMPLED)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.publish(3)
    after = engine.generate(prompts, group_size=2, sampling=SAMPLED)
    assert tokens_of(after) != tokens_of(before)
    for group in after:
        for sample, completion in enumerate(group.completions):
            assert list(completion.tokens) == recomputed(network, group.prompt, sample, SAMPLED)[0]
    assert {each.policy_version for group in before for each in group.completions} == {0}
    assert {each.policy_version for group in after for each in group.completions} == {3}


def test_publishing_amid_completions_is_refused(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    engine, prompt = make_engine(make_network(one_rank), one_rank), make_prompts(1)[0]
    engine.add("a", prompt.tokens, SAMPLED, prompt_id="a", sample=0)
    with pytest.raises(RolloutError, match=r"0 completions run and 1 wait"):
        engine.publish(1)
    with pytest.raises(RolloutError, match="at rest"):
        engine.generate([prompt], group_size=1, sampling=SAMPLED)
    engine.cancel("a")
    engine.publish(1)


@pytest.mark.parametrize("which", ["waiting", "running", "running-last", "unknown"])
def test_a_cancelled_completion_leaves_the_others_alone(cpu_runtime: Runtime, one_rank: ProcessGroups, which: str) -> None:
    network, prompts = make_network(one_rank), make_prompts(4)
    engine = make_engine(network, one_rank, max_batch=3)
    for prompt in prompts:
        engine.add(prompt.id, prompt.tokens, SAMPLED, prompt_id=prompt.id, sample=0)
    done = dict(engine.step())
    cancelled = {"waiting": "p3", "running": "p0", "running-last": "p2", "unknown": "p9"}[which]
    engine.cancel(cancelled)
    while not engine.is_idle:
        done |= dict(engine.step())
    assert set(done) == {prompt.id for prompt in prompts} - {cancelled}
    for prompt in prompts:
        if prompt.id in done:
            assert list(done[prompt.id].tokens) == recomputed(network, prompt, 0, SAMPLED)[0]


def test_requests_with_their_own_sampling_are_drawn_together(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    network, prompts = make_network(one_rank), make_prompts(4)
    samplings = [
        SAMPLED,
        replace(SAMPLED, temperature=0.0),
        replace(SAMPLED, top_k=5, seed=9),
        replace(SAMPLED, top_p=0.5, max_new_tokens=4),
    ]
    engine = make_engine(network, one_rank)
    for prompt, sampling in zip(prompts, samplings, strict=True):
        engine.add(prompt.id, prompt.tokens, sampling, prompt_id=prompt.id, sample=2)
    done: dict[str, Completion] = {}
    while not engine.is_idle:
        done |= dict(engine.step())
    for prompt, sampling in zip(prompts, samplings, strict=True):
        assert list(done[prompt.id].tokens) == recomputed(network, prompt, 2, sampling)[0]
    assert set(done["p1"].logprobs) == {0.0}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "got 0 tokens, expected 1 to 63"),
        (tuple(range(64)), "got 64 tokens, expected 1 to 63"),
        ((1, VOCAB), "got tokens 1 to 257, expected 0 to 256"),
        ((-1, 3), "got tokens -1 to 3"),
    ],
)
def test_impossible_prompts_are_refused(
    cpu_runtime: Runtime, one_rank: ProcessGroups, tokens: tuple[int, ...], message: str
) -> None:
    engine = make_engine(make_network(one_rank), one_rank)
    with pytest.raises(RolloutError, match=message):
        engine.generate([*make_prompts(1), Prompt(id="odd", tokens=tokens)], group_size=2, sampling=SAMPLED)
    assert engine.is_idle


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_impossible_sampling_is_refused(cpu_runtime: Runtime, one_rank: ProcessGroups, options: dict[str, Any]) -> None:
    engine = make_engine(make_network(one_rank), one_rank)
    with pytest.raises(RolloutError, match=next(iter(options))):
        engine.generate(make_prompts(1), group_size=1, sampling=replace(SAMPLED, **options))


def test_a_key_in_use_is_refused(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    engine = make_engine(make_network(one_rank), one_rank)
    engine.add("a", [1, 2], SAMPLED, prompt_id="a", sample=0)
    with pytest.raises(RolloutError, match="'a' is being drawn already"):
        engine.add("a", [3], SAMPLED, prompt_id="b", sample=0)


def test_a_policy_that_has_diverged_is_reported(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    network, prompts = make_network(one_rank), make_prompts(2)
    engine = make_engine(network, one_rank)
    weight = network.decoder.final_layernorm.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.nan)
    with pytest.raises(RolloutError, match=r"token 1 of completion '0/0' are NaN or infinite with weights 0"):
        engine.generate(prompts, group_size=2, sampling=SAMPLED)
    with torch.no_grad():
        weight.copy_(kept)
    (group, _) = engine.generate(prompts, group_size=1, sampling=SAMPLED)
    assert list(group.completions[0].tokens) == recomputed(network, prompts[0], 0, SAMPLED)[0]


def test_the_network_keeps_its_mode_and_its_gradients(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    network = make_network(one_rank, "experts").train()
    make_engine(network, one_rank).generate(make_prompts(2), group_size=2, sampling=SAMPLED)
    assert all(module.training for module in network.modules())
    tokens = torch.tensor([[1, 2, 3]])
    network(tokens, torch.arange(3)[None], None).sum().backward()
    assert network.output_layer.weight.grad is not None


@pytest.mark.parametrize(
    ("kind", "mcore", "message"),
    [
        ("experts", {"moe_expert_capacity_factor": 1.0}, "experts with a capacity"),
        ("llama", {"rotary_interleaved": True}, "rotary_interleaved"),
        ("llama", {"no_rope_freq": 2}, "no_rope_freq"),
        ("llama", {"fp32_residual_connection": True}, "fp32_residual_connection"),
        ("llama", {"glu_linear_offset": 1.0}, "glu_linear_offset"),
    ],
)
def test_layers_it_does_not_know_are_refused(
    cpu_runtime: Runtime,
    one_rank: ProcessGroups,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    mcore: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setitem(NETWORKS, "odd", {**NETWORKS[kind], "mcore": {**NETWORKS[kind]["mcore"], **mcore}})
    network = make_network(one_rank, "odd")
    with pytest.raises(ConfigError, match=rf"cannot decode with {message}.*rollout.engine=server"):
        make_engine(network, one_rank)
