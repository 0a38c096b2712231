"""Continuing a text with megatron-core's KV cache.

Dims: b samples, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megarpt.model.token_stats_gpt import TokenStatsGPT


@torch.no_grad()
def generate(
    network: TokenStatsGPT,
    prompt: Sequence[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eod: int | None,
    device: torch.device,
) -> list[list[int]]:
    """Sample continuations of one prompt; each ends with `eod` or after `max_new_tokens`.

    Cost: one forward pass over the prompt, then one token per sample and step.
    """
    network.eval()
    b = num_samples
    context = StaticInferenceContext(b, len(prompt) + max_new_tokens)
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = torch.tensor(prompt, device=device).expand(b, -1)  # [b, s]
    done = torch.zeros(b, dtype=torch.bool, device=device)
    out: list[Tensor] = []
    for _ in range(max_new_tokens):
        start = context.sequence_len_offset
        position_ids = torch.arange(start, start + tokens.shape[1], device=device).expand(b, -1)
        logits = network(tokens, position_ids, None, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset += tokens.shape[1]
        chosen = sample(logits[:, -1, : network.valid_vocab_size].float(), temperature, top_k, top_p, generator)  # [b]
        out.append(chosen)
        if eod is not None:
            done |= chosen == eod
            if bool(done.all()):
                break
        tokens = chosen[:, None]
    columns = torch.stack(out, dim=1).tolist()
    return [row[: row.index(eod) + 1] if eod in row else row for row in columns]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row from softmax(logits / temperature), cut to the top_k likeliest and to the nucleus of mass top_p.

    Shapes: logits [b, v] -> [b] int64. Temperature 0 takes the likeliest.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses top_p stays in
        logits = torch.empty_like(logits).scatter_(1, index, ordered.masked_fill(outside, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
