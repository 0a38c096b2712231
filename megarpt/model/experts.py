"""What the routers of a mixture of experts report of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from megarpt.parallel.layout import ProcessGroups

_TRACKED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def take_balance_losses(
    config: TransformerConfig, groups: ProcessGroups, num_microbatches: int, device: torch.device
) -> dict[str, float]:
    """Tag -> auxiliary loss before its coefficient, the mean over layers, micro-batches and data-parallel ranks; 1 when every
    expert gets the same. Counting begins anew. Empty for other models.

    Collectives: an all-reduce of one number per kind of loss over the world. Cost: one wait for the device per kind.
    """
    if config.num_moe_experts is None:
        return {}
    kinds = config.moe_router_load_balancing_type
    tracker = get_moe_layer_wise_logging_tracker()
    losses = {}
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        name = _TRACKED.get(kind)
        if name is None:
            continue
        values = tracker[name]["values"] if name in tracker else None  # a stage may have no mixture layer
        own = torch.zeros(2, dtype=torch.float64, device=device)  # loss, layers
        if values is not None:
            own[0], own[1] = values.sum(), (values > 0.0).sum()
        dist.all_reduce(own)
        total, layers = own.tolist()
        # A rank has a part of the loss of its tensor- and context-parallel group, or of all data-parallel ranks.
        shares = groups.tp.size() * (groups.dp_cp.size() if kind == "global_aux_loss" else groups.cp.size())
        if layers:
            losses[f"moe/{name}"] = total * shares / (layers * num_microbatches)
    clear_aux_losses_tracker()
    return losses
