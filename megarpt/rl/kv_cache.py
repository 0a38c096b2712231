"""Keys and values of the sequences that are decoded together, those of a shared prefix once.

A sequence attends to its prompt, which completions of one group have in common, and to what it has written itself. The two are
kept apart: prompts in rows of their own, never copied (ops/cached_attention.py has the attention to both).

Rows are dense: what leaves is replaced by the last row, so a step reads nothing that is not in use.

Dims: n sequences, p prompts, ng key/value heads, g query heads of each, hn head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarpt.model.decoding import CacheShape
from megarpt.ops.cached_attention import Sharing, attention_of_step

_FIRST_CAPACITY = 64  # tokens; doubled when it is used up


class Rows:
    """Keys and values of some sequences, each in a row: [layers, rows, ng, 2, capacity, hn]."""

    def __init__(self, shape: CacheShape, num_rows: int, device: torch.device) -> None:
        self._shape, self._num_rows = shape, num_rows
        self._device = device
        self.lengths: list[int] = []  # of the rows in use
        self._store = self._allocate(_FIRST_CAPACITY)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """Of each layer the rows in use, as far as the longest goes: [rows, ng, 2, longest, hn]."""
        return self._store[:, : len(self), :, :, : max(self.lengths, default=0)].unbind(0)

    def add(self, length: int) -> int:
        """A new row, after the others."""
        self.lengths.append(length)
        self.reserve()
        return len(self) - 1

    def reserve(self) -> None:
        """Room for the longest row."""
        longest, capacity = max(self.lengths, default=0), self._store.shape[4]
        if longest > capacity:
            old = self._store
            self._store = self._allocate(max(longest, 2 * capacity))
            self._store[:, :, :, :, :capacity] = old

    def write(self, layer: int, row: int, keys_values: Tensor) -> None:
        """A whole row. Shapes: keys_values [t, ng, 2, hn]."""
        self._store[layer, row, :, :, : len(keys_values)] = keys_values.permute(1, 2, 0, 3)

    def remove(self, row: int) -> None:
        """Its place is taken by the last row."""
        last = len(self) - 1
        if row != last:
            length = self.lengths[row] = self.lengths[last]
            self._store[:, row, :, :, :length] = self._store[:, last, :, :, :length]
        self.lengths.pop()

    def _allocate(self, capacity: int) -> Tensor:
        # Zeros, since what is masked must be finite. The system hands out pages when they are first written.
        layers, groups, size, dtype = self._shape
        return torch.zeros(layers, self._num_rows, groups, 2, capacity, size, dtype=dtype, device=self._device)


class SharedPrefixCache:
    """Rows of prompts and rows of sequences, each sequence with the number of its prompt's row."""

    def __init__(self, shape: CacheShape, max_sequences: int, device: torch.device) -> None:
        self.prompts = Rows(shape, max_sequences, device)
        self.sequences = Rows(shape, max_sequences, device)
        self.prompt_of: list[int] = []  # of each sequence
        self._device = device
        self._sharing: Sharing | None = None  # until somebody comes or goes

    def add_prompts(self, lengths: Sequence[int], keys_values: Sequence[Tensor]) -> list[int]:
        """Rows for new prompts, filled. Shapes: keys_values of each layer [t, ng, 2, hn], prompt after prompt."""
        rows = [self.prompts.add(length) for length in lengths]
        for layer, whole in enumerate(keys_values):
            for row, part in zip(rows, whole.split(list(lengths)), strict=True):
                self.prompts.write(layer, row, part)
        return rows

    def remove_prompt(self, row: int) -> None:
        """One that no sequence uses; the last prompt gets its number."""
        last = len(self.prompts) - 1
        self.prompts.remove(row)
        self.prompt_of = [row if prompt == last else prompt for prompt in self.prompt_of]
        self._sharing = None

    def add_sequence(self, prompt: int) -> None:
        """A row without tokens, after the others."""
        self.prompt_of.append(prompt)
        self.sequences.add(0)
        self._sharing = None

    def remove_sequence(self, row: int) -> None:
        """The last sequence gets its number."""
        self.prompt_of[row] = self.prompt_of[-1]
        self.prompt_of.pop()
        self.sequences.remove(row)
        self._sharing = None

    def next_positions(self) -> list[int]:
        """Of the token that each sequence is about to write."""
        lengths = zip(self.prompt_of, self.sequences.lengths, strict=True)
        return [self.prompts.lengths[prompt] + own for prompt, own in lengths]

    @property
    def sharing(self) -> Sharing:
        """Who shares which prompt."""
        if self._sharing is None:
            self._sharing = Sharing(self.prompt_of, len(self.prompts), self._device)
        return self._sharing

    def grow(self) -> None:
        """Every sequence is about to write a token."""
        self.sequences.lengths = [length + 1 for length in self.sequences.lengths]
        self.sequences.reserve()


class CachedAttention:
    """One step's attention of n sequences with a token each, layer by layer; writes their keys and values."""

    def __init__(self, cache: SharedPrefixCache, scale: float, device: torch.device) -> None:
        self._own, self._prompts = cache.sequences.layers, cache.prompts.layers
        lengths = cache.sequences.lengths, cache.prompts.lengths
        self._attend = attention_of_step(*lengths, cache.sharing, scale=scale, device=device)

    def __call__(self, layer: int, query: Tensor, keys_values: Tensor) -> Tensor:
        return self._attend(query, keys_values, self._own[layer], self._prompts[layer])
