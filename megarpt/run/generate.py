"""`megarpt generate`: continue a text."""

from __future__ import annotations

import sys

from megarpt.config.schema import GenerateOptions, ParallelConfig
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError
from megarpt.model.generation import generate
from megarpt.parallel.layout import ParallelLayout
from megarpt.run.pretrained import load_pretrained


def run(options: GenerateOptions, runtime: Runtime) -> int:
    """Write the prompt and its continuation to standard output, samples apart by a line of dashes.

    Raises:
        ConfigError: the prompt is empty or too long.
    """
    parallel = ParallelConfig()
    layout = ParallelLayout.resolve(parallel, runtime.world_size)
    trained = load_pretrained(options.checkpoint, runtime, layout, layout.initialize(options.seed), parallel)
    tokenizer, limit = trained.tokenizer, trained.config.data.seq_length
    prompt = list(tokenizer.encode(options.prompt))
    if not prompt:
        raise ConfigError("--prompt: got an empty text, expected at least one token; the model continues a text")
    if len(prompt) + options.max_new_tokens > limit:
        raise ConfigError(
            f"--max-new-tokens: {len(prompt)} tokens of prompt and {options.max_new_tokens} new ones exceed the {limit} tokens "
            f"the model was trained on; shorten the prompt or ask for at most {max(0, limit - len(prompt))}"
        )
    samples = generate(
        trained.network,
        prompt,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eod=tokenizer.eod,
        device=runtime.device,
    )
    if runtime.rank == 0:
        texts = [tokenizer.decode([*prompt, *(i for i in ids if i != tokenizer.eod)]) for ids in samples]
        sys.stdout.write(("\n" + "-" * 20 + "\n").join(texts) + "\n")
    return EXIT_OK
