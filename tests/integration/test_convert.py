"""Published weights in and out: what transformers computes is what megarpt computes, bit for bit what was stored comes back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from megarpt.config.hf_settings import from_model_config
from megarpt.config.schema import (
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    ParallelConfig,
    PretrainConfig,
    ScoreOptions,
    StreamConfig,
)
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, ConfigError, MegarptError
from megarpt.model.build import build_network, transformer_config
from megarpt.model.convert_hf import moves
from megarpt.model.forward import head_output
from megarpt.model.token_stats_gpt import HeadMode
from megarpt.parallel.layout import ParallelLayout
from megarpt.run import convert, evaluate, export, generate, pretrain, score
from megarpt.run.pretrained import load_pretrained
from megarpt.structs import TokenBatch
from megarpt.testing.tiny import text_documents, write_text_corpus
from megarpt.train.checkpoint_files import read_config, read_manifest
from megarpt.train.weights import checkpoint_hash

ROOT = Path(__file__).parents[2]
VOCAB = 301  # no multiple of the padding
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama-tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-heads": transformers.LlamaConfig(**SHAPE | {"num_key_value_heads": 4, "head_dim": 32}),
    "llama-3.1": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA_3 | {"rope_theta": 5e5}),
    "llama-linear": transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=64),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen2-tied": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32),
    "qwen3-tied": transformers.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(**GPT2),
}

Publish = Callable[..., Path]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Makes folders as Hugging Face publishes them: a model whose every number is random, and a tokenizer of 259 entries."""

    def make(name: str = "llama", *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases begin as 0 and norms as 1, which would hide mistakes
        folder = tmp_path / f"hf-{name}"
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        write_tokenizer(folder)
        return folder

    return make


def write_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["abc"], letters)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def sample(length: int = 48) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def our_logits(checkpoint: Path, runtime: Runtime, tokens: Tensor) -> Tensor:
    layout = ParallelLayout()
    network = load_pretrained(str(checkpoint), runtime, layout, layout.initialize(1), ParallelConfig()).network
    positions = torch.arange(tokens.shape[1]).expand(*tokens.shape)
    return network(tokens, positions, None, runtime_gather_output=True)[..., :VOCAB]


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_every_tensor_comes_back(
    name: str, publish: Publish, cpu_runtime: Runtime, tmp_path: Path
) -> None:
    folder, imported, back = publish(name), tmp_path / "imported", tmp_path / "back"
    convert.import_model(folder, imported, cpu_runtime)
    tokens = sample()
    expected = their_logits(folder, tokens)
    assert (our_logits(imported, cpu_runtime, tokens) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1  # numbers that would show a mistake
    convert.export_model(str(imported), back, family=MODELS[name].model_type)
    assert_equal_tensors(stored(folder), stored(back))
    assert (their_logits(back, tokens) - expected).abs().max() < 1e-6
    again = tmp_path / "again"
    convert.import_model(back, again, cpu_runtime)
    assert checkpoint_hash(again) == checkpoint_hash(imported)
    assert read_config(again).model == read_config(imported).model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "llama-heads", "qwen2", "qwen3-tied", "gpt2"])
def test_gradients_of_streamed_layers_are_those_of_transformers(
    name: str, publish: Publish, cpu_runtime: Runtime, tmp_path: Path
) -> None:
    """In fp64, with labels that begin and end anywhere."""
    folder = publish(name)
    convert.import_model(folder, tmp_path / "imported", cpu_runtime)
    cfg = read_config(tmp_path / "imported")
    cfg = cfg.model_copy(update={"stream": StreamConfig(layers=True, chunk_tokens=13)})
    config = transformer_config(cfg, ParallelLayout(), is_cuda=False)
    layout = ParallelLayout()
    loaded = load_pretrained(str(tmp_path / "imported"), cpu_runtime, layout, layout.initialize(1), ParallelConfig())
    streamed = build_network(cfg, config, None, vocab_size=VOCAB, backend="torch").double().train()
    streamed.load_state_dict(loaded.network.state_dict())

    tokens, labels = sample(), sample().roll(-1, dims=1)
    labels[0, :21], labels[1, 40:] = -100, -100
    b, s = tokens.shape
    batch = TokenBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=labels >= 0,
        position_ids=torch.arange(s).expand(b, s),
        cu_seqlens=torch.arange(0, b * s + 1, s, dtype=torch.int32),
        sample_id=torch.arange(b),
        source_id=torch.zeros(b, dtype=torch.int64),
        sample_index=torch.arange(b),
    )
    loss = -head_output(streamed, batch, HeadMode.LOGPROB)[0].sum()
    loss.backward()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    logits = theirs(tokens, use_cache=False).logits
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    their_loss.backward()

    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-7)  # rotary angles are fp32 in both
    heads = (architecture := from_model_config(cfg.model, VOCAB, MODELS[name].model_type)).heads
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours = {name: parameter.grad for name, parameter in streamed.named_parameters()}
    planned = moves(architecture, {name: tuple(gradient.shape) for name, gradient in ours.items()})
    found = {name: part for move in planned for name, part in move.split(ours[move.ours], heads).items()}
    assert found.keys() == expected.keys()
    for tensor in expected:
        assert (found[tensor] - expected[tensor]).norm() < 1e-5 * expected[tensor].norm(), tensor


def test_bf16_and_fp16_lose_nothing(publish: Publish, cpu_runtime: Runtime, tmp_path: Path) -> None:
    half = publish("qwen3-tied", dtype=torch.bfloat16)
    convert.import_model(half, tmp_path / "bf16", cpu_runtime)
    assert read_config(tmp_path / "bf16").train.precision == "bf16"
    convert.export_model(str(tmp_path / "bf16"), tmp_path / "back")
    assert_equal_tensors(stored(half), stored(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    verdict = convert.verify(half, str(tmp_path / "bf16"), cpu_runtime, num_sequences=2, num_tokens=32, seed=1)
    assert verdict.max_difference < 1e-5 and verdict.same_choice == 1.0 and verdict.num_tokens == 64
    other = publish("llama", dtype=torch.float16)
    convert.import_model(other, tmp_path / "fp16", cpu_runtime)
    assert read_config(tmp_path / "fp16").train.precision == "fp32"
    convert.export_model(str(tmp_path / "fp16"), tmp_path / "fp16-back", dtype=torch.float16)
    assert_equal_tensors(stored(other), stored(tmp_path / "fp16-back"))
    edit(half, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    convert.import_model(half, tmp_path / "large", cpu_runtime)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds .*beyond torch\.float16"):
        convert.export_model(str(tmp_path / "large"), tmp_path / "fp16-large", dtype=torch.float16)
    assert not list(tmp_path.glob("*fp16-large*"))


def test_weights_in_several_files(publish: Publish, cpu_runtime: Runtime, tmp_path: Path) -> None:
    folder = publish("qwen2", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    save_file({"other.name": torch.zeros(1)}, folder / "consolidated.safetensors")  # as in Mistral's folders; no index names it
    convert.import_model(folder, tmp_path / "imported", cpu_runtime)
    convert.export_model(str(tmp_path / "imported"), tmp_path / "back", max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 102_000 for path in (tmp_path / "back").glob("*.safetensors"))
    (folder / "consolidated.safetensors").unlink()
    assert_equal_tensors(stored(folder), stored(tmp_path / "back"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(folder).values())
    assert (their_logits(tmp_path / "back", sample()) - their_logits(folder, sample())).abs().max() < 1e-6


def test_gpt2_as_it_was_published_first(publish: Publish, cpu_runtime: Runtime, tmp_path: Path) -> None:
    folder = publish("gpt2")
    convert.import_model(folder, tmp_path / "new", cpu_runtime)
    old = {name.removeprefix("transformer."): tensor for name, tensor in stored(folder).items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril() for i in range(2)}
    save_file(old, folder / "model.safetensors")
    convert.import_model(folder, tmp_path / "old", cpu_runtime)
    assert checkpoint_hash(tmp_path / "old") == checkpoint_hash(tmp_path / "new")


@pytest.fixture
def imported(publish: Publish, cpu_runtime: Runtime, tmp_path: Path) -> Path:
    convert.import_model(publish("llama"), tmp_path / "imported", cpu_runtime, seq_length=64)
    return tmp_path / "imported"


@pytest.fixture
def corpus(imported: Path, tmp_path: Path) -> Path:
    write_text_corpus(tmp_path / "text", text_documents(60, seed=1), load_tokenizer(str(imported / "tokenizer.json")))
    return tmp_path / "text"


def test_a_run_begins_from_imported_weights_and_can_be_published(
    imported: Path,
    corpus: Path,
    publish: Publish,
    make_config: Callable[..., PretrainConfig],
    cpu_runtime: Runtime,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = read_config(imported).model.model_copy(update={"init_from": str(imported), "make_vocab_size_divisible_by": 512})
    assert (
        evaluate.run(EvaluateOptions(checkpoint=str(imported), corpora={"held": str(corpus)}, output="json"), cpu_runtime) == 0
    )
    loss = json.loads(capsys.readouterr().out)["corpora"]["held"]["loss_nats"]
    cfg = make_config(
        **{
            "model": model.model_dump(),
            "data": {
                "tokenizer": str(imported / "tokenizer.json"),
                "train": [{"path": str(corpus)}],
                "valid": {"held": str(corpus)},
                "seq_length": 64,
            },
            "optimizer": {"lr": 1e-3},
            "train.train_tokens": 2 * 8 * 64,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    lines = [json.loads(line) for line in (Path(cfg.run.dir) / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "valid/held/loss_nats" in line)
    assert first["step"] == 0 and first["valid/held/loss_nats"] == pytest.approx(loss, abs=1e-5)
    assert sum(line["kind"] == "train" for line in lines) == 2
    convert.export_model(cfg.run.dir, tmp_path / "published")
    before, after = stored(tmp_path / "hf-llama"), stored(tmp_path / "published")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    assert not any(torch.equal(before[name], after[name]) for name in before)  # it was trained
    gap = (their_logits(tmp_path / "published", sample()) - our_logits(Path(cfg.run.dir), cpu_runtime, sample())).abs().max()
    assert gap < 1e-5
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "published")
    assert text("What it was.")["input_ids"] == load_tokenizer(str(imported)).encode("What it was.")
    assert text.eos_token == "<|endoftext|>"


def test_imported_weights_go_wherever_a_checkpoint_goes(
    imported: Path, corpus: Path, cpu_runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score.run(ScoreOptions(reference=str(imported), corpus=str(corpus)), cpu_runtime) == 0
    assert generate.run(GenerateOptions(checkpoint=str(imported), prompt="What ", max_new_tokens=4), cpu_runtime) == 0
    assert capsys.readouterr().out.startswith("What ")
    assert export.run(ExportOptions(checkpoint=str(imported), output=str(tmp_path / "copy"))) == 0
    assert checkpoint_hash(tmp_path / "copy") == checkpoint_hash(imported)
    manifest = read_manifest(imported)
    assert not manifest.has_training_state and manifest.versions["imported"]["family"] == "llama"
    assert set(manifest.files) >= {"config.yaml", "tokenizer.json", "tokenizer_config.json", "model/__0_0.distcp"}
    shutil.rmtree(tmp_path / "hf-llama")
    moved = imported.rename(tmp_path / "elsewhere")
    assert generate.run(GenerateOptions(checkpoint=str(moved), prompt="What ", max_new_tokens=4), cpu_runtime) == 0


def test_rows_that_the_tokenizer_does_not_use_can_be_left_out(publish: Publish, cpu_runtime: Runtime, tmp_path: Path) -> None:
    folder = publish("qwen2-tied")
    convert.import_model(folder, tmp_path / "small", cpu_runtime, vocab_size=259)
    assert read_config(tmp_path / "small").model.vocab_size == 259
    tokens = sample() % 259
    expected = their_logits(folder, tokens)[..., :259]
    layout = ParallelLayout()
    ours = our_logits(tmp_path / "small", cpu_runtime, tokens)
    assert (ours[..., :259] - expected).abs().max() < 1e-5 and not ours[..., 259:].any() and layout.tp == 1
    convert.export_model(str(tmp_path / "small"), tmp_path / "back")
    assert stored(tmp_path / "back")["model.embed_tokens.weight"].shape == (259, 64)
    for wrong, message in ((302, "at most 301"), (258, r"259 entries and the model 258 rows \(--vocab-size\)")):
        with pytest.raises(ConfigError, match=message):
            convert.import_model(folder, tmp_path / "no", cpu_runtime, vocab_size=wrong)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | settings))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def forget_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(load_file(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    where = {"weight_map": names | {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(where))


NORM, HEAD = "model.norm.weight", "lm_head.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (lambda f: edit(f, lambda t: t.pop(NORM)), r"model.norm.weight: missing, expected shape \(64,\)"),
    "unknown tensor": (lambda f: edit(f, lambda t: t.update({"extra": torch.ones(2)})), r"extra: shape \(2,\), not a tensor"),
    "other shape": (lambda f: edit(f, lambda t: t.update({NORM: torch.ones(63)})), r"got shape \(63,\), expected \(64,\)"),
    "other settings": (lambda f: configure(f, intermediate_size=97), r"gate_proj.weight: got shape \(96, 64\), expected \(97"),
    "not a number": (lambda f: edit(f, lambda t: t[NORM].fill_(float("nan"))), "model.norm.weight holds NaN or infinity"),
    "quantized": (
        lambda f: edit(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})),
        "model.norm.weight is neither",
    ),
    "not tied": (lambda f: configure(f, tie_word_embeddings=True), "lm_head.weight: differs from model.embed_tokens.weight"),
    "truncated file": (cut, r"model.safetensors is damaged"),
    "missing file": (forget_one, "disagree about lm_head.weight|model-00002-of-00002.safetensors is missing"),
    "no weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "no settings": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "unknown key": (lambda f: configure(f, logit_scale=2.0), "logit_scale: 2.0"),
    "unknown scaling": (lambda f: configure(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type: got 'yarn'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer, expected tokenizer.json or tokenizer.model"),
    "small vocabulary": (
        lambda f: configure(f, vocab_size=200),
        r"259 entries and the model 200 rows \(vocab_size in config.json",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_is_named_and_leaves_nothing(what: str, publish: Publish, cpu_runtime: Runtime, tmp_path: Path) -> None:
    folder = publish("llama")
    break_it, message = DAMAGE[what]
    break_it(folder)
    with pytest.raises(MegarptError, match=message):
        convert.import_model(folder, tmp_path / "out", cpu_runtime)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_what_cannot_be_published_is_named_and_leaves_nothing(imported: Path, cpu_runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        convert.export_model(str(imported), imported)
    with pytest.raises(ConfigError, match="exists already"):
        convert.import_model(tmp_path / "hf-llama", imported, cpu_runtime)
    with pytest.raises(CheckpointError, match=r"qwen3: model\.mcore\.qk_layernorm is False"):
        convert.export_model(str(imported), tmp_path / "out", family="qwen3")
    (tmp_path / ".out.tmp").mkdir()  # as a killed export leaves it
    (tmp_path / ".out.tmp" / "old").touch()
    convert.export_model(str(imported), tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists() and not list(tmp_path.glob(".out*"))
    shard = next(imported.glob("model/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: got sha256"):
        convert.export_model(str(imported), tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


@pytest.fixture
def tool() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    yield run


def test_the_tool(publish: Publish, tool: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    folder, other = publish("llama"), publish("llama-heads")
    done = tool("import", "--hf", folder, "--output", tmp_path / "models" / "tiny")
    assert done.returncode == 0 and "model.preset=tiny" in done.stderr, done.stderr
    done = tool("export", "--checkpoint", tmp_path / "models" / "tiny", "--output", tmp_path / "back", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    done = tool("verify", "--hf", folder, "--checkpoint", tmp_path / "models" / "tiny")
    assert done.returncode == 0 and "128 tokens: logits differ by at most" in done.stdout, done.stderr
    done = tool("verify", "--hf", other, "--checkpoint", tmp_path / "models" / "tiny")
    assert done.returncode == 79 and "does not compute what" in done.stderr
    done = tool("import", "--hf", tmp_path, "--output", tmp_path / "none")
    assert done.returncode == 79 and "Traceback" not in done.stderr
