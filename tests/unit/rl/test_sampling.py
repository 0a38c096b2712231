"""Drawing: the numbers, the distribution, its truncation and the log-probabilities."""

import math

import pytest
import torch

from megarpt.rl.sampling import draw, stream_key, truncate, uniforms

VOCAB = 300  # no multiple of the columns that are summed at once


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def grid(count: int) -> torch.Tensor:
    """Evenly spread uniform numbers, which draw every token as often as its probability says."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_uniform_numbers_are_the_same_everywhere() -> None:
    keys = [stream_key(1234, "prompt", 0), stream_key(1234, "prompt", 1)]
    assert keys == [12337407944460428188, 5226678735223967904]
    assert uniforms(keys, [0, 7]).tolist() == [0.04239911372520211, 0.013210522819479098]


def test_uniform_numbers_are_of_splitmix64() -> None:
    # The first numbers of the generator's published C code for the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert uniforms([1234567] * 3, [0, 1, 2]).tolist() == [(x >> 11) * 2.0**-53 for x in published]


def test_uniform_numbers_depend_on_seed_prompt_sample_and_position() -> None:
    places = [(seed, prompt, sample, at) for seed in (1, 2) for prompt in ("a", "b") for sample in (0, 1) for at in (0, 1)]
    numbers = uniforms([stream_key(*place[:3]) for place in places], [place[3] for place in places])
    assert len(set(numbers.tolist())) == len(places)
    # Parts do not run into each other.
    assert len({stream_key(1, "1/a", 2), stream_key(1, "a", 21), stream_key(12, "a", 1), stream_key(1, "2/1/a", 2)}) == 4


def test_uniform_numbers_are_uniform() -> None:
    n, bins = 40_000, 50
    streams = [stream_key(5, str(i), i % 7) for i in range(200)]
    numbers = uniforms([key for key in streams for _ in range(200)], list(range(200)) * 200)
    counts = torch.histc(numbers, bins, 0.0, 1.0)
    chi_square = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert chi_square < bins - 1 + 5 * math.sqrt(2 * (bins - 1))
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 5 / math.sqrt(n)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 1.0), (0, 0.8), (20, 0.8)])
def test_inverts_the_cumulative_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(1).expand(5000, -1)
    uniform = grid(5000)
    tokens, logprobs = draw(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
    log_p = truncate(logits[:1] / temperature, top_k, top_p)[0].double().log_softmax(0)
    torch.testing.assert_close(logprobs, log_p[tokens], atol=1e-6, rtol=0)
    edges = log_p.exp().cumsum(0)
    assert bool((uniform < edges[tokens] + 1e-6).all()) and bool((uniform > edges[tokens] - log_p.exp()[tokens] - 1e-6).all())
    counts = torch.bincount(tokens, minlength=VOCAB)
    assert float((counts / 5000 - log_p.exp()).abs().max()) < 1.1 / 5000


def test_frequencies_of_seeded_draws_match_the_distribution() -> None:
    n, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 0.25])
    streams = [stream_key(3, f"prompt {i}", i % 8) for i in range(n)]
    tokens, _ = draw(logits.expand(n, -1), uniforms(streams, [4] * n), temperature=0.7)
    expected = n * (logits / 0.7).softmax(0)
    chi_square = float(((torch.bincount(tokens, minlength=7) - expected) ** 2 / expected).sum())
    assert chi_square < 6 + 5 * math.sqrt(12)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(2, 1.0, {0, 1}), (0, 0.6, {0}), (0, 0.7, {0, 1}), (0, 1.0, {0, 1, 2, 3})]
)
def test_draws_from_what_truncation_leaves(top_k: int, top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(2000, -1)  # the first token alone holds 0.64
    tokens, logprobs = draw(logits, grid(2000), temperature=1.0, top_k=top_k, top_p=top_p)
    assert set(tokens.tolist()) == kept
    total = sum(math.exp(float(logprobs[tokens == token][0])) for token in kept)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_the_likeliest_of_a_small_mass_alone_stays() -> None:
    tokens, logprobs = draw(random_logits(4), grid(4), temperature=1.0, top_p=1e-9)
    assert tokens.tolist() == random_logits(4).argmax(-1).tolist()
    assert logprobs.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_ties_with_the_last_of_top_k_stay_in() -> None:
    kept = truncate(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), top_k=2, top_p=1.0)
    assert kept.isfinite().tolist() == [[True, True, True, False]]


def test_temperature_0_takes_the_likeliest_with_certainty() -> None:
    logits = random_logits(50)
    tokens, logprobs = draw(logits, grid(50), temperature=0.0, top_k=5, top_p=0.5)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert logprobs.tolist() == [0.0] * 50


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("allowed", [[0], [VOCAB - 1], [127, 128], [5, 250]])
def test_never_draws_what_has_no_probability(uniform: float, allowed: list[int]) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[:, allowed] = torch.tensor([1.0, -40.0])[: len(allowed)]
    tokens, logprobs = draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0)
    assert tokens.item() in allowed
    assert math.isfinite(logprobs.item())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_give_nan(broken: float, temperature: float) -> None:
    logits = random_logits(2)
    logits[1, 7] = broken
    tokens, logprobs = draw(logits, grid(2), temperature=temperature)
    assert logprobs.isnan().tolist() == [False, True]
    assert all(0 <= token < VOCAB for token in tokens.tolist())


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    logits, uniform = random_logits(17), grid(17)
    whole = draw(logits, uniform, temperature=0.8, top_k=50, top_p=0.9)
    for row in range(17):
        alone = draw(logits[row : row + 1], uniform[row : row + 1], temperature=0.8, top_k=50, top_p=0.9)
        assert [x[row].item() for x in whole] == [x.item() for x in alone]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_of_that_mass(top_p: float) -> None:
    scores = random_logits(20, scale=2.0)
    kept = truncate(scores, 0, top_p).isfinite()
    for row, inside in zip(scores.double().softmax(-1), kept, strict=True):
        assert float(row[inside].sum()) >= top_p - 1e-6
        assert float(row[inside].sum() - row[inside].min()) < top_p + 1e-6
        assert float(row[inside].min()) > float(row[~inside].max())


def test_ties_with_the_token_that_crosses_top_p_stay_in() -> None:
    kept = truncate(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), top_k=0, top_p=0.85)  # 3.0 alone holds 0.76
    assert kept.isfinite().tolist() == [[True, True, True, False]]
