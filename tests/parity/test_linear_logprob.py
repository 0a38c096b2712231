"""The head op's accuracy: at most twice plain torch's error against fp64, finite differences, and two ranks against one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.ops import _ext, head_tiles, reference
from megarpt.ops.linear_logprob import LEAST_GROUP, GradientGuess, VocabShard, linear_logprob, linear_top1
from megarpt.testing.distributed import spawn
from megarpt.testing.oracle import assert_within_twice

CHUNK = 16


def draw(t: int, h: int, v: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels and upstream gradients [2, t], two fifths of whose rows are zero; fp64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, h, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(v, h, generator=generator, dtype=torch.float64) / h**0.5
    labels = torch.randint(0, v, (t,), generator=generator)
    upstream = torch.randn(2, t, generator=generator, dtype=torch.float64) * (torch.rand(t, generator=generator) < 0.6)
    return hidden, weight, labels, upstream


def evaluate(function, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, entropy: bool) -> dict[str, Tensor]:
    """Results and gradients of one implementation, on leaf copies."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logprob, entropies = function(hidden, weight, labels)
    loss = (logprob * upstream[0].to(logprob.dtype)).sum()
    results = {"logprob": logprob}
    if entropy:
        loss = loss + (entropies * upstream[1].to(logprob.dtype)).sum()
        results["entropy"] = entropies
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return results | {"grad_hidden": grad_hidden, "grad_weight": grad_weight}


pytestmark = pytest.mark.usefixtures("implementation")

MODES = {"recomputed": {}, "kept": {"keep_bytes": 2**30}, "some kept": {"keep_bytes": 2**13}, "chunks": {"chunk_tokens": CHUNK}}
KNOWN = {"known": {"keep_bytes": 2**30}, "known, in groups": {"keep_bytes": 2**13}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("tile", [None, (24, 6)], ids=["whole", "tiles"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "shape", [(1, 8, 7), (13, 32, 101), (CHUNK - 1, 16, 64), (CHUNK, 16, 257), (CHUNK + 1, 48, 2), (61, 24, 2051)]
)
def test_error_is_at_most_twice_plain_torchs(dtype, entropy, tile, mode, shape, monkeypatch) -> None:
    if tile is not None:  # columns and rows of a tile that real sizes have more of
        monkeypatch.setitem(head_tiles.TILE_COLUMNS, "cpu", tile[0])
        monkeypatch.setitem(head_tiles.TILE_BYTES, "cpu", tile[0] * tile[1] * dtype.itemsize)
    for scale, temperature in ((1.0, 1.0), (20.0, 0.7)):  # ordinary and very peaked distributions
        exact = draw(*shape, scale=scale)
        hidden, weight = (x.to(dtype) for x in exact[:2])
        labels, upstream = exact[2:]

        def plain(x: Tensor, w: Tensor, y: Tensor, temperature: float = temperature):
            return reference.linear_logprob(x, w, y, temperature)

        def ours(x: Tensor, w: Tensor, y: Tensor, temperature: float = temperature):
            return linear_logprob(x, w, y, temperature=temperature, entropy=entropy, **mode)

        oracle = evaluate(plain, hidden.double(), weight.double(), labels, upstream, entropy)
        plains = evaluate(plain, hidden, weight, labels, upstream, entropy)
        actual = evaluate(ours, hidden, weight, labels, upstream, entropy)
        for name, value in actual.items():
            assert value.dtype == (dtype if name.startswith("grad") else torch.float32)
            # plain torch is exact by luck on tiny shapes: allow a few units in the last place of the largest value
            floor = 4.0 * torch.finfo(value.dtype).eps * float(oracle[name].detach().abs().max())
            assert_within_twice(value, plains[name], oracle[name], floor=floor, name=f"{name} at scale {scale}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, (24, 6)], ids=["whole", "tiles"])
@pytest.mark.parametrize("mode", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("is_guess", [False, True], ids=["known", "guess"])
@pytest.mark.parametrize("shape", [(1, 8, 7), (13, 32, 101), (CHUNK + 1, 48, 2), (61, 24, 2051)])
def test_error_with_a_known_gradient_is_at_most_twice_plain_torchs(dtype, tile, mode, is_guess, shape, monkeypatch) -> None:
    """Also where it is guessed, a third of the tokens wrong."""
    monkeypatch.setitem(LEAST_GROUP, ("cpu", dtype.itemsize < 4), 1)
    if tile is not None:
        monkeypatch.setitem(head_tiles.TILE_COLUMNS, "cpu", tile[0])
        monkeypatch.setitem(head_tiles.TILE_BYTES, "cpu", tile[0] * tile[1] * dtype.itemsize)
    for scale, temperature in ((1.0, 1.0), (20.0, 0.7)):
        exact = draw(*shape, scale=scale)
        hidden, weight = (x.to(dtype) for x in exact[:2])
        labels, upstream = exact[2], exact[3].float().clone()
        upstream[0, 1::2] = 0.0
        wrong = torch.arange(labels.numel()) % 3 == 0
        guessed = torch.where(wrong, torch.where(upstream[0] == 0.0, exact[3][0].float(), 0.0), upstream[0])
        guess = GradientGuess(lambda tokens, stats, guessed=guessed: guessed[tokens])
        options = {"temperature": temperature, "known_gradient": guess if is_guess else upstream[0]} | mode

        def plain(x: Tensor, w: Tensor, y: Tensor, temperature: float = temperature):
            return reference.linear_logprob(x, w, y, temperature)

        def ours(x: Tensor, w: Tensor, y: Tensor, options: dict = options):
            return linear_logprob(x, w, y, **options)

        oracle = evaluate(plain, hidden.double(), weight.double(), labels, upstream, False)
        plains = evaluate(plain, hidden, weight, labels, upstream, False)
        actual = evaluate(ours, hidden, weight, labels, upstream, False)
        for name, value in actual.items():
            floor = 4.0 * torch.finfo(value.dtype).eps * float(oracle[name].detach().abs().max())
            assert_within_twice(value, plains[name], oracle[name], floor=floor, name=f"{name} at scale {scale}")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_are_the_finite_differences(mode, temperature) -> None:
    hidden, weight, labels, _ = draw(5, 3, 7)
    labels[2] = -100
    hidden.requires_grad_(), weight.requires_grad_()

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear_logprob(x, w, labels, temperature=temperature, entropy=True, **mode)

    assert torch.autograd.gradcheck(both, (hidden, weight))
    assert torch.autograd.gradcheck(lambda x, w: both(x, w)[1], (hidden, weight))
    assert torch.autograd.gradcheck(
        lambda x, w: linear_logprob(x, w, labels, temperature=temperature, **mode)[0], (hidden, weight)
    )


@pytest.mark.parametrize("entropy", [False, True])
def test_chunk_sizes_agree(entropy) -> None:
    arguments = draw(37, 16, 129)
    expected = evaluate(lambda *x: linear_logprob(*x, entropy=entropy), *arguments, entropy)
    for chunk in (1, 5, 36, 37, 38):
        actual = evaluate(lambda *x, chunk=chunk: linear_logprob(*x, entropy=entropy, chunk_tokens=chunk), *arguments, entropy)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-13, msg=name)


def test_improbable_labels_keep_their_logprob() -> None:
    """Probabilities that underflow must not become minus infinity."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [300.0]])
    logprob, _ = linear_logprob(hidden, weight, torch.tensor([0]))
    assert logprob.item() == -300.0


def test_near_certain_tokens_do_not_depend_on_rounding() -> None:
    """Backward multiplies again, possibly in another order; of a distribution with one likely token all digits cancel."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(97, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 64, generator=generator).bfloat16()
    best = (hidden.float() @ weight.float().t()).argmax(dim=-1)
    labels = (best + 1) % 50  # never the likely one
    logprob = linear_logprob(4.0 * hidden, weight, labels).logprob
    (ours,) = torch.autograd.grad(logprob.sum(), hidden)
    (exact,) = torch.autograd.grad(reference.linear_logprob(4.0 * hidden.double(), weight.double(), labels)[0].sum(), hidden)
    (plain,) = torch.autograd.grad(reference.linear_logprob(4.0 * hidden, weight, labels)[0].sum(), hidden)
    assert_within_twice(ours, plain, exact, name="grad_hidden")


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_one(world: int, implementation: str) -> None:
    """The vocabulary split over ranks, unevenly padded: results equal, gradients equal once summed over ranks."""
    spawn(world, check_rank, implementation == "compiled")


def check_rank(compiled: bool) -> None:
    """Compare this rank's part with the whole, on every path; a vocabulary of 5 leaves later ranks nothing but padding."""
    if not compiled:
        _ext._C = None
    rank, world = dist.get_rank(), dist.get_world_size()
    head_tiles.TILE_COLUMNS["cpu"], head_tiles.TILE_BYTES["cpu"] = 7, 7 * 8 * 4
    LEAST_GROUP["cpu", False] = 1
    cases = itertools.product(
        (29, 32, 5), (False, True), ({}, {"chunk_tokens": 4}, {"keep_bytes": 800}, "known", "guess"), (1.0, 0.6)
    )
    for v, entropy, mode, temperature in cases:
        hidden, weight, labels, upstream = draw(13, 8, v, seed=v)
        if isinstance(mode, str):
            wrong = torch.arange(13) % 3 == 0
            guessed = torch.where(wrong, upstream[0] - 1.0, upstream[0])
            of_tokens = GradientGuess(lambda tokens, stats, guessed=guessed: guessed[tokens], unit=2)
            known = {"known": upstream[0], "guess": of_tokens}[mode]
            mode, entropy = {"keep_bytes": 5 * 16 * 8, "known_gradient": known}, False  # five tokens of a rank's part
        labels[3] = -100
        rows = 16
        padded = torch.cat([weight, torch.full((rows * world - v, weight.shape[1]), 3.0, dtype=weight.dtype)])
        shard = padded[rank * rows : (rank + 1) * rows]
        options = {"entropy": entropy, "temperature": temperature} | mode
        group = {"tp_group": dist.group.WORLD, "vocab_start": rank * rows, "vocab_size": v}
        expected = evaluate(lambda *x, o=options: linear_logprob(*x, **o), hidden, weight, labels, upstream, entropy)
        actual = evaluate(lambda *x, o=options | group: linear_logprob(*x, **o), hidden, shard, labels, upstream, entropy)
        dist.all_reduce(actual["grad_hidden"])
        start, end = min(v, rank * rows), min(v, (rank + 1) * rows)
        if actual["grad_weight"][end - start :].any():
            raise AssertionError(f"rank {rank}, v {v}: padding has a gradient")
        actual["grad_weight"] = actual["grad_weight"][: end - start]
        expected["grad_weight"] = expected["grad_weight"][start:end]
        for name in expected:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-11, atol=1e-12, msg=f"rank {rank}: {name} differs, v {v}, {options}"
            )
        top1 = linear_top1(hidden, shard, labels, VocabShard(rank * rows, v, dist.group.WORLD))
        whole = linear_top1(hidden, weight, labels)
        torch.testing.assert_close(top1[0], whole[0], rtol=1e-11, atol=1e-12)
        if not torch.equal(top1[1], whole[1]):
            raise AssertionError(f"rank {rank}, v {v}: top-1 differs")
