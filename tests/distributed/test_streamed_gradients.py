"""Gradients of streamed layers in fp64 under every layout are those of the whole layers under the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarpt.device import runtime
from megarpt.model.build import build_network, transformer_config
from megarpt.model.forward import head_output, run_schedule
from megarpt.model.token_stats_gpt import HeadMode
from megarpt.parallel.layout import ParallelLayout
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from tests.distributed.test_layouts import CP, EP, EXPERTS, PP, SMALL, SP, TP, VOCAB, make_samples

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP),
    "sp2": (2, SP),
    "pp2": (2, PP),
    "cp2": (2, CP),
    "tp2-pp2": (4, {**TP, **PP}),
    "sp2-cp2": (4, {**SP, **CP}),
}


def gradients(parallel: dict[str, Any], stream: dict[str, Any], mcore: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the sum of weighted log-probabilities of two micro-batches with documents of several lengths, on this rank."""
    cfg = tiny_config(
        **{
            "model": {"preset": "tiny", "mcore": {**SMALL, **mcore}, "vocab_size": 384},
            "data.seq_length": 32,
            "parallel": parallel,
            "stream": stream,
        }
    )
    started = runtime.start("cpu")
    layout = ParallelLayout.resolve(cfg.parallel, started.world_size)
    groups = layout.initialize(seed=1)
    config = transformer_config(cfg, layout, is_cuda=False)
    config.params_dtype = config.pipeline_dtype = torch.float64
    torch.manual_seed(1)
    network = build_network(cfg, config, groups, vocab_size=VOCAB, backend="torch").double().train()

    def step(work: Any, model: torch.nn.Module) -> Any:
        batch, weights = next(work)
        out = head_output(model, batch, HeadMode.LOGPROB)
        if isinstance(out, torch.Tensor):
            return out, None
        count = torch.ones((), dtype=torch.int32)
        return out[0], lambda logprob: ((logprob * weights).sum(), count, {})

    generator = torch.Generator().manual_seed(2)
    batches = [make_samples(0, rows) for rows in torch.arange(8).view(2, 4)]
    weights = [torch.randn(batch.tokens.shape, dtype=torch.float64, generator=generator) for batch in batches]
    run_schedule([network], list(zip(batches, weights, strict=True)), step, groups, forward_only=False)
    for parameter in network.parameters():
        if getattr(
            parameter, "sequence_parallel", False
        ):  # each rank has the part of its own tokens, which streaming deals out
            torch.distributed.all_reduce(parameter.grad, group=groups.collection.tp)
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def compare(parallel: dict[str, Any], mcore: dict[str, Any], chunk_tokens: int) -> float:
    """Largest relative difference of a parameter's gradient on this rank."""
    whole = gradients(parallel, {}, mcore)
    streamed = gradients(parallel, {"layers": True, "chunk_tokens": chunk_tokens}, mcore)
    assert whole.keys() == streamed.keys() and len(whole) > 5
    return max(float((streamed[n] - whole[n]).norm() / whole[n].norm().clamp(min=1e-30)) for n in whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    assert max(spawn(world, compare, parallel, {}, 22)) < 1e-12


def test_fp64_of_experts() -> None:
    assert max(spawn(2, compare, EP, EXPERTS, 22)) < 1e-12
