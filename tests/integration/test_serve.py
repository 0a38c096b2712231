"""`megarpt serve` as its users meet it: a process, asked over HTTP, by people and by a training run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarpt.config.schema import ParallelConfig, ServeOptions
from megarpt.device import runtime
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, ConfigError, DataError
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.rollout import Sampling
from megarpt.rl.server_engine import ServerEngine
from megarpt.rl.structs import Prompt, StopReason
from megarpt.run import convert, pretrain, serve
from megarpt.run.policy_weights import PolicyExporter, load_policy
from megarpt.run.pretrained import Pretrained, load_pretrained
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.distributed import spawn

PROMPTS = [Prompt(id=f"p{i}", tokens=tuple(text.encode())) for i, text in enumerate(("The cat", "One or", "A"))]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, stop_tokens=(256, ord("e")), seed=5)


@dataclass
class Server:
    """A running `megarpt serve`."""

    url: str
    process: subprocess.Popen[str]
    run: str
    weights_dir: Path
    log: list[str]

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def complete(self, **body: Any) -> Any:
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer


@pytest.fixture(scope="module")
def run_dir(corpora: Path, cpu_runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("served") / "run"
    cfg = tiny_config(
        **{
            "run.dir": str(folder),
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(corpora / "train")}],
            "data.seq_length": 64,
            "batch": {"micro_batch_size": 4, "global_batch_size": 8},
            "optimizer": {"lr": 3e-3},
            "train.train_tokens": 1024,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    return str(folder)


def start(run: str, weights_dir: Path, *options: str) -> Server:
    command = [sys.executable, "-m", "megarpt", "serve", run, "--port", "0", "--weights-dir", str(weights_dir), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"at (http://\S+)/v1", line):
            break
    else:
        raise AssertionError("".join(log))
    threading.Thread(target=lambda: log.extend(process.stderr), daemon=True).start()
    return Server(found[1], process, run, weights_dir, log)


@pytest.fixture(scope="module")
def server(run_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(run_dir, tmp_path_factory.mktemp("weights"), "--max-batch", "8", "--max-waiting", "4096", "--name", "tiny")
    yield running
    running.process.terminate()
    assert running.process.wait(timeout=60) == 0, "".join(running.log)


@pytest.fixture
def policy(run_dir: str, cpu_runtime: Runtime) -> Pretrained:
    """The model that is served at first, in this process."""
    layout = ParallelLayout()
    return load_pretrained(run_dir, cpu_runtime, layout, layout.initialize(seed=0), ParallelConfig())


@pytest.fixture
def embedded(policy: Pretrained, cpu_runtime: Runtime) -> EmbeddedEngine:
    groups = ParallelLayout().initialize(seed=0)
    return EmbeddedEngine(policy.network, policy.tokenizer, groups, cpu_runtime.device, max_sequence_length=64)


@pytest.fixture
def engine(server: Server, policy: Pretrained) -> ServerEngine:
    groups = ParallelLayout().initialize(seed=0)
    export = exporter_of(policy)
    return ServerEngine(server.url, server.weights_dir, policy.tokenizer, groups, export=export, first_wait_s=0.01)


def exporter_of(policy: Pretrained, groups: ProcessGroups | None = None) -> PolicyExporter:
    return PolicyExporter(
        [policy.network],
        groups or ParallelLayout().initialize(seed=0),
        policy.config.model,
        vocab_size=policy.network.valid_vocab_size,
        tokenizer=policy.tokenizer,
        dtype=torch.float32,
    )


def change(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_a_server_draws_what_the_embedded_engine_draws(engine: ServerEngine, embedded: EmbeddedEngine) -> None:
    engine.publish(3)
    embedded.publish(3)
    here = embedded.generate(PROMPTS, group_size=3, sampling=SAMPLING)
    there = engine.generate(PROMPTS, group_size=3, sampling=SAMPLING)
    assert [group.prompt for group in there] == PROMPTS
    completions = list(zip((c for g in here for c in g.completions), (c for g in there for c in g.completions), strict=True))
    assert len(completions) == 9 and len({ours.tokens for ours, _ in completions}) > 3
    for ours, theirs in completions:
        assert (ours.tokens, ours.text, ours.stop, ours.policy_version) == (
            theirs.tokens,
            theirs.text,
            theirs.stop,
            theirs.policy_version,
        )
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-5)
    assert {ours.stop for ours, _ in completions} == {StopReason.STOP, StopReason.LENGTH}


def test_publishing_changes_what_is_drawn_and_keeps_two_versions(
    engine: ServerEngine, embedded: EmbeddedEngine, policy: Pretrained, server: Server
) -> None:
    drawn = []
    for version in (10, 11, 12):
        change(policy.network, version)
        engine.publish(version)
        embedded.publish(version)
        drawn.append(engine.generate(PROMPTS, group_size=2, sampling=SAMPLING))
        direct = embedded.generate(PROMPTS, group_size=2, sampling=SAMPLING)
        tokens = [[[c.tokens for c in group.completions] for group in groups] for groups in (drawn[-1], direct)]
        assert tokens[0] == tokens[1]
        assert {c.policy_version for group in drawn[-1] for c in group.completions} == {version}
        assert server.get("/model_info")["weight_version"] == str(version)
    assert drawn[0] != drawn[1] != drawn[2]
    assert sorted(path.name for path in server.weights_dir.iterdir()) == ["version-00000011", "version-00000012"]


def test_a_person_asks(server: Server) -> None:
    assert server.get("/health") == {}
    assert server.get("/v1/models")["data"][0]["id"] == "tiny"
    answer = server.complete(model="tiny", prompt="The cat", max_tokens=8, seed=1, user="me")
    assert answer["object"] == "text_completion" and answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert answer["usage"]["prompt_tokens"] == 7
    assert server.complete(prompt="The cat", max_tokens=8, seed=1)["choices"] == answer["choices"]
    assert server.complete(prompt=list(b"The cat"), max_tokens=8, seed=1)["choices"] == answer["choices"]
    several = server.complete(prompt=["The cat", "One"], n=2, max_tokens=4, logprobs=0, return_token_ids=True, ignore_eos=True)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    for choice in several["choices"]:
        assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) == 4
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])


def test_seeds_are_random_where_none_is_given(server: Server) -> None:
    texts = {server.complete(prompt="The cat", max_tokens=16)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_greedy_is_one_answer(server: Server) -> None:
    answer = server.complete(prompt="The", max_tokens=8, temperature=0, n=3)
    assert len({choice["text"] for choice in answer["choices"]}) == 1


@pytest.mark.parametrize("stop", ["text", "token"])
def test_texts_and_tokens_end_a_completion(server: Server, stop: str) -> None:
    asked = {"prompt": "The cat", "max_tokens": 24, "seed": 3, "return_token_ids": True, "ignore_eos": True, "top_k": 30}
    whole = server.complete(**asked)["choices"][0]
    token = next(each for each in whole["token_ids"][2:] if 32 < each < 127)
    how = {"stop": [chr(token)]} if stop == "text" else {"stop_token_ids": [token]}
    cut = server.complete(**asked, **how)["choices"][0]
    end = whole["token_ids"].index(token)
    assert cut["token_ids"] == whole["token_ids"][: end + 1]
    assert cut["text"] == bytes(each for each in whole["token_ids"][:end] if each < 256).decode(errors="replace")
    assert cut["finish_reason"] == "stop" and cut["stop_reason"] == (chr(token) if stop == "text" else token)


def events(server: Server, **body: Any) -> list[str]:
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body | {"stream": True}).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: ")]


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    asked = {"prompt": ["The cat", "A"], "n": 2, "max_tokens": 9, "seed": 4, "return_token_ids": True, "logprobs": 0}
    whole = server.complete(**asked)
    *chunks, last = events(server, **asked, stream_options={"include_usage": True})
    assert last == "[DONE]"
    *chunks, total = map(json.loads, chunks)
    assert total["choices"] == [] and total["usage"] == whole["usage"]
    for choice in whole["choices"]:
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
        logprobs = [value for piece in pieces for value in piece["logprobs"]["token_logprobs"]]
        assert logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]


REFUSED: list[tuple[Any, int, str]] = [
    (b"", 400, "JSON"),
    (b"{" * 100_000, 400, ""),
    (b"[1]", 400, "object"),
    ({"max_tokens": 3}, 400, "prompt"),
    ({"prompt": ""}, 400, "no tokens"),
    ({"prompt": []}, 400, "no tokens"),
    ({"prompt": [["a"]]}, 400, "expected a text"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [257]}, 400, "below 257"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": 64}, 400, "at most 63"),
    ({"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens"),
    ({"prompt": "a" * 100_000}, 400, "shorten"),
    ({"prompt": "a", "n": 5000}, 400, "n"),
    ({"prompt": ["a"] * 100, "n": 100}, 400, "1024"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    (b'{"prompt": "a", "temperature": NaN}', 400, ""),
    ({"prompt": "a", "top_p": 0}, 400, "top_p"),
    ({"prompt": "a", "top_p": "0.5"}, 400, "top_p"),
    ({"prompt": "a", "echo": True}, 400, "echo"),
    ({"prompt": "a", "logprobs": 5}, 400, "logprobs"),
    ({"prompt": "a", "logit_bias": {"1": 5}}, 400, "logit_bias"),
    ({"prompt": "a", "max_token": 5}, 400, "max_token"),
    ({"prompt": "a", "stop": [""]}, 400, "stop"),
    ({"prompt": "a", "seed": 2**80}, 400, "seed"),
    ({"prompt": "a", "model": "other"}, 404, "other"),
    (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', 413, "larger"),
]


@pytest.mark.parametrize(("body", "status", "said"), REFUSED)
def test_what_cannot_be_done_is_refused(server: Server, body: Any, status: int, said: str) -> None:
    try:
        got, answer = server.post("/v1/completions", body)
    except (urllib.error.URLError, ConnectionError):
        assert status == 413, "the server may close the connection before all of a body that is too large was sent"
        return
    assert got == status
    assert said in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_paths_that_are_not_served(server: Server) -> None:
    status, answer = server.post("/v1/chat/completions", {})
    assert status == 404 and "/v1/chat/completions" in answer["error"]["message"]


def test_weights_come_from_the_named_folder_only(server: Server, run_dir: str) -> None:
    status, answer = server.post("/update_weights_from_disk", {"model_path": run_dir, "weight_version": "9"})
    assert status == 400 and not answer["success"] and "--weights-dir" in answer["message"]
    inside = str(server.weights_dir / "missing")
    status, answer = server.post("/update_weights_from_disk", {"model_path": inside, "weight_version": "9"})
    assert status == 400 and "missing" in answer["message"]
    status, answer = server.post("/update_weights_from_disk", {"model_path": inside, "weight_version": "nine"})
    assert status == 400 and "weight_version" in answer["error"]["message"]


def test_a_client_that_leaves_takes_its_completions_along(server: Server) -> None:
    """The queue would be full of them otherwise."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "n": 1024, "max_tokens": 60, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(8):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            time.sleep(0.05)
    deadline = time.monotonic() + 60
    while server.post("/v1/completions", {"prompt": "a", "n": 1024, "max_tokens": 1})[0] != 200:
        assert time.monotonic() < deadline, "completions that nobody waits for are still drawn"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_tells_who_waits(
    embedded: EmbeddedEngine, policy: Pretrained, number: signal.Signals
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    told: list[bytes] = []

    def ask_and_send_the_signal() -> None:
        body = json.dumps({"prompt": "a", "n": 1000, "max_tokens": 60, "ignore_eos": True, "stream": True}).encode()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
            os.kill(os.getpid(), number)
            told.append(answer.read())

    client = threading.Thread(target=ask_and_send_the_signal)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    client.start()
    serve.serve(embedded, policy, listener, name="tiny", max_sequence_length=64, max_waiting=1000, weights_dir=None)
    client.join()
    assert b"the server ended before" in told[0] and told[0].endswith(b"data: [DONE]\n\n")
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 1 << 14, "host": "203.0.113.1"}, "cannot listen"),
        ({"weights_dir": "/nowhere"}, "--weights-dir"),
        ({"max_sequence_length": 1 << 20}, "positions"),
    ],
)
def test_mistakes_of_a_command_line(run_dir: str, cpu_runtime: Runtime, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        serve.run(ServeOptions(checkpoint=run_dir, **{"port": 0} | options), cpu_runtime)


def test_weights_of_another_model_change_nothing(policy: Pretrained, tmp_path: Path) -> None:
    folder = tmp_path / "version"
    exporter_of(policy)(folder)
    load_policy(folder, policy.network, policy.config.model)  # once, since rows that pad the vocabulary become zero
    before = [parameter.clone() for parameter in policy.network.parameters()]
    change(policy.network, 1)
    load_policy(folder, policy.network, policy.config.model)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.network.parameters(), strict=True))
    settings = json.loads((folder / "config.json").read_text())
    for key, value in (("rms_norm_eps", 0.1), ("rope_theta", 5.0), ("hidden_size", 128)):
        (folder / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(CheckpointError, match="another model"):
            load_policy(folder, policy.network, policy.config.model)
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan  # the last but one that is read
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        load_policy(folder, policy.network, policy.config.model)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.network.parameters(), strict=True))


def test_a_policy_with_broken_weights_is_not_published(policy: Pretrained, tmp_path: Path) -> None:
    with torch.no_grad():
        next(policy.network.parameters())[0, 0] = torch.inf
    with pytest.raises(DataError, match="infinity"):
        exporter_of(policy)(tmp_path / "version")
    assert not (tmp_path / "version").exists()


def generate_on_a_rank(parallel: dict[str, int], run: str, url: str, weights_dir: str, version: int) -> list[Any]:
    started = runtime.start("cpu")
    config = ParallelConfig(**parallel)
    layout = ParallelLayout.resolve(config, started.world_size)
    groups = layout.initialize(seed=0)
    policy = load_pretrained(run, started, layout, groups, config)
    export = exporter_of(policy, groups)
    # Only the first rank of a copy may talk to the server.
    engine = ServerEngine(
        url if groups.is_first_of_copy else "http://nowhere", Path(weights_dir), policy.tokenizer, groups, export=export
    )
    engine.publish(version)
    drawn = engine.generate(PROMPTS[groups.dp_rank :: groups.dp_size], group_size=2, sampling=SAMPLING)
    return [(group.prompt.id, [each.tokens for each in group.completions]) for group in drawn]


@pytest.mark.parametrize(
    ("parallel", "version"),
    [({"tensor_model_parallel_size": 2}, 20), ({"pipeline_model_parallel_size": 2}, 21), ({}, 22)],
    ids=["tensor", "pipeline", "data"],
)
def test_every_layout_publishes_the_same_weights_and_gets_the_same_groups(
    server: Server, embedded: EmbeddedEngine, run_dir: str, tmp_path: Path, parallel: dict[str, int], version: int
) -> None:
    embedded.publish(version)
    expected = [
        (group.prompt.id, [each.tokens for each in group.completions])
        for group in embedded.generate(PROMPTS, group_size=2, sampling=SAMPLING)
    ]
    ranks = spawn(2, generate_on_a_rank, parallel, run_dir, server.url, str(server.weights_dir), version)
    assert ranks == ([expected, expected] if parallel else [expected[::2], expected[1::2]])
    convert.export_model(run_dir, tmp_path / "exported")
    here, there = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "exported", server.weights_dir / f"version-{version:08}")
    )
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
