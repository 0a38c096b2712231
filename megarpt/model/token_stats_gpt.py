"""megatron-core's GPTModel with a head that returns per-token statistics and never the logits.

Dims: b micro-batch, s sequence, t = b * s packed tokens, h hidden, v vocabulary.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megarpt.model.embedding import RowGradients
from megarpt.ops.linear_logprob import GradientGuess, VocabShard, linear_logprob, linear_top1


class HeadMode(enum.Enum):
    """What the head computes for every label."""

    LOGPROB = enum.auto()
    LOGPROB_ENTROPY = enum.auto()
    LOGPROB_TOP1 = enum.auto()  # evaluation only: no gradients


class TokenStatsGPT(GPTModel):
    """GPTModel whose `forward(..., labels=...)` gives log-probabilities (and entropies) of the labels.

    Without labels it behaves as megatron-core's own model: logits, KV cache and all.
    """

    def __init__(
        self,
        *args: Any,
        valid_vocab_size: int,
        head_chunk_tokens: int = 0,
        head_keep_bytes: int = 0,
        stream_chunk_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.valid_vocab_size = valid_vocab_size
        self.stream_chunk_tokens = stream_chunk_tokens  # 0 where layers are not streamed
        self.head_chunk_tokens, self.head_keep_bytes = head_chunk_tokens, head_keep_bytes
        self.head_mode = HeadMode.LOGPROB
        self.temperature = 1.0  # divides the logits before anything else; that of sampling, where tokens were sampled
        self.rope_scaling_factor = kwargs.get("rope_scaling_factor")
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb.cp_group = None  # angles are gathered by position, so every rank keeps the whole table

    def _preprocess(self, *args: Any, position_ids: Tensor, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """As megatron-core, with rotary angles gathered by position so that they restart with every document, and without a
        gradient as large as the embedding."""
        with RowGradients():
            out = super()._preprocess(*args, position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs)
        packed_as_one_sequence = packed_seq_params is not None and packed_seq_params.qkv_format == "sbhd"
        if self.position_embedding_type == "rope" and packed_as_one_sequence:
            positions = position_ids[0]
            if packed_seq_params.dealt is not None:  # attention takes its chunks in order
                positions = torch.empty_like(positions).index_copy_(0, packed_seq_params.dealt, positions)
            angles = out[1][positions]  # [max_seqlen, 1, 1, hn] -> [t, 1, 1, hn]
            out = (out[0], angles, *out[2:])
        return out

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | GradientGuess | None = None,
        **kwargs: Any,
    ) -> Any:
        """[t, 1, h] -> (logprob [t], entropy [t] or None) when labels are given.

        With a `loss_mask` the loss is the sum of loss_mask * -logprob and nothing else, or one whose gradient can be guessed
        by what is given in its place; that lets the head make its gradients at once (see `linear_logprob`).
        """
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp_group
            )
        elif tp_group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        shard = VocabShard(
            start=tp_group.rank() * weight.shape[0],
            size=self.valid_vocab_size,
            group=tp_group if tp_group.size() > 1 else None,
        )
        hidden, targets = hidden_states.flatten(0, 1), labels.flatten()
        if self.head_mode is HeadMode.LOGPROB_TOP1:
            return linear_top1(hidden, weight, targets, shard)
        return linear_logprob(
            hidden,
            weight,
            targets,
            temperature=self.temperature,
            entropy=self.head_mode is HeadMode.LOGPROB_ENTROPY,
            chunk_tokens=self.head_chunk_tokens or None,
            keep_bytes=self.head_keep_bytes,
            tp_group=shard.group,
            vocab_start=shard.start,
            vocab_size=shard.size,
            accumulate_into=getattr(weight, "main_grad", None) if torch.is_grad_enabled() else None,
            known_gradient=-loss_mask.flatten() if isinstance(loss_mask, Tensor) else loss_mask,
        )
