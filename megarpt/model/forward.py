"""Running micro-batches through a model that may be divided over pipeline stages, context- and tensor-parallel ranks.

Whoever calls sees whole micro-batches: tokens go in as [b, s] and statistics come out as [b, s], whatever the layout. They
come out on the last pipeline stage only.

Dims: b micro-batch, s sequence, t = b * s packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from megarpt.model.build import unwrap
from megarpt.model.token_stats_gpt import HeadMode, TokenStatsGPT
from megarpt.ops.linear_logprob import GradientGuess
from megarpt.parallel.context import gather_shares, query_ranges, take_share
from megarpt.parallel.layout import ProcessGroups
from megarpt.streaming.chunks import Chunk, PackedSegments, cut, deal
from megarpt.structs import TokenBatch, TokenStats

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[[Tensor], Any] | None]]
WeightGuess = Callable[[slice, TokenStats], Tensor]  # (some tokens of the micro-batch, their statistics) -> weights, [n] each


def head_output(
    model: torch.nn.Module, batch: TokenBatch, mode: HeadMode, weight: Tensor | WeightGuess | None = None
) -> Tensor | tuple[Tensor, Tensor | None]:
    """One model chunk over one micro-batch, flattened so that documents are attention segments.

    Args:
        weight: [b, s] what each token is worth, where that is known already (the loss will be the sum of weight * -logprob, to
            the last bit), or a guess of it (the closer, the less is to be computed twice; asked of the first tokens first).
            A guess is not made use of where a rank does not see the tokens in their order.

    Returns what the head computes, [b, s] each, on the chunk that has the head, and hidden states elsewhere.

    Collectives: under context parallelism one all-gather of [t] for each result.
    """
    b, s = batch.tokens.shape
    network = unwrap(model)
    cp = network.pg_collection.cp
    network.head_mode = mode
    chunks, dealt = _stream(network, batch)
    packed = PackedSegments(
        qkv_format="sbhd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=s,
        max_seqlen_kv=s,
        ranges=query_ranges(batch.cu_seqlens, b * s, cp.rank(), cp.size()),
        chunks=chunks,
        dealt=dealt,
    )

    def share(values: Tensor) -> Tensor:
        own = take_share(values.flatten(), cp)
        return (own if dealt is None else own[dealt])[None]

    guess = None
    if callable(weight) and cp.size() == 1 and dealt is None:
        guess = GradientGuess(lambda tokens, stats: -weight(tokens, stats), unit=s)
    out = model(
        input_ids=share(batch.tokens),
        position_ids=share(batch.position_ids),
        attention_mask=None,
        labels=share(batch.labels),
        loss_mask=share(weight) if isinstance(weight, Tensor) else guess,
        packed_seq_params=packed,
    )
    if not network.post_process:
        return out

    def whole(values: Tensor) -> Tensor:
        own = values if dealt is None else torch.empty_like(values).index_copy(0, dealt, values)
        return gather_shares(own, cp, sums_gradients=False).view(b, s)

    first, second = (None if x is None else whole(x) for x in out)
    assert first is not None
    return first, second


def _stream(network: TokenStatsGPT, batch: TokenBatch) -> tuple[tuple[Chunk, ...], Tensor | None]:
    """How the network's layers are to cut the micro-batch, and how its tokens are to be dealt out for that."""
    if not network.stream_chunk_tokens:
        return (), None
    cp, tp = network.pg_collection.cp, network.pg_collection.tp
    sp_size = tp.size() if network.config.sequence_parallel else 1
    chunks = cut(
        batch.cu_seqlens,
        batch.tokens.numel(),
        network.stream_chunk_tokens,
        cp_rank=cp.rank(),
        cp_size=cp.size(),
        sp_size=sp_size,
    )
    return chunks, deal(chunks, sp_size, batch.tokens.device) if sp_size > 1 else None


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    work: Sequence[tuple[TokenBatch, Any]],
    forward_step: ForwardStep,
    groups: ProcessGroups,
    *,
    forward_only: bool,
) -> None:
    """megatron-core's schedule for this layout over the micro-batches of a step: 1F1B, interleaved, or none.

    Args:
        chunks: of this rank.
        work: what `forward_step` takes from its iterator, once for each micro-batch and chunk.
        forward_step: megatron-core's contract.
        groups: of the layout.
        forward_only: no gradients.
    """
    pp_size, vp_size = groups.pp.size(), len(chunks) if len(chunks) > 1 else None
    b, s = work[0][0].tokens.shape
    communicator = P2PCommunicator(pp_group=groups.pp, config=get_model_config(chunks[0])) if pp_size > 1 else None
    get_forward_backward_func(pp_size, vp_size)(
        forward_step_func=forward_step,
        data_iterator=[iter(work) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(work),
        seq_length=b * s,  # of the flattened micro-batch, from which the schedule takes the shape of what stages exchange
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=communicator,
        pg_collection=groups.collection,
    )


def forward_all(
    chunks: Sequence[torch.nn.Module], batches: Sequence[TokenBatch], mode: HeadMode, groups: ProcessGroups
) -> list[tuple[Tensor, Tensor | None]]:
    """What the head computes for every micro-batch, without gradients; empty on all stages but the last.

    Under the interleaved schedule the number of micro-batches must be a multiple of the number of stages.
    """
    results: list[tuple[Tensor, Tensor | None]] = []

    def step(work: Iterator[tuple[TokenBatch, None]], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
        out = head_output(model, next(work)[0], mode)
        if isinstance(out, Tensor):
            return out, None
        results.append(out)
        return out[0], lambda output: (output.sum(), torch.zeros((), dtype=torch.int, device=output.device), {})

    with torch.no_grad():
        run_schedule(chunks, [(batch, None) for batch in batches], step, groups, forward_only=True)
    return results


def token_stats(
    chunks: Sequence[torch.nn.Module], batches: Sequence[TokenBatch], groups: ProcessGroups, *, entropy: bool = False
) -> list[TokenStats]:
    """Log-probabilities (and entropies) of all labels, without gradients; empty on all stages but the last.

    Shapes: logprob [b, s], entropy [b, s] or None, for every micro-batch.
    """
    mode = HeadMode.LOGPROB_ENTROPY if entropy else HeadMode.LOGPROB
    return [TokenStats(*out) for out in forward_all(chunks, batches, mode, groups)]


def token_accuracy(
    chunks: Sequence[torch.nn.Module], batches: Sequence[TokenBatch], groups: ProcessGroups
) -> list[tuple[Tensor, Tensor]]:
    """(logprob [b, s] of every label, correct [b, s] bool: is the label the likeliest token); only on the last stage."""
    results = []
    for logprob, correct in forward_all(chunks, batches, HeadMode.LOGPROB_TOP1, groups):
        assert correct is not None
        results.append((logprob, correct))
    return results
