"""How many parameters a model has, whatever the layout it is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megarpt.model.build import unwrap
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ProcessGroups


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Of the whole model, each parameter once."""

    total: int
    multiplying: float  # those a token is multiplied with: no embedding that is merely looked up, only the chosen experts
    num_layers: int
    attention_width: int  # heads * head size


def total_parameters(chunks: Sequence[torch.nn.Module], groups: ProcessGroups) -> ParameterCount:
    """Count the parameters of the model these chunks are a part of.

    Collectives: two all-reduces of a few numbers over the model-parallel ranks.
    """
    networks = [unwrap(chunk) for chunk in chunks]
    config = networks[0].config
    dense, lookup, experts = 0, 0, 0
    for network in networks:
        looked_up = _looked_up(network)
        for name, parameter in network.named_parameters():
            if ".mlp.experts." in name:
                experts += parameter.numel()
            elif param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, tp_group=groups.tp):
                dense += parameter.numel()
                lookup += parameter.numel() if parameter in looked_up else 0
    counts = torch.tensor([dense, lookup], dtype=torch.float64)
    expert_count = torch.tensor([experts], dtype=torch.float64)
    device = next(networks[0].parameters()).device
    counts, expert_count = counts.to(device), expert_count.to(device)
    dist.all_reduce(counts, group=groups.collection.mp)
    dist.all_reduce(expert_count, group=groups.collection.tp_ep_pp)
    dense, lookup, experts = (int(x) for x in [*counts.tolist(), *expert_count.tolist()])
    chosen = config.moe_router_topk / config.num_moe_experts if config.num_moe_experts else 0.0
    return ParameterCount(
        total=dense + experts,
        multiplying=dense - lookup + experts * chosen,
        num_layers=config.num_layers,
        attention_width=config.num_attention_heads * config.kv_channels,
    )


def _looked_up(network: TokenStatsGPT) -> set[torch.nn.Parameter]:
    if not network.pre_process:
        return set()
    tied = network.share_embeddings_and_output_weights
    named = network.embedding.named_parameters()
    return {parameter for name, parameter in named if not (tied and name.startswith("word_embeddings"))}
