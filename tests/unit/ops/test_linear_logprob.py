"""The head op's contract: what it refuses, what it skips, what it keeps, where gradients go. Accuracy: tests/parity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarpt.errors import ShapeError
from megarpt.ops import _ext, head_tiles, reference
from megarpt.ops.head_tiles import TILE_BYTES, TILE_COLUMNS, TilePlan, plan_tiles, spans
from megarpt.ops.linear_logprob import LEAST_GROUP, GradientGuess, group_of_known, linear_logprob, linear_top1
from megarpt.structs import TokenStats
from megarpt.testing.memory import peak_bytes

T, H, V = 11, 6, 17
KEEP_ALL, KEEP_SOME = 2**30, T * 4 * 12
PATHS = [{}, {"keep_bytes": KEEP_ALL}, {"keep_bytes": KEEP_SOME}, {"chunk_tokens": 3}]
PATHS += [{"entropy": True}, {"entropy": True, "keep_bytes": KEEP_SOME, "chunk_tokens": 4}]

pytestmark = pytest.mark.usefixtures("implementation", "small_tiles")


def inputs(t: int = T, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (t,), generator=generator)


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize("options", PATHS)
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
@pytest.mark.parametrize("options", PATHS)
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


@pytest.mark.parametrize("options", PATHS)
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


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every product that is made, as the number of tokens a [., h] x [h, v] product of the same cost would have."""
    made: list[float] = []
    for name in ("_product_into", "_add_product"):
        function = getattr(head_tiles, name)

        def counted(out: Tensor, left: Tensor, right: Tensor, function=function) -> None:  # type: ignore[no-untyped-def]
            made.append(left.shape[0] * left.shape[1] * right.shape[1] / (H * V))
            function(out, left, right)

        monkeypatch.setattr(head_tiles, name, counted)
    return made


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({}, 2.0),
        ({"entropy": True}, 2.0),
        ({"chunk_tokens": 4}, 2.0),
        ({"keep_bytes": KEEP_ALL}, 1.0),
        ({"keep_bytes": KEEP_ALL, "entropy": True}, 1.0),
        ({"keep_bytes": KEEP_SOME}, 2.0 - 10 / V),  # two of four blocks of 5 columns fit
    ],
)
def test_dropped_rows_cost_nothing_in_backward(options: dict, forwards: float, products: list[float]) -> None:
    hidden, weight, labels = inputs()
    logprob, _ = linear_logprob(hidden, weight, labels, **options)
    loss = logprob[:7].sum()  # 7 of 11 kept
    products.clear()
    gradients(loss, hidden, weight)
    assert sum(products) == pytest.approx(7 * (1 + forwards))
    logprob, _ = linear_logprob(hidden.detach(), weight, labels, **options)
    products.clear()
    gradients(logprob[:7].sum(), weight)
    assert sum(products) == pytest.approx(7 * forwards)  # and hidden that needs no gradient costs none


def test_tiles_fit_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_COLUMNS, "cpu", 1024)
    monkeypatch.setitem(TILE_BYTES, "cpu", 4 * 2**20)
    cpu, fp32, bf16 = torch.device("cpu"), torch.float32, torch.bfloat16
    assert plan_tiles(4096, 32_000, fp32, cpu) == TilePlan(1024, 1024, 0)
    assert plan_tiles(4096, 32_000, bf16, cpu) == TilePlan(2048, 1024, 0)
    assert plan_tiles(4096, 32_000, bf16, cpu, chunk_tokens=100) == TilePlan(100, 1024, 0)
    assert plan_tiles(64, 500, fp32, cpu) == TilePlan(64, 500, 0)
    assert plan_tiles(64, 1500, fp32, cpu, keep_bytes=64 * 1500 * 4).kept_columns == 1500
    assert plan_tiles(64, 1500, fp32, cpu, keep_bytes=64 * 1500 * 4 - 1).kept_columns == 1024  # whole blocks
    assert plan_tiles(0, 0, fp32, cpu, keep_bytes=1) == TilePlan(1, 1, 0)
    assert [(x.start, x.stop) for x in spans(10, 4)] == [(0, 3), (3, 6), (6, 10)]


def test_only_tiles_of_logits_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes beyond inputs and gradients: a tile, and two [k, h] when tokens are left out."""
    monkeypatch.setitem(TILE_COLUMNS, "cpu", 64)
    monkeypatch.setitem(TILE_BYTES, "cpu", 64 * 64 * 4)
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    labels = torch.randint(0, 4096, (512,))
    keep = (torch.arange(512) % 2).float()

    def step() -> None:
        torch.autograd.grad((linear_logprob(hidden, weight, labels).logprob * keep).sum(), (hidden, weight))

    step()
    gradients_bytes = 4 * (hidden.numel() + weight.numel())
    numbers = 512 * (7 * 8 + 9 * 4) * 2  # a few a token
    extra = peak_bytes(step, torch.device("cpu")) - gradients_bytes
    tiles = 64 * 64 * 4 * (1 if _ext.extension(torch.device("cpu")) is not None else 8)  # torch's passes take copies
    assert extra <= tiles + 2 * 256 * 16 * 4 + numbers < 512 * 4096 * 4 / 20


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
@pytest.mark.parametrize("buffer", [torch.float32, None], ids=["fp32", "own"])
@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 4}])
def test_accumulation(dtype: torch.dtype, buffer: torch.dtype | None, options: dict) -> None:
    hidden, weight, labels = inputs(dtype=dtype)
    linear_logprob(hidden, weight, labels, **options)[0].sum().backward()
    expected = weight.grad.float()

    parameter = torch.nn.Parameter(weight.detach().clone())
    main_grad = torch.ones(V, H, dtype=buffer or dtype)
    parameter.grad_added_to_main_grad = False
    for _ in range(2):
        linear_logprob(hidden, parameter, labels, **options, accumulate_into=main_grad)[0].sum().backward()
    exact = main_grad.dtype == dtype == torch.float32
    torch.testing.assert_close(main_grad.float(), 1.0 + 2.0 * expected, rtol=1e-5, atol=1e-5 if exact else 0.1)
    assert parameter.grad_added_to_main_grad and parameter.grad.shape == parameter.shape  # a placeholder, so that hooks run

    parameter.grad, parameter.zero_out_wgrad = None, True
    linear_logprob(hidden, parameter, labels, **options, accumulate_into=main_grad)[0].sum().backward()
    assert not parameter.grad.any()
    del parameter.grad_added_to_main_grad, parameter.zero_out_wgrad
    parameter.grad = None
    linear_logprob(hidden, parameter, labels, **options, accumulate_into=main_grad)[0].sum().backward()
    assert parameter.grad is None


def test_half_precision_accumulates_without_rounding() -> None:
    """A gradient in an fp32 buffer keeps what bf16 would lose."""
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    main_grad = torch.zeros(V, H)
    linear_logprob(hidden, weight, labels, accumulate_into=main_grad)[0].sum().backward()
    assert not torch.equal(main_grad, main_grad.bfloat16().float())


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        logprob, _ = linear_logprob(hidden, weight, labels)
    assert logprob.grad_fn is None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_logprob(hidden, weight, labels, keep_bytes=KEEP_ALL)
        assert any(x.numel() == T * V for x in saved)
        saved.clear()
        linear_logprob(hidden, weight, labels)
        assert not any(x.numel() >= T * V for x in saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(2, T, H)}, "Flatten"),
        ({"hidden": torch.zeros(T, H + 1)}, "same h"),
        ({"labels": torch.zeros(T + 1, dtype=torch.int64)}, "same t"),
        ({"labels": torch.zeros(T, dtype=torch.int32)}, "int64"),
        ({"labels": torch.full((T,), V)}, f"label {V}"),
        ({"hidden": torch.zeros(T, H, dtype=torch.bfloat16)}, "bfloat16"),
        ({"hidden": torch.zeros(T, H).char(), "weight": torch.zeros(V, H).char()}, "int8"),
        ({"keep_bytes": -1}, "keep_bytes"),
        ({"temperature": float("inf")}, "temperature"),
        ({"labels": torch.zeros(T, dtype=torch.int64, device="meta")}, "one device"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk_tokens": -1}, "chunk_tokens"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"accumulate_into": torch.zeros(V, H + 1)}, "accumulate_into"),
        ({"accumulate_into": torch.zeros(V, H, dtype=torch.float64)}, "accumulate_into"),
        ({"known_gradient": torch.zeros(T + 1)}, "a number for every label"),
    ],
)
def test_mistakes_are_refused(change: dict, match: str) -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ShapeError, match=match):
        linear_logprob(**({"hidden": hidden, "weight": weight, "labels": labels} | change))


def test_top1_is_the_likeliest_label() -> None:
    hidden, weight, labels = inputs(64)
    best = (hidden @ weight.t()).argmax(dim=-1)
    labels = torch.where(torch.arange(64) % 2 == 0, best, labels)
    labels[7] = -100
    logprob, correct = linear_top1(hidden, weight, labels)
    torch.testing.assert_close(logprob, reference.linear_logprob(hidden, weight, labels)[0])
    assert torch.equal(correct, labels == best)


def test_equal_logits_are_all_correct() -> None:
    hidden, weight = torch.ones(2, 3), torch.ones(9, 3)
    assert linear_top1(hidden, weight, torch.tensor([0, 8]))[1].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_seen(value: float) -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        weight[16] = value
    logprob, entropy = linear_logprob(hidden, weight, labels, entropy=True)
    assert logprob.isnan().all() and entropy.isnan().all()


def test_operators_are_well_behaved() -> None:
    """Schema, fake kernels, no aliasing, no unseen mutation, tracing under torch.compile with dynamic shapes."""
    hidden, weight, labels = (x.detach() for x in inputs())
    statistics = (hidden, weight, labels, 1.0, True, 4, 5, 10)
    torch.library.opcheck(head_tiles.head_statistics, statistics, test_utils=OPCHECKS)
    largest, total, _, _, best, kept = head_tiles.head_statistics(*statistics)
    rows = (largest, total.log().float(), torch.ones(T), None, torch.ones(T), best, torch.ones(T))
    for main_grad in (None, torch.zeros(V, H)):
        arguments = (hidden, weight, labels, torch.arange(T) % 2 == 0, kept, *rows, 1.0, 4, 5, 10, True, True, main_grad)
        torch.library.opcheck(head_tiles.head_gradients, arguments, test_utils=OPCHECKS)


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("options", [{}, {"entropy": True, "keep_bytes": KEEP_SOME}])
def test_one_graph_under_compile(options: dict) -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        stats = linear_logprob(hidden * 2.0, weight, labels, **options)
        return stats.logprob.sum() + (0.0 if stats.entropy is None else stats.entropy.square().sum())

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden, weight, labels = inputs()
    torch.testing.assert_close(
        gradients(compiled(hidden, weight, labels), hidden, weight), gradients(loss(hidden, weight, labels), hidden, weight)
    )


@pytest.mark.parametrize("options", PATHS)
def test_fp32_tiles_of_half_precision_as_a_gpu_has_them(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the product gives fp32 logits of bf16 factors, backward needs their gradient in bf16 beside them."""

    def wide_product(out: Tensor, left: Tensor, right: Tensor) -> None:
        out.copy_(left.to(out.dtype) @ right.to(out.dtype))

    monkeypatch.setattr(head_tiles, "tile_dtype", lambda dtype, device: torch.float32)
    monkeypatch.setattr(head_tiles, "_product_into", wide_product)
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    labels[4] = -100
    keep = torch.rand(T, generator=torch.Generator().manual_seed(3)) < 0.6
    stats = linear_logprob(hidden, weight, labels, **options)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    exact = reference.linear_logprob(*wide, labels)
    torch.testing.assert_close(stats.logprob, exact[0])  # to fp32's precision: no logit was rounded to bf16
    actual = gradients(stats.logprob[keep].sum(), hidden, weight)
    expected = gradients(exact[0][keep].sum(), *wide)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-2)


GROUP_OF_FOUR = 4 * V * 4  # bytes of the logits of four tokens in fp32


@pytest.fixture
def any_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAST_GROUP, ("cpu", False), 1)


@pytest.mark.usefixtures("any_group")
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"chunk_tokens": 2}, {"temperature": 0.7}])
@pytest.mark.parametrize("t", [0, 1, 4, 11])
def test_a_known_gradient_gives_the_same(t: int, options: dict) -> None:
    hidden, weight, labels = inputs(t)
    known = torch.randn(t)
    labels[::3] = -1
    known[1::4] = 0.0
    expected = linear_logprob(hidden, weight, labels, **options)
    actual = linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=known, **options)
    assert_same(actual, expected, known, hidden, weight)
    assert actual.entropy is None or not actual.entropy.requires_grad


def assert_same(actual: TokenStats, expected: TokenStats, gradient: Tensor, *of: Tensor) -> None:
    """Results, and what the gradient of the log-probabilities becomes."""
    torch.testing.assert_close(actual.logprob, expected.logprob)
    torch.testing.assert_close(actual.entropy, expected.entropy)
    ours, its = (gradients((each.logprob * gradient).sum(), *of) for each in (actual, expected))
    torch.testing.assert_close(ours, its)


@pytest.mark.usefixtures("any_group")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("t", [0, 3, 9, 12])
@pytest.mark.parametrize("unit", [1, 3])
def test_a_guess_sees_whole_units_and_gives_the_same(unit: int, t: int, entropy: bool) -> None:
    hidden, weight, labels = inputs(t)
    shown: list[slice] = []

    def likelier_half(tokens: slice, stats: TokenStats) -> Tensor:
        shown.append(tokens)
        rows = stats.logprob.view(-1, unit)
        return (rows >= rows.median(dim=1, keepdim=True).values).float().flatten()

    guess = GradientGuess(likelier_half, unit)
    actual = linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=guess, entropy=entropy)
    assert [i for tokens in shown for i in range(tokens.start, tokens.stop)] == list(range(t))
    assert all(tokens.start % unit == tokens.stop % unit == 0 and tokens.stop - tokens.start <= 4 for tokens in shown)
    expected = linear_logprob(hidden, weight, labels, entropy=entropy)
    assert_same(actual, expected, likelier_half(slice(0, t), expected), hidden, weight)
    assert actual.entropy is None or not actual.entropy.requires_grad


def test_a_guess_of_units_that_do_not_fit_is_asked_token_by_token(any_group: None) -> None:
    hidden, weight, labels = inputs()
    shown: list[int] = []
    guess = GradientGuess(lambda tokens, stats: shown.append(tokens.stop - tokens.start) or torch.ones_like(stats.logprob), 5)
    linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=guess)
    assert sum(shown) == T and max(shown) <= 4


@pytest.mark.usefixtures("any_group")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("to", ["weight", "main_grad", "neither"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_wrong_guess_is_put_right(share: float, to: str, padding: int, implementation: str) -> None:
    """Of some tokens, of all, or of none; gradients that were not to be made, that were missing, and other ones."""
    hidden, weight, labels = inputs()
    labels[2] = -1
    v = V - padding
    labels.clamp_(max=v - 1)
    arrives = torch.tensor([0.0, 1.0, -0.5]).repeat(T)[:T]
    guessed = torch.where(torch.rand(T) < share, torch.tensor([1.0, 0.0, 2.0]).repeat(T)[:T], arrives)
    of = (hidden,) if to == "neither" else (hidden, weight)
    w = weight.detach() if to == "neither" else weight
    buffers = [torch.ones_like(weight) if to == "main_grad" else None for _ in range(2)]
    guess = GradientGuess(lambda tokens, stats: guessed[tokens])
    found = []
    for buffer, more in zip(buffers, ({"known_gradient": guess, "keep_bytes": GROUP_OF_FOUR}, {}), strict=True):
        out = linear_logprob(hidden, w, labels, vocab_size=v, accumulate_into=buffer, **more)
        grads = torch.autograd.grad((out.logprob * arrives).sum(), of, allow_unused=True)
        found.append([out.logprob, *grads] if buffer is None else [out.logprob, grads[0], buffer])
    torch.testing.assert_close(found[0], found[1])
    assert not found[0][1][::3].any()  # nothing is left of gradients that were not to be made


@pytest.mark.usefixtures("any_group")
def test_a_guess_leaves_the_gradient_to_be_taken_twice() -> None:
    hidden, weight, labels = inputs()
    guess = GradientGuess(lambda tokens, stats: torch.zeros_like(stats.logprob))
    loss = linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=guess).logprob.sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)


@pytest.mark.usefixtures("any_group")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_wrong_guess_is_put_right_before_the_sum_is_rounded(half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAST_GROUP, ("cpu", True), 1)
    hidden, weight, labels = inputs(dtype=half)
    arrives = torch.ones(T)
    guess = GradientGuess(lambda tokens, stats: arrives[tokens] * (torch.arange(tokens.start, tokens.stop) % 2))
    exact = reference.linear_logprob(hidden.double(), weight.double(), labels)[0]
    expected = torch.autograd.grad(exact.sum(), weight)[0].double()

    def error(**more: object) -> float:
        out = linear_logprob(hidden, weight, labels, **more).logprob
        return (torch.autograd.grad(out.sum(), weight)[0].double() - expected).abs().max().item()

    assert error(keep_bytes=GROUP_OF_FOUR, known_gradient=guess) <= 2.0 * error() + 1e-6


@pytest.mark.usefixtures("any_group")
def test_a_right_guess_takes_three_products_and_a_wrong_one_three_more_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    product = head_tiles._product_into
    monkeypatch.setattr(head_tiles, "_product_into", lambda out, *factors: (made.append(out.numel()), product(out, *factors)))
    hidden, weight, labels = inputs()
    wrong = torch.zeros(T)
    wrong[[1, 7]] = 1.0
    guess = GradientGuess(lambda tokens, stats: 1.0 - wrong[tokens])
    buffer = torch.zeros_like(weight)
    out = linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=guess, accumulate_into=buffer).logprob
    assert sum(made) == T * V
    made.clear()
    out.sum().backward(retain_graph=True)
    assert sum(made) == 2 * V
    made.clear()
    (out * (1.0 - wrong)).sum().backward()
    assert not made


@pytest.mark.usefixtures("any_group")
def test_nan_that_arrives_in_place_of_a_guess_is_seen() -> None:
    hidden, weight, labels = inputs()
    guess = GradientGuess(lambda tokens, stats: torch.ones_like(stats.logprob))
    out = linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=guess).logprob
    factor = torch.ones(T)
    factor[3] = torch.nan
    (out * factor).sum().backward()
    assert hidden.grad.isnan().all(dim=1).tolist() == [row == 3 for row in range(T)]


@pytest.mark.usefixtures("any_group")
def test_a_guess_must_give_a_number_for_every_token() -> None:
    hidden, weight, labels = inputs()
    guess = GradientGuess(lambda tokens, stats: torch.ones(1))
    with pytest.raises(ShapeError, match="a number for every one"):
        linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=guess)


@pytest.mark.usefixtures("any_group")
def test_a_known_gradient_takes_three_products_and_logits_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    product = head_tiles._product_into
    monkeypatch.setattr(
        head_tiles, "_product_into", lambda out, *factors: (made.append(tuple(out.shape)), product(out, *factors))
    )
    hidden, weight, labels = inputs()
    main_grad = torch.zeros_like(weight)
    out = linear_logprob(
        hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=torch.ones(T), accumulate_into=main_grad
    ).logprob
    assert sum(rows * columns for rows, columns in made) == T * V  # logits once; the weight's gradient is an addmm
    assert main_grad.any()  # already
    made.clear()
    out.sum().backward()
    assert not made and weight.grad is None


@pytest.mark.usefixtures("any_group")
@pytest.mark.parametrize("accumulates", [False, True])
def test_another_gradient_than_the_known_one_is_noticed(accumulates: bool) -> None:
    hidden, weight, labels = inputs()
    buffer = torch.zeros_like(weight) if accumulates else None
    out = linear_logprob(
        hidden, weight, labels, keep_bytes=KEEP_ALL, known_gradient=torch.ones(T), accumulate_into=buffer
    ).logprob
    with pytest.raises(RuntimeError, match="not the known_gradient that forward was given"):
        (2.0 * out).sum().backward()


@pytest.mark.usefixtures("any_group")
def test_nan_that_arrives_in_place_of_a_known_gradient_is_seen() -> None:
    """A loss that is no number must not look like one to whoever skips such steps."""
    hidden, weight, labels = inputs()
    out = linear_logprob(hidden, weight, labels, keep_bytes=KEEP_ALL, known_gradient=torch.ones(T)).logprob
    factor = torch.ones(T)
    factor[3] = torch.nan
    (out * factor).sum().backward()
    assert hidden.grad.isnan().all(dim=1).tolist() == [row == 3 for row in range(T)]


def test_a_known_gradient_is_left_aside_where_few_tokens_fit() -> None:
    hidden, weight, labels = inputs()
    for each in (weight, weight.bfloat16()):
        least = LEAST_GROUP["cpu", each.itemsize == 2]
        assert group_of_known(each, least * V * each.itemsize) == least
        assert group_of_known(each, least * V * each.itemsize - 1) == 0
    out = linear_logprob(hidden, weight, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=torch.ones(T)).logprob
    (2.0 * out).sum().backward()  # made from what arrives
    expected = gradients(2.0 * linear_logprob(hidden, weight, labels).logprob.sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.usefixtures("any_group")
def test_a_known_gradient_without_gradients_is_not_used() -> None:
    hidden, weight, labels = inputs()
    buffer = torch.zeros_like(weight)
    with torch.no_grad():
        linear_logprob(hidden, weight, labels, keep_bytes=KEEP_ALL, known_gradient=torch.ones(T), accumulate_into=buffer)
    assert not buffer.any()
    out = linear_logprob(hidden, weight.detach(), labels, keep_bytes=KEEP_ALL, known_gradient=torch.ones(T)).logprob
    out.sum().backward()  # of a weight that does not train
    torch.testing.assert_close(hidden.grad, gradients(linear_logprob(hidden, weight, labels).logprob.sum(), hidden)[0])


@pytest.mark.usefixtures("any_group")
def test_a_known_gradient_compiles_into_one_graph() -> None:
    hidden, weight, labels = inputs()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_logprob(x, w, labels, keep_bytes=GROUP_OF_FOUR, known_gradient=torch.ones(T)).logprob.sum()

    expected = gradients(loss(hidden, weight), hidden, weight)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, its in zip(gradients(compiled(hidden, weight), hidden, weight), expected, strict=True):
        torch.testing.assert_close(ours, its)
