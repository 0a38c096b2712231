"""`megarpt serve`: an OpenAI-compatible server of completions with the embedded engine behind it.

The model works in the main thread and HTTP in another, so that a signal finds both in a known place.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarpt.config.schema import ParallelConfig, ServeOptions
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, CheckpointError, ConfigError, ExtensionError
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.engine_loop import EngineLoop
from megarpt.run.policy_weights import load_policy
from megarpt.run.pretrained import Pretrained, load_pretrained

logger = logging.getLogger(__name__)

_GRACE_S = 5  # for answers that are being sent when the server ends


def run(options: ServeOptions, runtime: Runtime) -> int:
    """Serve until a signal.

    Raises:
        ConfigError: more than one rank, or the address cannot be listened at.
        CheckpointError: there is no checkpoint, or it is damaged.
        ExtensionError: the libraries of the extra `serve` are not installed.
    """
    if runtime.world_size > 1:
        raise ConfigError(f"serve: got {runtime.world_size} ranks, expected one process; start it without torchrun")
    if options.weights_dir is not None and not Path(options.weights_dir).is_dir():
        raise ConfigError(f"--weights-dir: {options.weights_dir} is no folder; make it, or name the run's rollout.weights_dir")
    with _listener(options.host, options.port) as listener:  # before the model is read, which takes longer
        parallel = ParallelConfig()
        layout = ParallelLayout.resolve(parallel, runtime.world_size)
        groups = layout.initialize(seed=0)
        trained = load_pretrained(options.checkpoint, runtime, layout, groups, parallel)
        limit = options.max_sequence_length or trained.config.data.seq_length
        if limit > trained.network.max_sequence_length:
            raise ConfigError(
                f"--max-sequence-length: got {limit}, expected at most {trained.network.max_sequence_length}, the positions of "
                f"{trained.checkpoint}"
            )
        engine = EmbeddedEngine(
            trained.network,
            trained.tokenizer,
            groups,
            runtime.device,
            max_sequence_length=limit,
            max_batch=options.max_batch,
        )
        serve(
            engine,
            trained,
            listener,
            name=options.name or options.checkpoint,
            max_sequence_length=limit,
            max_waiting=options.max_waiting,
            weights_dir=options.weights_dir,
        )
    return EXIT_OK


def serve(
    engine: EmbeddedEngine,
    trained: Pretrained,
    listener: socket.socket,
    *,
    name: str,
    max_sequence_length: int,
    max_waiting: int,
    weights_dir: str | None,
) -> None:
    """Answer requests at a socket until SIGINT or SIGTERM. Call it in the main thread.

    Args:
        engine: over the network of `trained`.
        trained: the model.
        listener: listening.
        name: of the model, for clients.
        max_sequence_length: of a prompt with its completion.
        max_waiting: completions that may wait or be drawn.
        weights_dir: weights may be taken over from folders in it; None takes none.

    Raises:
        ExtensionError: the libraries of the extra `serve` are not installed.
        RolloutError: the engine failed.
    """
    try:
        import uvicorn

        from megarpt.run.completion_app import CompletionApp, Served
    except ImportError as error:
        raise ExtensionError(f"serve needs the library {error.name}: pip install -e '.[serve]'") from error

    def load(folder: Path, version: int) -> None:
        _require_inside(folder, Path(weights_dir or "."))
        load_policy(folder, trained.network, trained.config.model)
        engine.publish(version)

    loop = EngineLoop(engine, max_waiting=max_waiting)
    served = Served(
        name=name,
        tokenizer=trained.tokenizer,
        vocab_size=trained.network.valid_vocab_size,
        max_sequence_length=max_sequence_length,
        load=None if weights_dir is None else load,
    )
    app = CompletionApp(loop, served).app
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_GRACE_S)
    server = uvicorn.Server(config)

    def answer() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            loop.stop()  # without HTTP there is nothing to wait for

    http = threading.Thread(target=answer, name="http")
    with _until_signal(loop):
        http.start()
        host, port = listener.getsockname()[:2]
        logger.info("serving %s at http://%s:%d/v1 (ctrl-c ends it)", name, f"[{host}]" if ":" in host else host, port)
        try:
            loop.run()
        finally:
            server.should_exit = True
            http.join()
    logger.info("the server has ended")


@contextmanager
def _until_signal(loop: EngineLoop) -> Iterator[None]:
    """SIGINT and SIGTERM end the loop; a second one ends the process as usual."""

    def stop(number: int, _: types.FrameType | None) -> None:
        signal.signal(number, before[number])
        loop.stop()

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host: {host} is no address of this machine: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # who comes before the model is read waits
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port: cannot listen at {host}:{port}: {error.strerror}; choose another") from error
    return listener


def _require_inside(folder: Path, allowed: Path) -> None:
    """Clients must not have the server read just any file."""
    if allowed.resolve() not in folder.resolve().parents:
        raise CheckpointError(f"model_path: {folder} is not in {allowed}, the folder of --weights-dir")
