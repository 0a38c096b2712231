"""Which positions of a document are worth reasoning about: where a proxy model is uncertain of the next token.

Source: RPT (arXiv 2506.08007), section 4.1, whose proxy's entropy is that of its 16 likeliest next tokens. The thresholds of
its evaluation are 0.5, 1.0 and 1.5; the one it trains with is not printed.

Dims: b windows, s tokens of the longest, n rows of the head, h hidden, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import ConfigError
from megarpt.model.token_stats_gpt import TokenStatsGPT

TOP_TOKENS = 16
TRIVIAL, EASY, MEDIUM, HARD = BANDS = ("trivial", "easy", "medium", "hard")
PADDING_ID = 0  # under causal attention no token sees what follows it
LOGITS_BYTES = 128 << 20  # of logits at a time

Positions = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class Thresholds(NamedTuple):
    """Where bands begin, in nats; what lies below the first is trivial."""

    easy: float = 0.5
    medium: float = 1.0
    hard: float = 1.5

    def check(self) -> None:
        """
        Raises:
            ConfigError: they do not rise from 0 or more.
        """
        if not (self.easy >= 0.0 and all(a < b for a, b in pairwise(self)) and self.hard < float("inf")):
            raise ConfigError(f"thresholds: got {', '.join(map(str, self))}, expected three rising numbers of nats, from 0")

    def band(self, entropy: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Places in `BANDS`. A band holds its lower end."""
        return np.searchsorted(np.asarray(self, dtype=np.float32), entropy.astype(np.float32), side="right")


class Window(NamedTuple):
    """A part of a document that the proxy reads at once."""

    start: int  # its first token
    end: int
    first_row: int  # rows before this one are another window's


def windows(length: int, seq_length: int) -> list[Window]:
    """Windows that read all tokens of a document but the last, so that each predicts the next one once.

    Windows behind the first begin half a window earlier than what they are asked for, so that no prediction is made from less
    than half a window of context, where the document has it.
    """
    kept, inputs = seq_length // 2, length - 1
    found, begin = [], 0  # the first input without a prediction
    while begin < inputs:
        start = max(0, begin - kept)
        end = min(start + seq_length, inputs)
        found.append(Window(start, end, begin - start))
        begin = end
    return found


def top_entropy(logits: Tensor, top: int = TOP_TOKENS) -> Tensor:
    """Entropy, in nats, of the `top` likeliest tokens, whose probabilities are made to add up to 1.

    Shapes: [..., v] -> [...] fp32.
    """
    logprob = logits.topk(min(top, logits.shape[-1]), dim=-1).values.float().log_softmax(-1)
    return -(logprob.exp() * logprob).sum(-1)


@torch.no_grad()
def next_token_entropy(network: TokenStatsGPT, parts: Sequence[npt.NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """`top_entropy` of what follows every token of several texts.

    Args:
        network: undivided, in evaluation mode.
        parts: the texts' ids, each at least one and at most as many as the network may be given.
        device: of the network.

    Shapes: one fp32 tensor for each text, of its length, on the CPU.
    Cost: one forward pass, padded to the longest text; logits of `LOGITS_BYTES` at a time.
    """
    b, s = len(parts), max(map(len, parts))
    tokens = np.full((b, s), PADDING_ID, dtype=np.int64)
    for row, part in enumerate(parts):
        tokens[row, : len(part)] = part
    hidden = _hidden(network, torch.from_numpy(tokens).to(device), torch.arange(s, device=device).expand(b, -1))  # [s, b, h]
    lengths = torch.tensor([len(part) for part in parts], device=device)
    real = torch.arange(s, device=device)[None] < lengths[:, None]  # [b, s]
    rows = hidden.transpose(0, 1)[real]  # [n, h], text after text
    weight = network.shared_embedding_or_output_weight() if network.share_embeddings_and_output_weights else None
    at_once = max(1, LOGITS_BYTES // (4 * network.vocab_size))
    entropy = []
    for chunk in rows.split(at_once):
        logits, _ = network.output_layer(chunk[:, None], weight=weight, runtime_gather_output=True)
        entropy.append(top_entropy(logits[:, 0, : network.valid_vocab_size]))
    return list(torch.cat(entropy).cpu().split([len(part) for part in parts]))


def _hidden(network: TokenStatsGPT, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """What the head is given; the network stops there when it is told that its head is elsewhere."""
    network.post_process = False
    try:
        return network(tokens, position_ids, None)
    finally:
        network.post_process = True


def position_keys(seed: int, document: int, length: int) -> Keys:
    """A random number for every position of a document, the same whatever else is drawn: the smallest are chosen.

    Shapes: [length].
    """
    stream = hashlib.shake_256(b"megarpt-positions-1/%d/%d" % (seed, document)).digest(8 * length)
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def is_validation(seed: int, document: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split, by a hash of its number."""
    drawn = hashlib.shake_256(b"megarpt-split-1/%d/%d" % (seed, document)).digest(8)
    return int.from_bytes(drawn, "little") < fraction * 2.0**64


class Continuations:
    """How documents go on, in bytes."""

    def __init__(self, tokenizer: Tokenizer, num_bytes: int) -> None:
        """
        Args:
            tokenizer: of the documents.
            num_bytes: at least so many are kept, where the document has them.
        """
        self._tokenizer = tokenizer
        self._num_bytes = num_bytes
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Empty of special tokens, and of those whose bytes are not known."""
        if token not in self._known:
            self._known[token] = self._tokenizer.token_bytes(token) or b""
        return self._known[token]

    def can_be_asked(self, document: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which tokens of a document have bytes to be predicted. Shapes: [length] -> [length]."""
        unique, inverse = np.unique(document, return_inverse=True)
        return np.array([bool(self.bytes_of(token)) for token in unique.tolist()], dtype=np.bool_)[inverse]

    def after(self, document: npt.NDArray[np.integer], position: int) -> tuple[bytes, list[int]]:
        """(bytes from `position` on, the cumulative lengths of their tokens), up to a special token or the end."""
        text, boundaries = bytearray(), []
        for token in document[position:].tolist():
            piece = self.bytes_of(token)
            if not piece or len(text) >= self._num_bytes:
                break
            text += piece
            boundaries.append(len(text))
        return bytes(text), boundaries
