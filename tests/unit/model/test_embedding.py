"""Gradients of embeddings that go to main_grad row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megarpt.device.runtime import Runtime
from megarpt.model.build import build_model, build_network, transformer_config, unwrap
from megarpt.model.embedding import RowGradients
from megarpt.model.forward import head_output
from megarpt.model.token_stats_gpt import HeadMode
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.testing.batches import random_batch
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.memory import peak_bytes

ROWS, WIDTH = 1000, 8
TOKENS = torch.tensor([[3, 999, 3], [0, 3, 7]])


def table(dtype: torch.dtype, main_grad: torch.Tensor | None) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype))
    if main_grad is not None:
        weight.main_grad = main_grad
    return weight


def look_up(weight: torch.nn.Parameter, **options: object) -> torch.Tensor:
    with RowGradients():
        return F.embedding(TOKENS, weight, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_autograds_and_only_rows_of_it_are_made(dtype: torch.dtype) -> None:
    upstream = torch.randn(*TOKENS.shape, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = table(torch.float64, None)
    F.embedding(TOKENS, plain).backward(upstream.double())
    wide = torch.promote_types(dtype, torch.float32)
    weight = table(dtype, torch.ones(ROWS, WIDTH, dtype=wide))
    out = look_up(weight)
    assert torch.equal(out, F.embedding(TOKENS, weight))
    assert peak_bytes(lambda: out.backward(upstream), torch.device("cpu")) < ROWS * WIDTH * dtype.itemsize / 4
    torch.testing.assert_close(weight.main_grad, 1.0 + plain.grad.to(wide))  # added, in main_grad's precision
    assert weight.grad_added_to_main_grad and weight.grad.is_sparse and weight.grad._nnz() == 0


def test_other_lookups_are_left_alone() -> None:
    weight = table(torch.float32, None)
    look_up(weight).sum().backward()
    assert weight.grad[3].eq(3.0).all() and weight.grad.sum() == TOKENS.numel() * WIDTH
    for options in ({"padding_idx": 3}, {"scale_grad_by_freq": True}):
        weight, other = table(torch.float32, torch.zeros(ROWS, WIDTH)), table(torch.float32, None)
        look_up(weight, **options).sum().backward()
        F.embedding(TOKENS, other, **options).sum().backward()
        torch.testing.assert_close(weight.grad, other.grad)
        assert not weight.main_grad.any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "gpt2-124m"])
def test_a_model_has_the_gradients_of_one_that_autograd_differentiates(
    preset: str, tied: bool, cpu_runtime: Runtime, one_rank: ProcessGroups
) -> None:
    """Tied to the head or not, with learned positions or without; main_grad by megatron-core's DDP."""
    vocab = 300
    cfg = tiny_config(
        **{
            "model": {"preset": preset, "mcore": TWO_LAYERS, "gpt": {"share_embeddings_and_output_weights": tied}},
            "data.seq_length": 16,
        }
    )
    torch.manual_seed(0)
    (model,) = build_model(cfg, ParallelLayout(), one_rank, cpu_runtime, vocab_size=vocab)
    batch = random_batch(2, 16, vocab, seed=0)
    for _ in range(2):  # the second adds to the first
        head_output(model, batch, HeadMode.LOGPROB)[0].sum().backward()
    found = {name: parameter.main_grad.clone() for name, parameter in unwrap(model).named_parameters()}
    config = transformer_config(cfg, ParallelLayout(), is_cuda=False)
    network = build_network(cfg, config, one_rank, vocab_size=vocab, backend="torch")  # no DDP and no main_grad
    network.load_state_dict(unwrap(model).state_dict())
    (2.0 * head_output(network, batch, HeadMode.LOGPROB)[0].sum()).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
