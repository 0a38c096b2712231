"""Attention of one new token of each sequence to two rows of keys: those of its prompt, which others may share, and its own.

On a CPU with the compiled extension one pass over both rows (csrc/cached_attention/). Else in torch: prompts are attended to
once by all sequences that share them, and the two results are merged by their log-sums (as in FlashAttention-2,
arXiv 2307.08691, section 3.1).

Dims: n sequences, p prompts, m sequences of the most shared prompt, ng key/value heads, g query heads of each, q queries,
s keys, hn head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megarpt.ops import _ext

AttendStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [n, ng, g, hn], keys and values [n, ng, 2, hn], own rows [n, ng, 2, longest, hn], rows of prompts [p, ng, 2, longest,
hn]) -> [n, ng, g, hn]; the keys and values are written to the own rows first."""

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Sharing:
    """Which sequences attend to a prompt together."""

    def __init__(self, prompt_of: Sequence[int], num_prompts: int, device: torch.device) -> None:
        self._numbers, self._num_prompts, self._device = list(prompt_of), num_prompts, device

    @cached_property
    def prompt_of(self) -> Tensor:
        """Of each sequence, [n]."""
        return torch.tensor(self._numbers, device=self._device)

    @cached_property
    def is_plain(self) -> bool:
        """Whether each sequence has the prompt of its own number."""
        return self._numbers == list(range(self._num_prompts))

    def gather(self, query: Tensor) -> Tensor:
        """[n, ng, g, hn] -> [p, ng, m * g, hn]."""
        members, _ = self._members
        return query[members].transpose(1, 2).flatten(2, 3)

    def scatter(self, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """[p, ng, m * g, hn], [p, ng, m * g] -> [n, ng, g, hn], [n, ng, g]."""
        members, place = self._members
        m = members.shape[1]
        whole = (x.unflatten(2, (m, -1))[self.prompt_of, :, place] for x in (out, log_sum))
        first, second = whole
        return first, second

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor]:
        """The sequences of each prompt, [p, m], and the place of each sequence among them, [n]."""
        members: list[list[int]] = [[] for _ in range(self._num_prompts)]
        place = []
        for sequence, prompt in enumerate(self._numbers):
            place.append(len(members[prompt]))
            members[prompt].append(sequence)
        m = max(map(len, members))
        rows = [each + [0] * (m - len(each)) for each in members]  # what fills up is computed and dropped
        return torch.tensor(rows, device=self._device), torch.tensor(place, device=self._device)


def attention_of_step(
    lengths: Sequence[int], prompt_lengths: Sequence[int], sharing: Sharing, *, scale: float, device: torch.device
) -> AttendStep:
    """softmax(q k^T * scale) v of one token per sequence over its prompt's row and its own, for every layer of a step.

    Args:
        lengths: of the sequences' own rows, the new token included.
        prompt_lengths: of the prompts' rows.

    What lies in a row behind its end must be finite (the compiled pass does not read it).
    Error: within 1e-6 of fp32's largest value (tests/unit/ops/test_cached_attention.py); half precision is computed in fp32
    where compiled. No gradients.
    """
    if device.type == "cpu" and _ext.extension(device) is not None:
        return _Compiled(lengths, prompt_lengths, sharing, scale)
    return _InTorch(lengths, prompt_lengths, sharing, scale, device)


class _Compiled:
    def __init__(self, lengths: Sequence[int], prompt_lengths: Sequence[int], sharing: Sharing, scale: float) -> None:
        assert _ext._C is not None, "the caller has looked"
        self._scale = scale
        self._kept = torch.tensor(lengths), torch.tensor(prompt_lengths), sharing.prompt_of  # while addresses are in use
        self._lengths, self._prompt_lengths, self._prompt_of = map(_ext.vector, self._kept)
        self._module = _ext._C.cached_attention

    def __call__(self, query: Tensor, keys_values: Tensor, own: Tensor, prompts: Tensor) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        rows = _ext.strided(own), self._lengths, _ext.strided(prompts), self._prompt_lengths, self._prompt_of
        cache = self._module.Cache(*rows)
        self._module.attend_step(_ext.strided(query), _ext.strided(keys_values), cache, self._scale, _ext.strided(out))
        return out


class _InTorch:
    def __init__(
        self, lengths: Sequence[int], prompt_lengths: Sequence[int], sharing: Sharing, scale: float, device: torch.device
    ) -> None:
        self._scale, self._sharing = scale, sharing
        self._own_mask, self._prompt_mask = _mask(lengths, device), _mask(prompt_lengths, device)
        self._end = None if len(set(lengths)) > 1 else lengths[0] - 1
        self._at = torch.tensor([length - 1 for length in lengths], device=device)
        self._rows = torch.arange(len(lengths), device=device)

    def __call__(self, query: Tensor, keys_values: Tensor, own: Tensor, prompts: Tensor) -> Tensor:
        if self._end is not None:
            own[:, :, :, self._end] = keys_values
        else:
            own[self._rows, :, :, self._at] = keys_values
        out, log_sum = _attend_with_log_sum(query, own[:, :, 0], own[:, :, 1], self._own_mask, self._scale)
        gathered = query if self._sharing.is_plain else self._sharing.gather(query)
        other = _attend_with_log_sum(gathered, prompts[:, :, 0], prompts[:, :, 1], self._prompt_mask, self._scale)
        prefix, prefix_log_sum = other if self._sharing.is_plain else self._sharing.scatter(*other)
        weight = torch.sigmoid(prefix_log_sum - log_sum).unsqueeze(-1)
        return torch.lerp(out, prefix, weight.to(out.dtype))


def _attend_with_log_sum(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v of every head, and the log-sum-exp of each query's scores, in fp32 at least.

    Shapes: query [n, ng, q, hn], key and value [n, ng, s, hn], mask [n, 1, 1, s] or None -> [n, ng, q, hn], [n, ng, q].
    """
    if query.device.type == "cpu":
        bias = mask if mask is None else mask.to(query.dtype)
        out, log_sum = _flash_on_cpu(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        return out, log_sum
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(scale)
    if mask is not None:
        scores += mask
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.unsqueeze(-1)).exp_()
    return torch.matmul(weights.to(value.dtype), value), log_sum


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """[rows, 1, 1, longest], minus infinity behind the end of a row; None where all are of one length."""
    if len(set(lengths)) == 1:
        return None
    behind = torch.arange(max(lengths), device=device) >= torch.tensor(lengths, device=device).unsqueeze(1)
    return torch.zeros(behind.shape, device=device).masked_fill_(behind, -torch.inf)[:, None, None]
