"""What a worker runs to judge mathematics. Only workers import this: loading sympy takes a while."""

from __future__ import annotations

import logging
from typing import Any, Literal

import math_verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off


def judge_math(item: tuple[str, str]) -> Literal["right", "wrong", "no answer", "no solution"]:
    """Whether an answer equals the solution; "no answer" and "no solution" where nothing in the text reads as mathematics.

    math-verify's own timeouts are off: they are signals, and it takes a time-out for a wrong answer.

    Args:
        item: solution and answer.

    Raises:
        Exception: math-verify could not compare the two, by whatever error; no way of reading them made them equal.
    """
    solution, answer = item
    wanted = _parse(solution)
    if not wanted:
        return "no solution"
    given = _parse(answer)
    if not given:
        return "no answer"
    failure: Exception | None = None
    for right in wanted:  # readings of the text: as an expression, and as it is
        for said in given:
            try:
                if math_verify.verify(right, said, timeout_seconds=None, raise_on_error=True):
                    return "right"
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001  raised below, unless another reading is right
                failure = failure or error
    if failure is not None:
        raise failure
    return "wrong"


def _parse(text: str) -> list[Any]:
    return list(math_verify.parse(text, parsing_timeout=None, raise_on_error=True))


# The grammar and the tables of sympy are built by the first use, which is not to count against the limit of an item.
judge_math((r"\boxed{\frac{1}{2}}", r"\boxed{0.5x}"))
