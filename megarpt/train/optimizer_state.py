"""The optimizer's state in a checkpoint: the same files from every kind of megatron-core optimizer under every layout.

megatron-core's plain, distributed and chained optimizers keep the same numbers (an fp32 master and two moments per parameter,
one count of steps) in differently nested dictionaries, of which it stores everything that is not a tensor as it is. Here only
the tensors are stored, under names of their own, and the count of steps beside them; all else is what the loading optimizer
was built with. So a run may go on with another optimizer than it was saved by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

# The one form of the distributed optimizer's state that loads under every layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "optimizer.state.param."
_MASTER_OF_PLAIN = "optimizer.state.fp32_param."


def steps_of(optimizer: ChainedOptimizer) -> int:
    """Updates made so far on this rank; 0 without parameters."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups if group["params"]), default=0)


def sharded_optimizer(optimizer: ChainedOptimizer, weights: dict[str, Any], *, is_loading: bool = False) -> Any:
    """The optimizer's tensors as sharded tensors; when loading, their present values may be overwritten.

    Args:
        optimizer: megatron-core's.
        weights: the sharded state of the model it optimizes.
        is_loading: make room for the state instead of reading it.

    Collectives: with the distributed optimizer a gather of its state within data parallelism, unless loading.
    """
    sharded = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_METADATA))
    parts = [sharded] if len(optimizer.chained_optimizers) == 1 else [sharded[i] for i in sorted(sharded)]
    for part, state in zip(optimizer.chained_optimizers, parts, strict=True):
        if isinstance(part, DistributedOptimizer) and not part.config.bf16:
            _leave_masters_to_the_weights(part, state["param_state"])
    return dict_list_map_inplace(_stored, sharded)


def load_optimizer(optimizer: ChainedOptimizer, loaded: Any, steps: int) -> None:
    """Hand the optimizer what was read into its `sharded_optimizer`."""
    for group in _param_groups(loaded):
        group["step"] = steps
    optimizer.load_state_dict(loaded)


@torch.no_grad()
def restart_optimizer(optimizer: ChainedOptimizer) -> None:
    """Forget the moments and the count of steps, as if no update had been made; parameters and masters stay."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            for name in _MOMENTS:
                state[name].zero_()
    for group in optimizer.param_groups:
        group["step"] = 0


def _stored(entry: Any) -> Any:
    if not isinstance(entry, ShardedBase | LocalNonpersistentObject):
        return LocalNonpersistentObject(entry)
    key = getattr(entry, "key", "")
    return replace(entry, key=_MASTER + key.removeprefix(_MASTER_OF_PLAIN)) if key.startswith(_MASTER_OF_PLAIN) else entry


def _leave_masters_to_the_weights(optimizer: MegatronOptimizer, state: dict[int, dict[str, Any]]) -> None:
    """In fp32 the masters are the weights, which lie in the checkpoint already."""
    for number, parameter in enumerate(_parameters_in_order(optimizer.buffers)):
        state[number]["param"] = LocalNonpersistentObject(parameter.detach())


def _parameters_in_order(buffers: Sequence[Any]) -> Iterator[torch.nn.Parameter]:
    """The order in which megatron-core numbers the parameters of a distributed optimizer."""
    for buffer in buffers:
        yield from buffer.param_index_map


def _param_groups(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from value if key == "param_groups" else _param_groups(value)
