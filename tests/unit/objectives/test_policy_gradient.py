"""The clipped policy gradient: against plain formulas on full logits in fp64, and what must hold exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarpt.errors import CheckpointError, ConfigError, DataError
from megarpt.objectives.base import ObjectiveOutput
from megarpt.objectives.policy_gradient import ClippedPolicyGradient, kl_estimate
from megarpt.structs import Progress, TokenBatch, TokenStats

NAN = float("nan")
VOCAB = 7


@dataclass
class Rollout:
    """A completion; the first `prompt` of its tokens do not train. All numbers are fp64."""

    prompt: int
    labels: Tensor  # [n]
    logits: Tensor  # [n, VOCAB], differentiable
    old: Tensor  # [n, VOCAB]
    ref: Tensor  # [n, VOCAB]
    sampler: Tensor  # [n, VOCAB]
    advantage: float

    def of_labels(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, self.labels[:, None])[:, 0]


def make_rollouts(lengths: Sequence[int], seed: int = 0, prompt: int = 2) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rollouts = []
    for i, n in enumerate(lengths):
        n += prompt
        logits = normal(n, VOCAB)
        others = [logits + 0.5 * normal(n, VOCAB) for _ in range(3)]
        labels = torch.randint(0, VOCAB, (n,), generator=generator)
        rollouts.append(Rollout(prompt, labels, logits.requires_grad_(), *[o.detach() for o in others], (-1.0) ** i * (1 + i)))
    return rollouts


def pack(rows: Sequence[Sequence[Rollout]]) -> tuple[TokenStats, TokenBatch]:
    """Rollouts one after the other in every row; the padding behind them holds NaN everywhere."""
    s = 1 + max(sum(len(each.labels) for each in row) for row in rows)
    columns: dict[str, list[Tensor]] = {}
    for row in rows:
        parts: dict[str, list[Tensor]] = {}
        for each in row:
            n = len(each.labels)
            trains = torch.arange(n) >= each.prompt
            numbers = {
                "logprob": each.of_labels(each.logits),
                "entropy": torch.distributions.Categorical(logits=each.logits).entropy(),
                "old_logprob": each.of_labels(each.old),
                "ref_logprob": each.of_labels(each.ref),
                "rollout_logprob": each.of_labels(each.sampler),
                "advantage": torch.full((n,), each.advantage, dtype=torch.float64),
                "rollout_share": torch.full((n,), 1.0 / (n - each.prompt), dtype=torch.float64),
                "rollout_end": (torch.arange(n) == n - 1).double(),
                "loss_mask": trains,
            }
            for name, values in numbers.items():
                parts.setdefault(name, []).append(values)
        for name, values in parts.items():
            whole = torch.cat(values)
            filler = whole.new_full((s - len(whole),), False if whole.dtype == torch.bool else NAN)
            columns.setdefault(name, []).append(torch.cat([whole, filler]))
    found = {name: torch.stack(values) for name, values in columns.items()}
    return TokenStats(found.pop("logprob"), found.pop("entropy")), make_batch(found.pop("loss_mask"), found)


def make_batch(loss_mask: Tensor, streams: dict[str, Tensor]) -> TokenBatch:
    b, s = loss_mask.shape
    return TokenBatch(
        tokens=torch.zeros(b, s, dtype=torch.int64),
        labels=torch.zeros(b, s, dtype=torch.int64),
        loss_mask=loss_mask,
        position_ids=torch.arange(s).expand(b, s),
        cu_seqlens=torch.arange(b + 1, dtype=torch.int32) * s,
        sample_id=torch.arange(b),
        source_id=torch.zeros(b, dtype=torch.int64),
        sample_index=torch.arange(b),
        streams=streams,
    )


def run(stats: TokenStats, batch: TokenBatch, **flags: Any) -> ObjectiveOutput:
    return ClippedPolicyGradient(**flags)(stats, batch, None, Progress())


def tokens_of(
    logprob: Sequence[float], advantage: Sequence[float], **streams: Sequence[float]
) -> tuple[TokenStats, TokenBatch]:
    """One row in fp32, all of which trains."""
    stats = TokenStats(torch.tensor([logprob]).requires_grad_(), None)
    numbers = {name: torch.tensor([values]) for name, values in {"advantage": advantage, **streams}.items()}
    return stats, make_batch(torch.ones(1, len(logprob), dtype=torch.bool), numbers)


@dataclass
class Flags:
    """The settings, for the formulas below."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k2"
    entropy_coef: float = 0.0
    reduction: str = "token"
    on_policy: bool = True
    max_importance_ratio: float | None = None
    log_entropy: bool = False


def oracle(rollouts: Sequence[Rollout], flags: Flags) -> Tensor:
    """The loss of a step, token by token, as it is printed."""
    of_rollouts: list[Tensor] = []
    tokens = 0
    for each in rollouts:
        total = torch.zeros((), dtype=torch.float64)
        for j in range(each.prompt, len(each.labels)):
            label = each.labels[j]
            now, ref, sampler = (x[j].log_softmax(-1)[label] for x in (each.logits, each.ref, each.sampler))
            old = now.detach() if flags.on_policy else each.old[j].log_softmax(-1)[label]
            r = (now - old).exp()
            surrogate = torch.minimum(r * each.advantage, r.clamp(1 - flags.clip_low, 1 + flags.clip_high) * each.advantage)
            if flags.dual_clip is not None and each.advantage < 0:
                surrogate = surrogate.clamp(min=flags.dual_clip * each.advantage)
            if flags.max_importance_ratio is not None:
                surrogate = surrogate * min((old - sampler).exp().item(), flags.max_importance_ratio)
            x = (ref - now).exp()
            kl = {"k1": -x.log(), "k2": x.log() ** 2 / 2, "k3": x - 1 - x.log()}[flags.kl_estimator]
            p = each.logits[j].softmax(-1)
            total = total - surrogate + flags.kl_coef * kl - flags.entropy_coef * -(p * p.log()).sum()
        n = len(each.labels) - each.prompt
        tokens += n
        of_rollouts.append(total / n if flags.reduction == "rollout" else total)
    return torch.stack(of_rollouts).sum() / (len(rollouts) if flags.reduction == "rollout" else tokens)


def gradients(loss: Tensor, rollouts: Sequence[Rollout]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [each.logits for each in rollouts], retain_graph=True))


CASES: list[dict[str, Any]] = [
    {},
    {"on_policy": False},
    {"on_policy": False, "clip_low": 0.1, "clip_high": 0.4},
    {"on_policy": False, "clip_low": 1.0, "clip_high": math.inf},
    {"on_policy": False, "dual_clip": 1.3},
    {"max_importance_ratio": 1.2},
    {"on_policy": False, "max_importance_ratio": 1.2},
    {"max_importance_ratio": math.inf},
    *({"kl_coef": 0.3, "kl_estimator": estimator} for estimator in ("k1", "k2", "k3")),
    {"entropy_coef": 0.1},
    {
        "on_policy": False,
        "dual_clip": 1.5,
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
        "max_importance_ratio": 2.0,
        "log_entropy": True,
    },
]


@pytest.mark.parametrize("reduction", ["token", "rollout"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: ",".join(f"{name}={value}" for name, value in case.items()) or "default"
)
def test_loss_and_gradients_of_the_logits_are_the_printed_ones(case, reduction) -> None:
    rollouts = make_rollouts([5, 1, 8, 3])
    flags = {**case, "reduction": reduction}
    stats, batch = pack([rollouts[:1], rollouts[1:3], rollouts[3:]])
    out = run(stats, batch, **flags)
    assert out.num_tokens.dtype == torch.int32 and out.num_tokens.shape == out.loss_sum.shape == ()
    loss, expected = out.loss_sum / out.num_tokens, oracle(rollouts, Flags(**flags))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for got, right in zip(gradients(loss, rollouts), gradients(expected, rollouts), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-13)
    other = oracle(rollouts, Flags(**{**flags, "reduction": {"token": "rollout", "rollout": "token"}[reduction]}))
    assert abs(float((loss - other).detach())) > 1e-3, "the reductions agree: this case cannot tell them apart"


def test_the_cases_reach_every_bound() -> None:
    """Otherwise the comparison with the printed formulas says nothing of them."""
    stats, batch = pack([make_rollouts([5, 1, 8, 3])])
    metrics = run(stats, batch, on_policy=False, dual_clip=1.3, max_importance_ratio=1.2).metrics
    for name in ("clipped_low", "clipped_high", "clipped_dual", "importance_truncated"):
        numerator, denominator = metrics[f"policy/{name}"]
        assert 0 < float(numerator) < float(denominator) == 17, name


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_the_weighted_logprob() -> None:
    """To the last bit, in fp32, at any log-probability."""
    generator = torch.Generator().manual_seed(0)
    logprob, advantage = -30.0 * torch.rand(50, generator=generator), torch.randn(50, generator=generator)
    stats, batch = tokens_of(logprob.tolist(), advantage.tolist())
    out = run(stats, batch, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(out.loss_sum, stats.logprob)
    assert torch.equal(gradient[0], -advantage)
    torch.testing.assert_close(out.loss_sum.detach(), -advantage.sum())
    assert [float(part) for part in out.metrics["policy/ratio"]] == [50.0, 50.0]
    for name in ("clipped_low", "clipped_high", "clipped_dual", "kl_old_k1_nats", "kl_old_k3_nats"):
        assert float(out.metrics[f"policy/{name}"][0]) == 0.0


def test_on_policy_is_off_policy_with_the_same_weights() -> None:
    stats, batch = pack([make_rollouts([4, 6])])
    off = replace(batch, streams=batch.streams | {"old_logprob": stats.logprob.detach()})
    assert torch.equal(run(stats, batch).loss_sum, run(stats, off, on_policy=False).loss_sum)
    batch.streams["old_logprob"].fill_(NAN)  # which is not read
    assert torch.isfinite(run(stats, batch).loss_sum)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "surrogate", "gradient", "cut"),
    [
        (2.0, math.log(1.1), 2.2, 2.2, None),
        (2.0, math.log(1.5), 2.6, 0.0, "high"),
        (2.0, math.log(0.5), 1.0, 1.0, None),  # bad luck of a good token may be made up for
        (2.0, 200.0, 2.6, 0.0, "high"),  # r overflows
        (2.0, -200.0, 0.0, 0.0, None),
        (-2.0, math.log(0.9), -1.8, -1.8, None),
        (-2.0, math.log(0.5), -1.6, 0.0, "low"),
        (-2.0, -200.0, -1.6, 0.0, "low"),
        (-2.0, math.log(1.5), -3.0, -3.0, None),
        (-2.0, math.log(2.5), -5.0, -5.0, None),
        (-2.0, math.log(3.5), -6.0, 0.0, "dual"),
        (-2.0, 200.0, -6.0, 0.0, "dual"),
        (0.0, 200.0, 0.0, 0.0, None),
        (0.0, -200.0, 0.0, 0.0, None),
    ],
)
def test_clipping_by_the_sign_of_the_advantage(advantage, log_ratio, surrogate, gradient, cut) -> None:
    stats, batch = tokens_of([-1.0, -1.0], [advantage] * 2, old_logprob=[-1.0 - log_ratio] * 2)
    out = run(stats, batch, on_policy=False, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    (found,) = torch.autograd.grad(out.loss_sum, stats.logprob)
    assert float(out.loss_sum.detach()) == pytest.approx(-2.0 * surrogate, rel=1e-5)
    assert found[0].tolist() == ([0.0, 0.0] if gradient == 0.0 else pytest.approx([-gradient] * 2, rel=1e-5))
    assert {name: float(out.metrics[f"policy/clipped_{name}"][0]) for name in ("low", "high", "dual")} == {
        name: 2.0 * (name == cut) for name in ("low", "high", "dual")
    }


def test_without_a_dual_clip_a_negative_surrogate_has_no_bound() -> None:
    stats, batch = tokens_of([-1.0], [-1.0], old_logprob=[-6.0])
    out = run(stats, batch, on_policy=False)
    assert float(out.loss_sum.detach()) == pytest.approx(math.exp(5.0), rel=1e-5)
    assert "policy/clipped_dual" not in out.metrics


def test_kl_estimates_and_their_gradients() -> None:
    now, ref = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64), torch.tensor([-1.5, -0.5, -0.5], dtype=torch.float64)
    d = ref - now
    expected = {"k1": (-d, torch.ones(3)), "k2": (d**2 / 2, -d), "k3": (d.exp() - d - 1, 1 - d.exp())}
    for estimator, (value, gradient) in expected.items():
        leaf = now.clone().requires_grad_()
        found = kl_estimate(leaf, ref, estimator)  # type: ignore[arg-type]
        torch.testing.assert_close(found.detach(), value)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], gradient.double())


def test_a_small_kl_keeps_its_digits_in_single_precision() -> None:
    d = 1e-3
    found = kl_estimate(torch.tensor([0.0]), torch.tensor([d]), "k3")
    assert float(found) == pytest.approx(math.exp(d) - d - 1, rel=1e-3)


def test_what_the_kl_estimates_are_on_average() -> None:
    """Over all tokens of a distribution. As a loss k1 does nothing, k2 is KL(current || reference), and k3, whose value is that
    too, has the gradient of KL(reference || current)."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
    now = logits.log_softmax(-1)
    ref = torch.randn(VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1)
    reverse, forward = (now.exp() * (now - ref)).sum(), (ref.exp() * (ref - now)).sum()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    mean = {name: (now.exp().detach() * kl_estimate(now, ref, name)).sum() for name in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    torch.testing.assert_close(mean["k1"], reverse)
    torch.testing.assert_close(mean["k3"], reverse)
    torch.testing.assert_close(gradient(mean["k1"]), torch.zeros_like(logits))
    torch.testing.assert_close(gradient(mean["k2"]), gradient(reverse))
    torch.testing.assert_close(gradient(mean["k3"]), gradient(forward))
    assert (gradient(forward) - gradient(reverse)).abs().max() > 0.1 and abs(float((mean["k2"] - reverse).detach())) > 0.1


def test_importance_weights_have_a_ceiling_and_no_gradient() -> None:
    stats, batch = tokens_of([-1.0, -1.0, -1.0], [1.0, 1.0, -1.0], rollout_logprob=[-1.5, -3.0, -0.5])
    out = run(stats, batch, max_importance_ratio=2.0)
    weights = [math.exp(0.5), 2.0, math.exp(-0.5)]
    (gradient,) = torch.autograd.grad(out.loss_sum, stats.logprob)
    assert gradient[0].tolist() == pytest.approx([-weights[0], -2.0, weights[2]])
    assert float(out.metrics["policy/importance"][0]) == pytest.approx(sum(weights))
    assert float(out.metrics["policy/importance_truncated"][0]) == 1.0
    assert float(out.metrics["policy/sampler_gap_nats"][0]) == pytest.approx(3.0)
    assert float(out.metrics["policy/sampler_gap_squared_nats2"][0]) == pytest.approx(4.5)
    plain = run(stats, batch)
    assert plain.loss_sum.item() == -1.0 and "policy/importance" not in plain.metrics
    assert plain.metrics["policy/sampler_gap_nats"] == out.metrics["policy/sampler_gap_nats"]


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    reduction=st.sampled_from(["token", "rollout"]),
    data=st.data(),
)
def test_neither_packing_nor_micro_batches_change_anything(lengths, reduction, data) -> None:
    rollouts = make_rollouts(lengths)
    flags: dict[str, Any] = {"reduction": reduction, "on_policy": False, "kl_coef": 0.1, "log_entropy": True}
    whole = run(*pack([rollouts]), **flags)
    expected = gradients(whole.loss_sum / whole.num_tokens, rollouts)

    order = data.draw(st.permutations(rollouts))
    bounds = sorted(data.draw(st.sets(st.integers(1, len(rollouts) - 1), min_size=1)))
    parts = [order[start:stop] for start, stop in itertools.pairwise([0, *bounds, len(rollouts)])]
    rows = [[[each] for each in part] if data.draw(st.booleans()) else [part] for part in parts]
    outs = [run(*pack(row), **flags) for row in rows]
    num_units = sum(int(out.num_tokens) for out in outs)
    assert num_units == int(whole.num_tokens) == (len(lengths) if reduction == "rollout" else sum(lengths))
    loss = sum(out.loss_sum for out in outs) / num_units
    for got, right in zip(gradients(loss, rollouts), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-13)
    for name, pair in whole.metrics.items():
        for i in (0, 1):
            torch.testing.assert_close(sum(out.metrics[name][i] for out in outs), pair[i], msg=name)


@pytest.mark.parametrize("reduction", ["token", "rollout"])
def test_a_mean_of_means_would_be_seen(reduction) -> None:
    """The mistake that the one division is there to prevent."""
    rollouts = make_rollouts([1, 6, 2])
    expected = gradients(oracle(rollouts, Flags(reduction=reduction)), rollouts)
    outs = [run(*pack([part]), reduction=reduction) for part in (rollouts[:2], rollouts[2:])]
    wrong = gradients(sum(out.loss_sum / out.num_tokens for out in outs) / len(outs), rollouts)
    right = gradients(sum(out.loss_sum for out in outs) / sum(int(out.num_tokens) for out in outs), rollouts)
    assert max(float((a - b).abs().max()) for a, b in zip(right, expected, strict=True)) < 1e-12
    assert max(float((a - b).abs().max()) for a, b in zip(wrong, expected, strict=True)) > 1e-2


def test_nan_of_a_masked_token_reaches_nothing() -> None:
    """Every number of the padding is NaN in these tests; here those of the prompt are too, and the comparison is exact."""
    rollouts = make_rollouts([4, 6])
    flags = {"on_policy": False, "dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.1, "max_importance_ratio": 2.0}
    stats, batch = pack([rollouts[:1], rollouts[1:]])
    leaves = [values.detach().nan_to_num().requires_grad_() for values in stats]
    poisoned = [torch.where(batch.loss_mask, values.detach(), NAN).requires_grad_() for values in stats]
    streams = {name: torch.where(batch.loss_mask, values, NAN) for name, values in batch.streams.items()}
    clean = replace(batch, streams={name: values.nan_to_num() for name, values in batch.streams.items()})
    for reduction in ("token", "rollout"):
        expected = run(TokenStats(*leaves), clean, reduction=reduction, **flags)
        out = run(TokenStats(*poisoned), replace(batch, streams=streams), reduction=reduction, **flags)
        assert torch.equal(out.loss_sum, expected.loss_sum) and out.metrics == expected.metrics
        found = torch.autograd.grad(out.loss_sum, poisoned)
        for got, right in zip(found, torch.autograd.grad(expected.loss_sum, leaves), strict=True):
            assert torch.equal(got, right) and torch.equal(got != 0, got.ne(0) & batch.loss_mask)


@pytest.mark.parametrize("name", ["logprob", "advantage", "old_logprob", "ref_logprob"])
def test_nan_of_a_trained_token_is_seen(name) -> None:
    """So that the step is skipped."""
    stats, batch = tokens_of([-1.0, -1.0], [1.0, -1.0], old_logprob=[-1.0, -1.1], ref_logprob=[-1.0, -1.0])
    values = stats.logprob.detach().clone() if name == "logprob" else batch.streams[name]
    values[0, 1] = NAN
    if name == "logprob":
        stats = TokenStats(values.requires_grad_(), None)
    assert torch.isnan(run(stats, batch, on_policy=False, kl_coef=0.1).loss_sum)


def test_a_micro_batch_without_a_token_has_a_graph_and_the_same_metrics() -> None:
    stats, batch = pack([make_rollouts([4, 6])])
    nothing = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    for flags in ({}, {"on_policy": False, "dual_clip": 3.0, "entropy_coef": 0.1, "reduction": "rollout"}):
        some, none = run(stats, batch, **flags), run(stats, nothing, **flags)
        assert none.loss_sum.requires_grad and none.loss_sum.item() == 0.0 and int(none.num_tokens) == 0
        assert set(none.metrics) == set(some.metrics)
        assert all(float(part) == 0.0 for pair in none.metrics.values() for part in pair)


def test_a_masked_rollout_is_not_counted() -> None:
    rollouts = make_rollouts([4, 6])
    stats, batch = pack([[each] for each in rollouts])
    one = replace(batch, loss_mask=batch.loss_mask & torch.tensor([[True], [False]]))
    out = run(stats, one, reduction="rollout")
    assert int(out.num_tokens) == 1
    torch.testing.assert_close(out.loss_sum, oracle(rollouts[:1], Flags(reduction="rollout")))


def test_metrics_are_sums_that_say_what_they_are_named() -> None:
    stats, batch = pack([make_rollouts([4, 6])])
    mask, streams = batch.loss_mask, batch.streams
    out = run(stats, batch, on_policy=False, dual_clip=3.0, log_entropy=True, kl_coef=0.1, reduction="rollout")
    log_ratio = (stats.logprob.detach() - streams["old_logprob"])[mask]
    d = (streams["ref_logprob"] - stats.logprob.detach())[mask]
    gap = (streams["old_logprob"] - streams["rollout_logprob"])[mask]
    expected = {
        "policy/ratio": log_ratio.exp(),
        "policy/kl_old_k1_nats": -log_ratio,
        "policy/kl_old_k3_nats": log_ratio.exp() - 1 - log_ratio,
        "policy/kl_ref_nats": d.exp() - 1 - d,
        "policy/entropy_nats": stats.entropy[mask].detach(),
        "policy/sampler_gap_nats": gap.abs(),
        "policy/sampler_gap_squared_nats2": gap**2,
    }
    shares = {f"policy/clipped_{name}" for name in ("low", "high", "dual")}
    assert set(out.metrics) == {*expected, *shares, "policy/loss"}
    for name, pair in out.metrics.items():
        assert all(part.shape == () and part.dtype == torch.float64 and not part.requires_grad for part in pair)
        assert int(pair[1]) == (2 if name == "policy/loss" else 10)
        if name in expected:
            torch.testing.assert_close(pair[0] / pair[1], expected[name].mean(), msg=name)
    without_kl = run(stats, batch, on_policy=False, dual_clip=3.0, reduction="rollout")
    torch.testing.assert_close(out.metrics["policy/loss"][0], without_kl.loss_sum.detach())
    assert "policy/entropy_nats" not in without_kl.metrics and "policy/kl_ref_nats" in without_kl.metrics
    torch.testing.assert_close(out.token_loss[mask], -stats.logprob[mask].detach())
    assert torch.equal(out.weight > 0, mask) and out.score is None


def test_kl_and_entropy_without_a_weight_are_no_part_of_the_loss() -> None:
    """Measuring changes nothing, and NaN of what is only measured does not matter."""
    stats, batch = pack([make_rollouts([4, 6])])
    plain = run(stats, batch).loss_sum
    assert torch.equal(run(stats, batch, log_entropy=True).loss_sum, plain)
    for name in ("ref_logprob", "rollout_logprob"):
        batch.streams[name].fill_(NAN)
    assert torch.equal(run(stats, batch).loss_sum, plain)


def test_what_the_settings_need() -> None:
    default = ClippedPolicyGradient()
    assert default.streams == ("advantage",) and not default.needs_entropy
    everything = ClippedPolicyGradient(
        on_policy=False, kl_coef=0.1, max_importance_ratio=2.0, reduction="rollout", entropy_coef=0.1
    )
    assert set(everything.streams) == {
        *("advantage", "old_logprob", "ref_logprob", "rollout_logprob", "rollout_share", "rollout_end")
    }
    assert everything.needs_entropy and ClippedPolicyGradient(log_entropy=True).needs_entropy
    stats, batch = pack([make_rollouts([2])])
    for name in everything.streams:
        less = replace(batch, streams={key: values for key, values in batch.streams.items() if key != name})
        with pytest.raises(DataError, match=f"no stream {name}"):
            everything(stats, less, None, Progress())


def test_nothing_is_chosen_beforehand_and_nothing_remembered() -> None:
    objective = ClippedPolicyGradient()
    assert objective.needs_stats and not objective.spans_micro_batches and not objective.guesses
    assert not objective.learns_from_steps and not objective.awaits_a_step and objective.state_dict() == {}
    objective.load_state_dict({})
    with pytest.raises(CheckpointError, match="threshold"):
        objective.load_state_dict({"threshold": 1.0})
    with pytest.raises(NotImplementedError, match="ClippedPolicyGradient"):
        objective.select(None, [], Progress(), None)
    with pytest.raises(NotImplementedError, match="ClippedPolicyGradient"):
        objective.settle([], None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_low", -0.1),
        ("clip_low", 1.1),
        ("clip_low", NAN),
        ("clip_high", -0.1),
        ("clip_high", NAN),
        ("dual_clip", 1.0),
        ("dual_clip", math.inf),
        ("kl_coef", -0.1),
        ("kl_coef", math.inf),
        ("kl_estimator", "k4"),
        ("entropy_coef", -0.1),
        ("reduction", "sequence"),
        ("max_importance_ratio", 0.9),
        ("max_importance_ratio", NAN),
    ],
)
def test_impossible_settings_are_refused(name, value) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{name}: got .*, expected "):
        ClippedPolicyGradient(**{name: value})
