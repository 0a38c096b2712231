"""Completions drawn from the very network that trains.

Decoding is continuous: a sequence that ends makes room for one that waits, in the same step. A prompt is run once for all
completions that have it in common, and its keys and values are kept once (kv_cache.py). What is drawn follows from the weights
and from (seed, prompt id, number of the completion, position) (sampling.py), so neither the order of admission nor the size of
the batch matters, but for the rounding of the logits.

Dims: n sequences, v vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import RolloutError
from megarpt.model.decoding import Decoder
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ProcessGroups
from megarpt.rl.kv_cache import CachedAttention, SharedPrefixCache
from megarpt.rl.rollout import Sampling
from megarpt.rl.sampling import draw, stream_key, uniforms
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason

_PREFILL_TOKENS = 8192  # of prompts that are run together; a longer prompt runs alone


@dataclass(eq=False, slots=True)
class _Prompt:
    """What the completions of one text have in common."""

    tokens: tuple[int, ...]
    num_waiting: int = 0
    num_running: int = 0
    row: int | None = None  # of the cache
    logits: Tensor | None = None  # behind its last token: [v of this rank]


@dataclass(eq=False, slots=True)
class _Sequence:
    """A completion that waits or runs."""

    key: str
    prompt: _Prompt
    sampling: Sampling
    stream: int  # of uniform numbers
    most_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class EmbeddedEngine:
    """A rollout engine over a network of this process, which trains or is at rest between two calls.

    All ranks of a tensor-parallel group make the same calls in the same order; data-parallel ranks are independent of each
    other. Between calls the network may be trained in place: `publish` names what the weights are then. Memory for keys and
    values is held only while there is work.

    Args:
        network: without wrappers.
        tokenizer: for the bytes of completions.
        groups: of the layout.
        device: of the network.
        max_sequence_length: of a prompt with its completion.
        max_batch: sequences that are decoded together.

    Collectives: under tensor parallelism, a step: those of the decoder, a gather of [n, v] and a broadcast of [n].
    Cost: of a step, one pass of n tokens through the network; keys and values of n sequences, and once of each prompt.

    Raises:
        ConfigError: a network or a layout that cannot be decoded with (model/decoding.py).
    """

    def __init__(
        self,
        network: TokenStatsGPT,
        tokenizer: Tokenizer,
        groups: ProcessGroups,
        device: torch.device,
        *,
        max_sequence_length: int,
        max_batch: int = 64,
    ) -> None:
        self.policy_version = 0
        self.forward_tokens = 0  # that went through the network so far
        self._decoder = Decoder(network)
        self._vocab_size = network.valid_vocab_size
        self._tokenizer, self._tp, self._device = tokenizer, groups.tp, device
        self._max_sequence_length, self._max_batch = max_sequence_length, max_batch
        self._bytes_of: dict[int, bytes] = {}
        self._keys: set[str] = set()
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # in the order of the cache's rows
        self._prompts: dict[tuple[int, ...], _Prompt] = {}  # of what waits or runs
        self._cached: list[_Prompt] = []  # in the order of the cache's rows
        self._cache: SharedPrefixCache | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._keys

    def publish(self, version: int) -> None:
        """Call the weights `version`; they are the network's own, so there is nothing to take over.

        Raises:
            RolloutError: completions are being drawn, which would be of two versions.
        """
        if not self.is_idle:
            raise RolloutError(
                f"weights {version} published while {len(self._running)} completions run and {len(self._waiting)} wait; "
                "expected none: draw them to the end or cancel them first"
            )
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling) -> list[RolloutGroup]:
        """See `RolloutEngine`."""
        if not self.is_idle:
            raise RolloutError("generate was called while other completions are being drawn; expected an engine at rest")
        keys = [[f"{i}/{sample}" for sample in range(group_size)] for i in range(len(prompts))]
        done: dict[str, Completion] = {}
        try:
            for prompt, names in zip(prompts, keys, strict=True):
                for sample, key in enumerate(names):
                    self.add(key, prompt.tokens, sampling, prompt_id=prompt.id, sample=sample)
            with self._decoder.evaluating():
                while len(done) < group_size * len(prompts):
                    done.update(self.step())
        finally:
            self._clear()
        groups = zip(prompts, keys, strict=True)
        return [RolloutGroup(prompt, [done[key] for key in names]) for prompt, names in groups]

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling, *, prompt_id: str, sample: int) -> None:
        """Queue a completion; `step` will return it under `key`.

        Raises:
            RolloutError: the prompt is empty, leaves no room for a token or holds none of the vocabulary's; the sampling is
                impossible; or the key is in use.
        """
        _check_sampling(sampling)
        self._check_prompt(prompt, prompt_id)
        if key in self._keys:
            raise RolloutError(f"completion {key!r} is being drawn already; expected another key")
        tokens = tuple(prompt)
        shared = self._prompts.setdefault(tokens, _Prompt(tokens))
        shared.num_waiting += 1
        self._keys.add(key)
        self._waiting.append(
            _Sequence(
                key=key,
                prompt=shared,
                sampling=sampling,
                stream=stream_key(sampling.seed, prompt_id, sample),
                most_tokens=min(sampling.max_new_tokens, self._max_sequence_length - len(tokens)),
            )
        )

    def cancel(self, key: str) -> None:
        """Stop drawing a completion; nothing happens where it has ended already."""
        if key not in self._keys:
            return
        row = next((row for row, each in enumerate(self._running) if each.key == key), None)
        if row is not None:
            self._remove(row)
            return
        sequence = next(each for each in self._waiting if each.key == key)
        self._waiting.remove(sequence)
        sequence.prompt.num_waiting -= 1
        self._forget(sequence)

    def drawn_so_far(self, key: str) -> tuple[Sequence[int], Sequence[float]]:
        """Tokens and log-probabilities of a completion that runs; none of one that waits or has ended."""
        running = next((each for each in self._running if each.key == key), None)
        return ((), ()) if running is None else (running.tokens, running.logprobs)

    @torch.no_grad()
    def step(self) -> list[tuple[str, Completion]]:
        """Draw a token for every running sequence, those that are admitted now included; what has ended with it.

        Raises:
            RolloutError: the network's logits are no distribution.
        """
        if self.is_idle:
            return []
        with self._decoder.evaluating():
            logits = [self._decode()] if self._running else []
            admitted = self._admit()
            if admitted:
                logits.append(torch.stack(admitted))
            tokens, logprobs = self._draw(torch.cat(logits) if len(logits) > 1 else logits[0])
        for each, token, logprob in zip(self._running, tokens, logprobs, strict=True):
            each.tokens.append(token)
            each.logprobs.append(logprob)
        return self._take_finished()

    def _decode(self) -> Tensor:
        """Logits behind the last token of each sequence. Shapes: -> [n, v of this rank]."""
        cache = self._cache
        assert cache is not None, "sequences run in a cache"
        tokens = torch.tensor([each.tokens[-1] for each in self._running], device=self._device)
        positions = torch.tensor(cache.next_positions(), device=self._device)
        cache.grow()
        attention = CachedAttention(cache, self._decoder.scale, self._device)
        self.forward_tokens += len(tokens)
        return self._decoder.logits(self._decoder.run(tokens, positions, self._max_sequence_length, attention))

    def _admit(self) -> list[Tensor]:
        """Start waiting sequences where there is room; the logits behind the prompt of each."""
        room = self._max_batch - len(self._running)
        admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not admitted:
            return []
        if self._cache is None:
            self._cache = SharedPrefixCache(self._decoder.shape, self._max_batch, self._device)
        wanted = dict.fromkeys(each.prompt for each in admitted)
        for each in admitted:
            each.prompt.num_waiting -= 1
            each.prompt.num_running += 1
        self._prefill([prompt for prompt in wanted if prompt.row is None])
        logits = []
        for each in admitted:
            assert each.prompt.row is not None and each.prompt.logits is not None, "prompts of what runs are in the cache"
            self._cache.add_sequence(each.prompt.row)
            logits.append(each.prompt.logits)
        self._running += admitted
        return logits

    def _prefill(self, missing: Sequence[_Prompt]) -> None:
        """Run prompts and put them into the cache, in place of some that only waiting sequences have if need be."""
        assert self._cache is not None, "sequences run in a cache"
        spare = [prompt for prompt in self._cached if not prompt.num_running]
        for prompt in spare[: max(0, len(self._cached) + len(missing) - self._max_batch)]:
            self._release(prompt)
        for batch in _batches(missing):
            done = self._decoder.prefill([prompt.tokens for prompt in batch], self._device)
            rows = self._cache.add_prompts([len(prompt.tokens) for prompt in batch], done.keys_values)
            for prompt, row, logits in zip(batch, rows, done.last_logits, strict=True):
                prompt.row, prompt.logits = row, logits
                self.forward_tokens += len(prompt.tokens)
            self._cached += batch

    def _draw(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """A token for every running sequence and its log-probability; the first tensor-parallel rank draws for all."""
        n = len(self._running)
        drawn = torch.empty(2, n, dtype=torch.float64, device=self._device)
        whole = self._gather(logits)
        if whole is not None:
            streams, positions = [each.stream for each in self._running], [len(each.tokens) for each in self._running]
            uniform = uniforms(streams, positions).to(self._device)
            settings = [(each.sampling.temperature, each.sampling.top_k, each.sampling.top_p) for each in self._running]
            for setting in dict.fromkeys(settings):
                temperature, top_k, top_p = setting
                rows = [row for row, each in enumerate(settings) if each == setting]
                part = slice(None) if len(rows) == n else torch.tensor(rows, device=self._device)
                token, logprob = draw(whole[part], uniform[part], temperature=temperature, top_k=top_k, top_p=top_p)
                drawn[0, part], drawn[1, part] = token.double(), logprob
        if self._tp.size() > 1:
            dist.broadcast(drawn, dist.get_global_rank(self._tp, 0), group=self._tp)
        tokens, logprobs = drawn.tolist()
        broken = next((row for row, logprob in enumerate(logprobs) if logprob != logprob), None)
        if broken is not None:
            raise RolloutError(
                f"the logits for token {len(self._running[broken].tokens) + 1} of completion {self._running[broken].key!r} are "
                f"NaN or infinite with weights {self.policy_version}; the policy has diverged: go back to an earlier checkpoint"
            )
        return [int(token) for token in tokens], logprobs

    def _gather(self, logits: Tensor) -> Tensor | None:
        """The valid vocabulary's, on the first rank of the tensor-parallel group; None on the others."""
        if self._tp.size() == 1:
            return logits[:, : self._vocab_size]
        is_first = self._tp.rank() == 0
        parts = [torch.empty_like(logits) for _ in range(self._tp.size())] if is_first else None
        dist.gather(logits.contiguous(), parts, dst=dist.get_global_rank(self._tp, 0), group=self._tp)
        return None if parts is None else torch.cat(parts, dim=1)[:, : self._vocab_size]

    def _take_finished(self) -> list[tuple[str, Completion]]:
        finished = []
        for row in reversed(range(len(self._running))):
            each = self._running[row]
            stopped = each.tokens[-1] in each.sampling.stop_tokens
            if stopped or len(each.tokens) == each.most_tokens:
                finished.append((each.key, self._completion(each, StopReason.STOP if stopped else StopReason.LENGTH)))
                self._remove(row)
        return finished[::-1]

    def _completion(self, sequence: _Sequence, stop: StopReason) -> Completion:
        return Completion(
            tokens=tuple(sequence.tokens),
            logprobs=tuple(sequence.logprobs),
            text=b"".join(self._token_bytes(token) for token in sequence.tokens),
            stop=stop,
            policy_version=self.policy_version,
        )

    def _token_bytes(self, token: int) -> bytes:
        """Nothing for special tokens, and for rows of the embedding that the tokenizer does not use."""
        if token not in self._bytes_of:
            known = token < self._tokenizer.vocab_size
            self._bytes_of[token] = (self._tokenizer.token_bytes(token) if known else None) or b""
        return self._bytes_of[token]

    def _remove(self, row: int) -> None:
        """End a running sequence; as in the cache, the last one takes its place."""
        assert self._cache is not None, "sequences run in a cache"
        sequence = self._running[row]
        self._running[row] = self._running[-1]
        self._running.pop()
        self._cache.remove_sequence(row)
        sequence.prompt.num_running -= 1
        self._forget(sequence)

    def _forget(self, sequence: _Sequence) -> None:
        """What no other sequence needs of one that has ended."""
        self._keys.remove(sequence.key)
        prompt = sequence.prompt
        if not prompt.num_running and not prompt.num_waiting:
            del self._prompts[prompt.tokens]
            if prompt.row is not None:
                self._release(prompt)
        if self.is_idle:
            self._clear()

    def _release(self, prompt: _Prompt) -> None:
        """Take a prompt out of the cache; as there, the last one takes its place."""
        assert self._cache is not None and prompt.row is not None, "it is in the cache"
        row, last = prompt.row, self._cached.pop()
        if last is not prompt:
            self._cached[row] = last
            last.row = row
        self._cache.remove_prompt(row)
        prompt.row = prompt.logits = None

    def _clear(self) -> None:
        for each in (self._keys, self._waiting, self._running, self._prompts, self._cached):
            each.clear()
        self._cache = None

    def _check_prompt(self, prompt: Sequence[int], prompt_id: str) -> None:
        if not 0 < len(prompt) < self._max_sequence_length:
            raise RolloutError(
                f"prompt {prompt_id!r}: got {len(prompt)} tokens, expected 1 to {self._max_sequence_length - 1}: a prompt and "
                f"its completion have {self._max_sequence_length} tokens together; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            raise RolloutError(
                f"prompt {prompt_id!r}: got tokens {min(prompt)} to {max(prompt)}, expected 0 to {self._vocab_size - 1}; "
                "tokenize it with the model's tokenizer"
            )


def _batches(prompts: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
    """What is run together."""
    batch: list[_Prompt] = []
    for prompt in prompts:
        if batch and sum(len(each.tokens) for each in batch) + len(prompt.tokens) > _PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _check_sampling(sampling: Sampling) -> None:
    wrong = [
        f"{name}: got {value}, expected {expected}"
        for name, value, expected, is_right in (
            ("max_new_tokens", sampling.max_new_tokens, "at least 1", sampling.max_new_tokens >= 1),
            ("temperature", sampling.temperature, "0 or a number above", 0.0 <= sampling.temperature < float("inf")),
            ("top_k", sampling.top_k, "0 (all) or a number above", sampling.top_k >= 0),
            ("top_p", sampling.top_p, "a number above 0, at most 1", 0.0 < sampling.top_p <= 1.0),
        )
        if not is_right
    ]
    if wrong:
        raise RolloutError("; ".join(wrong))
