"""The engine that asks a server, against servers that misbehave and against what vLLM and SGLang say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megarpt.errors import ConfigError, DataError, RolloutError
from megarpt.parallel.layout import ProcessGroups
from megarpt.rl.rollout import Sampling
from megarpt.rl.server_dialects import request_seed
from megarpt.rl.server_engine import ServerEngine
from megarpt.rl.structs import Prompt, StopReason
from megarpt.testing.tiny import byte_tokenizer

SAMPLING = Sampling(max_new_tokens=4, stop_tokens=(256,), seed=7)
PROMPTS = [Prompt(id="a", tokens=(65,)), Prompt(id="b", tokens=(66, 67))]

Answer = tuple[int, Any]  # status, body


class Scripted:
    """A server whose answers a test chooses; it remembers what it was asked."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, Callable[[Any], Answer]] = {}
        self.version = "default"
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                status, content = scripted.answer(self.path, body)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client may leave before its answer comes."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: Any) -> Answer:
        with self._lock:
            self.asked.append((path, body))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if path in self.answers:
                return self.answers[path](body)
            if path == "/v1/models":
                return 200, {"data": [{"id": "tiny", "owned_by": self.owner}]}
            if path == "/update_weights_from_disk":
                self.version = body["weight_version"]
                return 200, {"success": True, "message": "ok", "num_paused_requests": 0}
            if path == "/model_info":
                return 200, {"weight_version": self.version}
            return 404, {"detail": "Not Found"}
        finally:
            with self._lock:
                self._at_once -= 1

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def servers() -> Iterator[Callable[[str], Scripted]]:
    started: list[Scripted] = []

    def start(owner: str) -> Scripted:
        started.append(Scripted(owner))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def engine_of(one_rank: ProcessGroups, tmp_path: Path) -> Callable[..., ServerEngine]:
    def make(url: str, **options: Any) -> ServerEngine:
        given = {"export": Path.mkdir, "first_wait_s": 0.001, "attempts": 3} | options
        return ServerEngine(url, tmp_path / "weights", byte_tokenizer(), one_rank, **given)

    return make


def choice(tokens: list[int], logprobs: list[float], reason: str = "length", index: int = 0) -> dict[str, Any]:
    return {
        "index": index,
        "text": "",
        "finish_reason": reason,
        "token_ids": tokens,
        "logprobs": {"tokens": [], "token_logprobs": logprobs, "top_logprobs": [None], "text_offset": []},
    }


def completions(*choices: dict[str, Any], **more: Any) -> Callable[[Any], Answer]:
    return lambda _: (200, {"id": "x", "object": "text_completion", "choices": list(choices), **more})


GOOD = completions(choice([72, 105, 33, 33], [-1.0, -0.5, 0.0, -2.0]), choice([104, 256], [-1.5, -0.25], "stop", 1))


def test_megarpt_is_asked_for_whole_groups(servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]) -> None:
    server = servers("megarpt")
    server.answers["/v1/completions"] = GOOD
    engine = engine_of(server.url + "/v1/")
    engine.publish(2)
    first, second = engine.generate(PROMPTS, group_size=2, sampling=SAMPLING)
    assert (first.prompt, second.prompt) == tuple(PROMPTS)
    hi, h = first.completions
    assert (hi.tokens, hi.logprobs, hi.text, hi.stop, hi.policy_version) == (
        (72, 105, 33, 33),
        (-1.0, -0.5, 0.0, -2.0),
        b"Hi!!",
        StopReason.LENGTH,
        2,
    )
    assert (h.tokens, h.text, h.stop) == ((104, 256), b"h", StopReason.STOP)
    bodies = {body["prompt_id"]: body for path, body in server.asked if path == "/v1/completions"}
    assert bodies["b"] == {
        "model": "tiny",
        "prompt": [66, 67],
        "prompt_id": "b",
        "n": 2,
        "seed": 7,
        "max_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": [256],
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_vllm_is_asked_for_each_completion_with_its_own_seed(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], tmp_path: Path
) -> None:
    server = servers("vllm")
    server.answers |= {
        "/v1/completions": completions(choice([104, 256], [-1.5, 1e-6], "stop")),
        "/collective_rpc": lambda _: (200, {"results": [None]}),
        "/reset_prefix_cache": lambda _: (200, {"success": True}),
    }
    engine = engine_of(server.url)
    engine.publish(0)
    assert (
        "/collective_rpc",
        {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights/version-00000000")}},
    ) in (server.asked)
    assert server.paths().index("/reset_prefix_cache") > server.paths().index("/collective_rpc")
    groups = engine.generate(PROMPTS, group_size=3, sampling=SAMPLING)
    assert [len(group.completions) for group in groups] == [3, 3]
    assert groups[0].completions[0].logprobs == (-1.5, 0.0)
    bodies = [body for path, body in server.asked if path == "/v1/completions"]
    assert {body["n"] for body in bodies} == {1} and not any("prompt_id" in body for body in bodies)
    expected = {request_seed(7, prompt.id, sample) for prompt in PROMPTS for sample in range(3)}
    assert {body["seed"] for body in bodies} == expected and len(expected) == 6
    assert all(0 <= seed < 2**31 for seed in expected)


@pytest.mark.parametrize("said", ["1", "0"])
def test_vllm_that_knows_its_version_is_asked(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], said: str
) -> None:
    server = servers("vllm")
    server.answers |= {
        "/collective_rpc": lambda _: (200, {"results": [None]}),
        "/reset_prefix_cache": lambda _: (200, {}),
        "/update_weight_version": lambda body: (200, {"success": True, "new_version": body["new_version"]}),
        "/weight_info": lambda _: (200, {"weight_version": said}),
    }
    engine = engine_of(server.url)
    if said == "1":
        engine.publish(1)
        assert engine.policy_version == 1
    else:
        with pytest.raises(RolloutError, match="has weights '0' after it was given '1'"):
            engine.publish(1)


def test_vllm_without_development_mode_cannot_take_weights(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]
) -> None:
    with pytest.raises(RolloutError, match="VLLM_SERVER_DEV_MODE=1"):
        engine_of(servers("vllm").url).publish(1)


def test_sglang_is_asked_in_its_own_way(servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]) -> None:
    server = servers("sglang")
    answer = {
        "text": "h",
        "output_ids": [104, 256],
        "meta_info": {
            "id": "1",
            "finish_reason": {"type": "stop", "matched": 256},
            "output_token_logprobs": [[-1.5, 104, None], [-0.25, 256, None]],
            "weight_version": "4",
        },
    }
    server.answers["/generate"] = lambda _: (200, answer)
    engine = engine_of(server.url)
    engine.publish(4)
    (group,) = engine.generate(PROMPTS[:1], group_size=2, sampling=SAMPLING)
    assert [(each.tokens, each.logprobs, each.stop) for each in group.completions] == [
        ((104, 256), (-1.5, -0.25), StopReason.STOP)
    ] * 2
    bodies = [body for path, body in server.asked if path == "/generate"]
    assert bodies[0]["input_ids"] == [65] and bodies[0]["return_logprob"] is True
    seeds = {body["sampling_params"].pop("sampling_seed") for body in bodies}
    assert seeds == {request_seed(7, "a", sample) for sample in range(2)}
    assert bodies[0]["sampling_params"] == {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "stop_token_ids": [256],
        "skip_special_tokens": False,
    }
    with pytest.raises(RolloutError, match=r"rollout\.top_p 0\.9 with SGLang"):
        engine.generate(PROMPTS, group_size=2, sampling=Sampling(max_new_tokens=4, top_p=0.9))


def test_older_sglang_says_its_version_elsewhere(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]
) -> None:
    server = servers("sglang")
    server.answers["/model_info"] = lambda _: (404, {})
    server.answers["/get_weight_version"] = lambda _: (200, {"weight_version": server.version})
    engine_of(server.url).publish(6)
    assert server.paths()[-2:] == ["/model_info", "/get_weight_version"]


def test_a_server_that_fails_now_and_then_is_asked_again(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]
) -> None:
    server = servers("megarpt")
    statuses = iter([500, 503, 200])

    def sometimes(body: Any) -> Answer:
        status = next(statuses)
        return GOOD(body) if status == 200 else (status, {"error": {"message": "busy"}})

    server.answers["/v1/completions"] = sometimes
    engine = engine_of(server.url)
    engine.publish(1)
    (group,) = engine.generate(PROMPTS[:1], group_size=2, sampling=SAMPLING)
    assert len(group.completions) == 2 and server.paths().count("/v1/completions") == 3


@pytest.mark.parametrize(("status", "times"), [(500, 3), (503, 3), (400, 1), (404, 1), (429, 1), (302, 1)])
def test_requests_are_repeated_where_that_may_help_and_not_for_ever(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], status: int, times: int
) -> None:
    server = servers("megarpt")
    server.answers["/v1/completions"] = lambda _: (status, {"error": {"message": "the reason " + "x" * 9999}})
    engine = engine_of(server.url)
    engine.publish(1)
    with pytest.raises(RolloutError, match=f"{server.url}/v1/completions.*status {status}.*the reason x") as caught:
        engine.generate(PROMPTS[:1], group_size=2, sampling=SAMPLING)
    assert server.paths().count("/v1/completions") == times
    assert len(str(caught.value)) < 1000


def test_a_server_that_is_down(servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]) -> None:
    server = servers("megarpt")
    engine = engine_of(server.url)
    engine.publish(1)
    server.close()
    with pytest.raises(RolloutError, match=r"no answer .*3 times; is the server running"):
        engine.generate(PROMPTS, group_size=2, sampling=SAMPLING)
    with pytest.raises(RolloutError, match="3 times"):
        engine_of(server.url).publish(1)


def test_a_server_that_takes_too_long(servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]) -> None:
    server = servers("megarpt")
    may_go = threading.Event()

    def late(body: Any) -> Answer:
        may_go.wait(30)
        return GOOD(body)

    server.answers["/v1/completions"] = late
    engine = engine_of(server.url)
    engine.publish(1)
    engine.limit_s = 0.2
    with pytest.raises(RolloutError, match=r"drawing 2 x 2 completions: .* took longer than 0.2 s"):
        engine.generate(PROMPTS, group_size=2, sampling=SAMPLING)
    may_go.set()


def test_so_many_at_a_time(servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]) -> None:
    server = servers("megarpt")
    met = threading.Barrier(3)

    def wait_for_two_others(body: Any) -> Answer:
        met.wait(30)
        return GOOD(body)

    server.answers["/v1/completions"] = wait_for_two_others
    engine = engine_of(server.url, concurrency=3)
    engine.publish(1)
    prompts = [Prompt(id=str(i), tokens=(65,)) for i in range(9)]
    assert [group.prompt.id for group in engine.generate(prompts, group_size=2, sampling=SAMPLING)] == list("012345678")
    assert server.most_at_once == 3


MALFORMED = {
    "no JSON": (lambda _: (200, b"<html>"), "JSON"),
    "empty": (lambda _: (200, b""), "JSON"),
    "another object": (lambda _: (200, {"object": "chat.completion", "choices": []}), "object"),
    "no choices": (completions(), "got 0 completions, expected 2"),
    "one choice": (completions(choice([1] * 4, [-1.0] * 4)), "got 1 completions, expected 2"),
    "twice the same": (completions(choice([1] * 4, [-1.0] * 4), choice([1] * 4, [-1.0] * 4)), "numbered"),
    "no ids": (completions({"index": 0, "text": "a", "finish_reason": "length"}), "return_token_ids"),
    "no log-probabilities": (completions({"index": 0, "text": "a", "token_ids": [1]}), "logprobs"),
    "a negative id": (completions(choice([-1], [-1.0])), "choices"),
    "too many tokens": (completions(choice([1] * 5, [-1.0] * 5), choice([1] * 4, [-1.0] * 4, index=1)), "from 1 to 4"),
    "no tokens": (completions(choice([], []), choice([1] * 4, [-1.0] * 4, index=1)), "from 1 to 4"),
    "too few log-probabilities": (completions(choice([1] * 4, [-1.0] * 3), choice([1], [-1.0], index=1)), "3 log-prob"),
    "a probability above 1": (completions(choice([1] * 4, [0.5] * 4), choice([1], [-1.0], index=1)), "at most 0"),
    "a probability of 0": (lambda _: (200, json.dumps(GOOD(None)[1]).replace("-1.5", "-Infinity").encode()), ""),
    "on behind the end": (completions(choice([256, 1], [-1.0] * 2), choice([1], [-1.0], index=1)), "1 follow it"),
    "an end of its own": (completions(choice([1], [-1.0], "stop"), choice([1], [-1.0], index=1)), "ended at token 1"),
    "other weights": (lambda _: (200, GOOD(None)[1] | {"weight_version": "0"}), "drawn with weights '0', expected '1'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_answers_that_cannot_be_true_are_refused(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], name: str
) -> None:
    server = servers("megarpt")
    server.answers["/v1/completions"], said = MALFORMED[name]
    engine = engine_of(server.url)
    engine.publish(1)
    with pytest.raises(RolloutError, match="prompt a: the answer cannot be used") as caught:
        engine.generate(PROMPTS[:1], group_size=2, sampling=SAMPLING)
    assert said in str(caught.value)


def test_what_was_taken_greedily_was_certain(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]
) -> None:
    server = servers("megarpt")
    server.answers["/v1/completions"] = GOOD
    engine = engine_of(server.url)
    engine.publish(1)
    greedy = Sampling(max_new_tokens=4, temperature=0.0, stop_tokens=(256,))
    (group,) = engine.generate(PROMPTS[:1], group_size=2, sampling=greedy)
    assert {value for each in group.completions for value in each.logprobs} == {0.0}


def test_nothing_is_drawn_before_weights_are_published(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]
) -> None:
    server = servers("megarpt")
    with pytest.raises(RolloutError, match="before publish"):
        engine_of(server.url).generate(PROMPTS, group_size=2, sampling=SAMPLING)
    assert server.asked == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"success": False, "message": "out of memory"}), "out of memory"),
        ((400, {"success": False, "message": "no such folder"}), "no such folder"),
        ((200, b"yes"), "the answer is none"),
    ],
)
def test_weights_that_were_not_taken_over(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], answer: Answer, said: str
) -> None:
    server = servers("sglang")
    server.answers["/update_weights_from_disk"] = lambda _: answer
    engine = engine_of(server.url)
    with pytest.raises(RolloutError, match=said):
        engine.publish(1)
    assert engine.policy_version == -1


def test_a_server_that_says_yes_and_keeps_its_weights(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine]
) -> None:
    server = servers("sglang")
    server.answers["/model_info"] = lambda _: (200, {"weight_version": "default"})
    with pytest.raises(RolloutError, match="has weights 'default' after it was given '1'"):
        engine_of(server.url).publish(1)


@pytest.mark.parametrize("owner", ["openai", ""])
def test_servers_of_an_unknown_kind(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], owner: str
) -> None:
    with pytest.raises(RolloutError, match=f"by '{owner}', expected one of megarpt, vllm, sglang"):
        engine_of(servers(owner).url).publish(1)


def test_two_versions_are_kept_whatever_an_earlier_run_left(
    servers: Callable[[str], Scripted], engine_of: Callable[..., ServerEngine], tmp_path: Path
) -> None:
    (tmp_path / "weights/version-00000900").mkdir(parents=True)
    (tmp_path / "weights/mine").mkdir()
    engine = engine_of(servers("megarpt").url)
    for version in (1, 2, 3, 2):  # a run that was taken up again publishes a version anew
        engine.publish(version)
        assert (tmp_path / f"weights/version-{version:08}").is_dir()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["mine", "version-00000002", "version-00000003"]


def test_a_folder_that_cannot_be_written(engine_of: Callable[..., ServerEngine], tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(DataError, match="weights"):
        engine_of("http://127.0.0.1:1").publish(1)


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://host"])
def test_an_address_that_is_none(engine_of: Callable[..., ServerEngine], url: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.url"):
        engine_of(url)
