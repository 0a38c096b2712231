"""Drawing completions with the embedded engine against transformers' `generate` with its KV cache, alternating in one process.

    python tools/bench_generate.py --threads 2 --json bench_generate.json

Both have the same weights, brought over as `megarpt export` would, and give the same tokens where the likeliest is taken, which
is checked. Cases, each of 32 sequences at a time and without an early stop unless it says otherwise:

    sampled   32 prompts of 64 tokens, 128 new tokens each, temperature 1
    nucleus   the same with top-p 0.95
    greedy    the same, always the likeliest token
    groups    4 prompts of 256 tokens, 8 completions of 128 tokens each
    mixed     64 prompts of 16 to 64 tokens, 8 to 128 new tokens each; transformers pads prompts on the left and draws a batch
              until its longest is done, and only tokens that were asked for count

Prints new tokens per second of both, their ratio, and the share of the limit: the larger of the time that the products of every
token alone take at the rate of a large product, and the time to read the weights and the cache once per step at the measured
bandwidth, both taken from this machine in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

from megarpt.device import runtime

MACHINE = runtime.start("cpu")  # before anything that imports megatron-core

from megarpt.config.hf_settings import from_model_config, write_settings  # noqa: E402
from megarpt.config.schema import PretrainConfig  # noqa: E402
from megarpt.corpus.tokenizers import ByteTokenizer  # noqa: E402
from megarpt.model.build import build_inference_network, transformer_config  # noqa: E402
from megarpt.model.convert_hf import moves  # noqa: E402
from megarpt.model.token_stats_gpt import TokenStatsGPT  # noqa: E402
from megarpt.parallel.layout import ParallelLayout, ProcessGroups  # noqa: E402
from megarpt.rl.embedded_engine import EmbeddedEngine  # noqa: E402
from megarpt.rl.rollout import Sampling  # noqa: E402
from megarpt.testing.configs import tiny_config  # noqa: E402

BATCH, MOST_TOKENS, VOCAB = 32, 512, 8192
SIZES: dict[str, dict[str, int]] = {
    "7M": {},  # the `tiny` preset
    "16M": {"num_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "num_query_groups": 2, "ffn_hidden_size": 1024},
}


class Case(NamedTuple):
    """What is asked for: prompts, how many new tokens each, and how they are drawn."""

    prompts: list[list[int]]
    new_tokens: list[int]
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def num_tokens(self) -> int:
        return sum(self.new_tokens)


def make_cases() -> dict[str, Case]:
    """Random prompts, the same in every run."""
    rng = random.Random(1)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1, VOCAB) for _ in range(length)]

    even = [prompt(64) for _ in range(BATCH)]
    shared = [each for each in [prompt(256) for _ in range(4)] for _ in range(8)]
    mixed = [prompt(rng.randint(16, 64)) for _ in range(2 * BATCH)]
    return {
        "sampled": Case(even, [128] * BATCH),
        "nucleus": Case(even, [128] * BATCH, top_p=0.95),
        "greedy": Case(even, [128] * BATCH, temperature=0.0),
        "groups": Case(shared, [128] * BATCH),
        "mixed": Case(mixed, [rng.randint(8, 128) for _ in mixed]),
    }


def build(groups: ProcessGroups, mcore: dict[str, int]) -> tuple[PretrainConfig, TokenStatsGPT, Any]:
    """A network with random weights, and transformers' model with the same."""
    cfg = tiny_config(**{"model.mcore": mcore})
    torch.manual_seed(1)
    network = build_inference_network(cfg, ParallelLayout(), groups, MACHINE, vocab_size=VOCAB)
    architecture = from_model_config(cfg.model, VOCAB)
    parameters = dict(network.named_parameters())
    theirs: dict[str, torch.Tensor] = {}
    for move in moves(architecture, {name: tuple(each.shape) for name, each in parameters.items()}):
        theirs |= move.split(parameters[move.ours].detach(), architecture.heads)
    settings = write_settings(architecture, dtype="float32", eos=None)
    config = transformers.AutoConfig.for_model(**settings)
    config.eos_token_id = config.bos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in theirs.items()})
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return cfg, network, model.eval()


def ours(engine: EmbeddedEngine, case: Case) -> list[list[int]]:
    """All completions of a case, in order."""
    for i, (prompt, new_tokens) in enumerate(zip(case.prompts, case.new_tokens, strict=True)):
        sampling = Sampling(max_new_tokens=new_tokens, temperature=case.temperature, top_p=case.top_p)
        engine.add(str(i), prompt, sampling, prompt_id=str(i), sample=0)
    done: dict[str, list[int]] = {}
    while not engine.is_idle:
        done |= {key: list(completion.tokens) for key, completion in engine.step()}
    return [done[str(i)] for i in range(len(case.prompts))]


def theirs(model: Any, case: Case) -> list[list[int]]:
    """The same of transformers, batch by batch."""
    out: list[list[int]] = []
    for start in range(0, len(case.prompts), BATCH):
        prompts, new_tokens = case.prompts[start : start + BATCH], case.new_tokens[start : start + BATCH]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        is_sampled = case.temperature > 0.0
        options = {"temperature": case.temperature, "top_p": case.top_p, "top_k": 0} if is_sampled else {}
        rows = model.generate(tokens, attention_mask=mask, max_new_tokens=max(new_tokens), do_sample=is_sampled, **options)
        out += [row[longest : longest + n].tolist() for row, n in zip(rows, new_tokens, strict=True)]
    return out


def limit_seconds(cfg: PretrainConfig, network: TokenStatsGPT, case: Case) -> tuple[float, float]:
    """(products at the rate of a large product, bytes read at the measured bandwidth) of a case."""
    config = transformer_config(cfg, ParallelLayout(), is_cuda=False)
    lookup = network.embedding.word_embeddings.weight.numel()
    weights = sum(each.numel() for each in network.parameters()) - lookup
    prompts = {tuple(each) for each in case.prompts}
    pairs = [(len(prompt), n) for prompt, n in zip(case.prompts, case.new_tokens, strict=True)]
    attended = sum(n * p + n * n // 2 for p, n in pairs) + sum(len(each) ** 2 // 2 for each in prompts)
    width = config.num_attention_heads * config.kv_channels
    head = network.output_layer.weight.numel()
    prompt_tokens = sum(map(len, prompts))
    flops = 2 * weights * (case.num_tokens + prompt_tokens) - 2 * head * prompt_tokens
    flops += 4 * config.num_layers * width * attended
    steps = case.num_tokens / BATCH
    per_token = 8 * config.num_layers * config.num_query_groups * config.kv_channels  # keys and values in fp32
    own = sum(n * n // 2 for _, n in pairs)
    prefixes = sum(
        len(prompt) * max(n for each, n in zip(case.prompts, case.new_tokens, strict=True) if tuple(each) == prompt)
        for prompt in prompts
    )
    read = 4 * weights * steps + per_token * (own + prefixes)
    return flops / product_rate(), read / bandwidth()


def product_rate() -> float:
    """Operations per second of a large product."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / min(_seconds(lambda: a @ b) for _ in range(20))


def bandwidth() -> float:
    """Bytes per second of reading memory that no cache of a core holds."""
    x = torch.randn(16 * 2**20)
    return 4 * x.numel() / min(_seconds(lambda: x.sum()) for _ in range(20))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(groups: ProcessGroups, size: str, names: Sequence[str], rounds: int) -> list[dict[str, float | str]]:
    """Both in turn over the same cases."""
    cfg, network, model = build(groups, SIZES[size])
    engine = EmbeddedEngine(network, ByteTokenizer(), groups, MACHINE.device, max_sequence_length=MOST_TOKENS, max_batch=BATCH)
    rows: list[dict[str, float | str]] = []
    for name, case in make_cases().items():
        if name not in names:
            continue
        if name == "greedy" and ours(engine, case) != theirs(model, case):
            raise SystemExit(f"{size}: the likeliest tokens of the two differ, so they do not compute the same")
        seconds: dict[str, list[float]] = {"engine": [], "transformers": []}
        for i in range(rounds + 1):
            both = (("engine", lambda case=case: ours(engine, case)), ("transformers", lambda case=case: theirs(model, case)))
            for which, call in both if i % 2 else both[::-1]:
                spent = _seconds(call)
                if i >= 1:  # the first round warms up
                    seconds[which].append(spent)
        middle = {which: statistics.median(values) for which, values in seconds.items()}
        products, reading = limit_seconds(cfg, network, case)
        rows.append(
            {
                "model": size,
                "case": name,
                "threads": str(torch.get_num_threads()),
                "engine_tokens_per_s": case.num_tokens / middle["engine"],
                "transformers_tokens_per_s": case.num_tokens / middle["transformers"],
                "ratio": middle["transformers"] / middle["engine"],
                "ratio_of_best": min(seconds["transformers"]) / min(seconds["engine"]),
                "products_limit_s": products,
                "reading_limit_s": reading,
                "share_of_limit": max(products, reading) / middle["engine"],
            }
        )
    return rows


def show(rows: Sequence[dict[str, float | str]]) -> Table:
    """Of one model, a column per case."""
    first = rows[0]
    table = Table(title=f"model of {first['model']} parameters, batch {BATCH}, fp32, {first['threads']} threads")
    table.add_column("")
    for row in rows:
        table.add_column(str(row["case"]), justify="right")
    for key in [key for key, value in first.items() if isinstance(value, float)]:
        table.add_row(key.replace("_", " "), *(f"{row[key]:.4g}" for row in rows))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", default=list(make_cases()), choices=list(make_cases()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    groups = ParallelLayout().initialize(seed=1)
    rows: list[dict[str, float | str]] = []
    for size in args.models:
        rows += compare(groups, size, args.cases, args.rounds)
        Console().print(show([row for row in rows if row["model"] == size]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    MACHINE.close()


if __name__ == "__main__":
    main()
