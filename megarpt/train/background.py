"""Work on another thread of this process, whose outcome is a future."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any


def in_background(name: str, work: Callable[[], Any]) -> Future[Any]:
    """Start `work` on a thread of its own, which does not keep a dying process alive."""
    future: Future[Any] = Future()
    Thread(target=_settle, args=(future, work), name=name, daemon=True).start()
    return future


def at_once(work: Callable[[], Any]) -> Future[Any]:
    """The settled future of `work`, done here and now."""
    future: Future[Any] = Future()
    _settle(future, work)
    return future


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001  whoever asks for the result gets it
        future.set_exception(error)
