"""The embedded engine draws what one process draws, however the model and the prompts are divided over ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.config.schema import ParallelConfig
from megarpt.corpus.tokenizers import ByteTokenizer
from megarpt.device import runtime
from megarpt.errors import ConfigError
from megarpt.model.build import build_model, unwrap
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Prompt
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.shards import write_sharded
from megarpt.train.sharded import load_sharded

SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
SHARP = {**SMALL, "init_method_std": 0.15}  # random weights whose distributions are far from uniform
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"preset": "tiny", "mcore": SHARP},
    "gpt2": {"preset": "gpt2-124m", "mcore": {**SHARP, "num_query_groups": 4}},
    "experts": {
        "preset": "tiny-moe",
        "mcore": {**SHARP, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48},
    },
}
TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
SAMPLING = Sampling(max_new_tokens=16, temperature=0.9, top_k=100, top_p=0.95, stop_tokens=(256, 10))

Drawn = dict[str, list[tuple[tuple[int, ...], tuple[float, ...]]]]


def make_prompts() -> list[Prompt]:
    rng = random.Random(3)
    return [Prompt(id=f"p{i}", tokens=tuple(rng.choices(range(256), k=rng.randint(1, 12)))) for i in range(6)]


def draw(model: dict[str, Any], parallel: dict[str, Any], folder: str) -> Drawn | str:
    """This rank's completions: prompt -> tokens and log-probabilities; or why they cannot be drawn."""
    started = runtime.start("cpu")
    cfg = tiny_config(
        **{
            "model": {**model, "vocab_size": 384, "make_vocab_size_divisible_by": 64},
            "data.seq_length": 64,
            "parallel": parallel,
        }
    )
    layout = ParallelLayout.resolve(ParallelConfig(**parallel), started.world_size)
    groups = layout.initialize(seed=1)
    torch.manual_seed(1)
    network = unwrap(build_model(cfg, layout, groups, started, vocab_size=257)[0])
    weights_from_one_process(network, Path(folder) / "model")
    try:
        engine = EmbeddedEngine(network, ByteTokenizer(), groups, started.device, max_sequence_length=64, max_batch=7)
    except ConfigError as error:
        return str(error)
    own = make_prompts()[groups.dp_rank :: groups.dp_size]
    drawn = engine.generate(own, group_size=3, sampling=SAMPLING)
    return {group.prompt.id: [(each.tokens, each.logprobs) for each in group.completions] for group in drawn}


def weights_from_one_process(network: torch.nn.Module, folder: Path) -> None:
    """The first process to come here writes its weights, the others read them."""
    sharded = {"model": network.sharded_state_dict()}
    if not folder.exists():
        if torch.distributed.get_world_size() == 1:
            write_sharded(sharded, folder)
        return
    network.load_state_dict(load_sharded(sharded, folder, what="model", differences={}, same_vocabulary=True)["model"])


@pytest.mark.parametrize(
    ("model", "parallel"),
    [("llama", TP), ("llama", SP), ("llama", {}), ("gpt2", TP), ("experts", {}), ("experts", TP)],
    ids=["tp2", "tp2-sp", "dp2", "gpt2-tp2", "experts-dp2", "experts-tp2"],
)
def test_two_ranks_draw_what_one_process_draws(tmp_path: Path, model: str, parallel: dict[str, Any]) -> None:
    (expected,) = spawn(1, draw, MODELS[model], {}, str(tmp_path))
    ranks = spawn(2, draw, MODELS[model], parallel, str(tmp_path))
    if parallel:  # both hold the same prompts, and the same to the last bit
        assert ranks[0] == ranks[1]
    else:
        assert not ranks[0].keys() & ranks[1].keys()
    together = ranks[0] | ranks[1]
    assert together.keys() == expected.keys()
    for name, completions in together.items():
        for (tokens, logprobs), (same_tokens, near_logprobs) in zip(completions, expected[name], strict=True):
            assert tokens == same_tokens
            assert list(logprobs) == pytest.approx(near_logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ("llama", {"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size above 1"),
        ("llama", {"context_parallel_size": 2}, "context_parallel_size above 1"),
        ("experts", {"expert_model_parallel_size": 2}, "expert_model_parallel_size above 1"),
        ("experts", SP, "sequence_parallel with experts"),
    ],
    ids=["pp2", "cp2", "ep2", "experts-sp"],
)
def test_other_layouts_are_sent_to_a_server(tmp_path: Path, model: str, parallel: dict[str, Any], message: str) -> None:
    for refusal in spawn(2, draw, MODELS[model], parallel, str(tmp_path)):
        assert f"cannot decode with {message}" in refusal and "rollout.engine=server" in refusal
