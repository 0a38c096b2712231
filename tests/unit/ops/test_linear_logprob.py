"""The head op's contract: what it refuses, what it skips, what it keeps, where gradients go. Accuracy: tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarpt.errors import ShapeError
from megarpt.ops import reference
from megarpt.ops.linear_logprob import CHUNK_BYTES, KEEP_BYTES, linear_logprob, plan_chunks

T, H, V = 11, 6, 17


def inputs(t: int = T, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (t,), generator=generator)


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize(
    "options", [{}, {"keep_bytes": 0}, {"chunk_tokens": 3}, {"entropy": True}, {"entropy": True, "chunk_tokens": 4}]
)
def test_every_path_is_the_reference(options: dict) -> None:
    hidden, weight, labels = inputs(dtype=torch.float64)
    upstream = torch.randn(2, T, dtype=torch.float64)
    upstream[:, 4] = 0.0

    def loss(results: tuple[Tensor, Tensor | None]) -> Tensor:
        return (results[0] * upstream[0]).sum() + ((results[1] * upstream[1]).sum() if options.get("entropy") else 0.0)

    actual, expected = linear_logprob(hidden, weight, labels, **options), reference.linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(actual[0], expected[0])
    assert (actual[1] is None) == (not options.get("entropy"))
    torch.testing.assert_close(gradients(loss(actual), hidden, weight), gradients(loss(expected), hidden, weight))


def test_ignored_labels_give_zero_and_no_gradient() -> None:
    hidden, weight, labels = inputs()
    labels[[0, 5, 10]] = torch.tensor([-100, -1, -100])
    logprob, entropy = linear_logprob(hidden, weight, labels, entropy=True)
    assert logprob[[0, 5, 10]].tolist() == entropy[[0, 5, 10]].tolist() == [0.0] * 3
    grad_hidden, grad_weight = gradients(logprob.sum() + entropy.sum(), hidden, weight)
    assert not grad_hidden[[0, 5, 10]].any() and grad_hidden[1].any()

    seen = labels >= 0
    part = linear_logprob(hidden[seen], weight, labels[seen], entropy=True)
    torch.testing.assert_close(part[0], logprob[seen])
    torch.testing.assert_close(gradients(part[0].sum() + part[1].sum(), weight)[0], grad_weight)


@pytest.mark.parametrize("t", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"keep_bytes": 0}, {"entropy": True}])
def test_few_tokens(t: int, options: dict) -> None:
    hidden, weight, labels = inputs(t)
    logprob, _ = linear_logprob(hidden, weight, labels, **options)
    assert logprob.shape == (t,) and logprob.dtype == torch.float32
    grad_hidden, grad_weight = gradients(logprob.sum(), hidden, weight)
    assert grad_hidden.shape == hidden.shape and bool(grad_weight.any()) == (t > 0)


def test_all_labels_ignored() -> None:
    hidden, weight, _ = inputs()
    logprob, _ = linear_logprob(hidden, weight, torch.full((T,), -100))
    grad_hidden, grad_weight = gradients(logprob.sum(), hidden, weight)
    assert logprob.tolist() == [0.0] * T and not grad_hidden.any() and not grad_weight.any()


@pytest.mark.parametrize("options", [{}, {"keep_bytes": 0}, {"chunk_tokens": 4}, {"entropy": True}])
def test_nan_in_a_dropped_row_stays_there(options: dict) -> None:
    """A product with zero would turn NaN into NaN; a row that is left out cannot."""
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[3] = float("nan")
    keep = torch.ones(T)
    keep[3] = 0.0
    logprob, _ = linear_logprob(hidden, weight, labels, **options)
    assert logprob.isnan().nonzero().tolist() == [[3]]
    grad_hidden, grad_weight = gradients(torch.where(keep > 0, logprob, 0.0).sum(), hidden, weight)
    assert torch.isfinite(grad_hidden).all() and torch.isfinite(grad_weight).all() and not grad_hidden[3].any()


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Rows that take part in products with a vocabulary side, summed over all products."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "addmm"):
            left, right = args[-2:]
            m, k, n = left.shape[0], left.shape[1], right.shape[1]
            self.rows += m * k * n // (H * V)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "forwards"), [({}, 1), ({"entropy": True}, 1), ({"keep_bytes": 0}, 2), ({"chunk_tokens": 4}, 2)]
)
def test_dropped_rows_cost_nothing_in_backward(options: dict, forwards: int) -> None:
    hidden, weight, labels = inputs()
    logprob, _ = linear_logprob(hidden, weight, labels, **options)
    loss = logprob[:7].sum()  # 7 of 11 kept
    with CountProducts() as products:
        gradients(loss, hidden, weight)
    assert products.rows == 7 * (1 + forwards)
    logprob, _ = linear_logprob(hidden.detach(), weight, labels, **options)
    with CountProducts() as products:
        gradients(logprob[:7].sum(), weight)
    assert products.rows == 7 * forwards  # and hidden that needs no gradient costs none


def test_chunks_are_a_promise() -> None:
    row = 1000 * 2
    assert plan_chunks(64, 1000, torch.bfloat16) == (CHUNK_BYTES // row, True)
    assert plan_chunks(64, 1000, torch.bfloat16, chunk_tokens=0) == (CHUNK_BYTES // row, True)
    assert plan_chunks(KEEP_BYTES // row + 1, 1000, torch.bfloat16) == (CHUNK_BYTES // row, False)
    assert plan_chunks(64, 1000, torch.bfloat16, chunk_tokens=63) == (63, False)
    assert plan_chunks(64, 1000, torch.bfloat16, chunk_tokens=64) == (64, True)
    assert plan_chunks(1, 10**10, torch.float32) == (1, False)


def test_backward_can_run_twice_but_not_be_differentiated() -> None:
    hidden, weight, labels = inputs()
    logprob, _ = linear_logprob(hidden, weight, labels)
    first = torch.autograd.grad(logprob.sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logprob.sum(), (hidden, weight)), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(linear_logprob(hidden, weight, labels)[0].sum(), hidden, create_graph=True)


def test_inputs_changed_before_backward_are_noticed() -> None:
    hidden, weight, labels = inputs()
    logprob, _ = linear_logprob(hidden, weight, labels)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_padded_vocabulary_carries_no_probability() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        weight[13:] = 1e4  # would win every softmax
    labels = labels % 13
    logprob, entropy = linear_logprob(hidden, weight, labels, entropy=True, vocab_size=13)
    expected = reference.linear_logprob(hidden, weight[:13], labels)
    torch.testing.assert_close((logprob, entropy), expected)
    grad_hidden, grad_weight = gradients((logprob + entropy).sum(), hidden, weight)
    assert not grad_weight[13:].any()
    expected_grads = gradients((expected[0] + expected[1]).sum(), hidden, weight)
    torch.testing.assert_close((grad_hidden, grad_weight), expected_grads)
    plain = linear_logprob(hidden, weight, labels, vocab_size=13)[0]
    torch.testing.assert_close(
        gradients(plain.sum(), hidden, weight), gradients(expected_sum(hidden, weight, labels), hidden, weight)
    )


def expected_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return reference.linear_logprob(hidden, weight[:13], labels)[0].sum()


def test_non_contiguous_inputs() -> None:
    hidden, weight, labels = inputs()
    strided = torch.stack([hidden.detach(), hidden.detach()], dim=2)[:, :, 0].requires_grad_()
    columns = weight.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous() and not columns.is_contiguous()
    every_other = torch.stack([labels, labels], dim=1)[:, 0]
    actual, expected = linear_logprob(strided, columns, every_other)[0], linear_logprob(hidden, weight, labels)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual.sum(), strided, columns), gradients(expected.sum(), hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 4}])
def test_main_grad(dtype: torch.dtype, options: dict) -> None:
    hidden, weight, labels = inputs(dtype=dtype)
    linear_logprob(hidden, weight, labels, **options)[0].sum().backward()
    expected = weight.grad.float()

    parameter = torch.nn.Parameter(weight.detach().clone())
    parameter.main_grad = torch.ones(V, H)
    parameter.grad_added_to_main_grad = False
    for _ in range(2):
        linear_logprob(hidden, parameter, labels, **options, accumulate_main_grad=True)[0].sum().backward()
    torch.testing.assert_close(
        parameter.main_grad, 1.0 + 2.0 * expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.1
    )
    assert parameter.grad_added_to_main_grad and parameter.grad.shape == parameter.shape  # a placeholder, so that hooks run

    parameter.grad, parameter.zero_out_wgrad = None, True
    linear_logprob(hidden, parameter, labels, **options, accumulate_main_grad=True)[0].sum().backward()
    assert not parameter.grad.any()
    del parameter.grad_added_to_main_grad, parameter.zero_out_wgrad
    parameter.grad = None
    linear_logprob(hidden, parameter, labels, **options, accumulate_main_grad=True)[0].sum().backward()
    assert parameter.grad is None


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        logprob, _ = linear_logprob(hidden, weight, labels)
    assert logprob.grad_fn is None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_logprob(hidden, weight, labels)
        assert any(x.shape == (T, V) for x in saved)
        saved.clear()
        linear_logprob(hidden, weight, labels, chunk_tokens=4)
        assert not any(x.shape == (T, V) for x in saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(2, T, H)}, "Flatten"),
        ({"hidden": torch.zeros(T, H + 1)}, "same h"),
        ({"labels": torch.zeros(T + 1, dtype=torch.int64)}, "same t"),
        ({"labels": torch.zeros(T, dtype=torch.int32)}, "int64"),
        ({"labels": torch.full((T,), V)}, f"label {V}"),
        ({"hidden": torch.zeros(T, H, dtype=torch.bfloat16)}, "bfloat16"),
        ({"hidden": torch.zeros(T, H).half(), "weight": torch.zeros(V, H).half()}, "float16"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk_tokens": -1}, "chunk_tokens"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"accumulate_main_grad": True}, "main_grad"),
    ],
)
def test_mistakes_are_refused(change: dict, match: str) -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ShapeError, match=match):
        linear_logprob(**({"hidden": hidden, "weight": weight, "labels": labels} | change))
