"""`megarpt generate`: continue a text."""

from __future__ import annotations

import sys

from megarpt.config.schema import GenerateOptions, ParallelConfig
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Prompt
from megarpt.run.pretrained import load_pretrained


def run(options: GenerateOptions, runtime: Runtime) -> int:
    """Write the prompt and its continuation to standard output, samples apart by a line of dashes.

    Raises:
        ConfigError: the prompt is empty or too long.
    """
    parallel = ParallelConfig()
    layout = ParallelLayout.resolve(parallel, runtime.world_size)
    groups = layout.initialize(options.seed)
    trained = load_pretrained(options.checkpoint, runtime, layout, groups, parallel)
    tokenizer, limit = trained.tokenizer, trained.config.data.seq_length
    prompt = list(tokenizer.encode(options.prompt))
    if not prompt:
        raise ConfigError("--prompt: got an empty text, expected at least one token; the model continues a text")
    if len(prompt) + options.max_new_tokens > limit:
        raise ConfigError(
            f"--max-new-tokens: {len(prompt)} tokens of prompt and {options.max_new_tokens} new ones exceed the {limit} tokens "
            f"the model was trained on; shorten the prompt or ask for at most {max(0, limit - len(prompt))}"
        )
    engine = EmbeddedEngine(trained.network, tokenizer, groups, runtime.device, max_sequence_length=limit)
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=() if tokenizer.eod is None else (tokenizer.eod,),
        seed=options.seed,
    )
    prompts = [Prompt(id="--prompt", tokens=tuple(prompt))]
    (group,) = engine.generate(prompts, group_size=options.num_samples, sampling=sampling)
    if runtime.rank == 0:
        samples = [each.tokens for each in group.completions]
        texts = [tokenizer.decode([*prompt, *(i for i in ids if i != tokenizer.eod)]) for ids in samples]
        sys.stdout.write(("\n" + "-" * 20 + "\n").join(texts) + "\n")
    return EXIT_OK
