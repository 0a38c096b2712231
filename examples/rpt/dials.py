"""Builds the corpus of the example for one seed: short documents about a dial with ten positions. Nothing is downloaded.

    python examples/rpt/dials.py --out runs/rpt/seed1/corpus --seed 1

A document says where the dial stands and which moves follow, each with a letter, and then where it stands in the end:

    3a+b*c-=1           + turns it on by 3, * triples its number, - mirrors it, all modulo 10: 3, 6, 8, 1
    3a+b*c-...:a6b8c1=1 the same, worked out: the position after each move. It follows after any number of dots up to nine, so
                        that a model learns to work it out at any distance, and not at one

Up to two moves a small model can follow in one step. Longer ones it cannot, since the moves do not commute and there are
3^k of them; but it can learn each move from worked documents, and so it can reach the end with a token for each of them.

Parts, JSON Lines:
    pretrain   documents of both kinds, with 1 to 8 moves
    rpt        the same, each problem once: prompts are mined from it
    heldout    the same: prompts for validation are mined from it
    format     prompt and completion: what a thought with an answer looks like. Most of the thoughts stop too early
    replay     prompt and completion: documents of the pretraining, so that the format does not displace them

A problem of 4 moves or more belongs to one of the pretraining (with `format` and `replay`), `rpt` and `heldout`. Those with
fewer moves are too few to be divided.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

MOVES = {"+": lambda x: (x + 3) % 10, "*": lambda x: 3 * x % 10, "-": lambda x: 9 - x}
LETTERS = "abcdefgh"
POSITIONS = 10
MOST_DOTS = 9
FEW_MOVES = 3
"""Problems of so few moves are in every part."""

SHARE_WORKED = 0.5
SHARES = {"pretrain": 0.65, "rpt": 0.25, "heldout": 0.10}
"""Of the problems with more moves: who owns them."""

PATIENCE = 1000
"""So many problems in a row that were drawn before mean that there are hardly any others."""

OPEN, CLOSE = "<think>", "</think>"
PARTS = ("pretrain", "rpt", "heldout", "format", "replay")

Maker = Callable[[random.Random, int], Iterator[dict[str, Any]]]
DOCUMENTS = {"pretrain": 130_000, "rpt": 4_000, "heldout": 1_200, "format": 40_000, "replay": 20_000}
"""How many there are of each part, unless the command line says otherwise."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Where the dial stands, and its moves."""

    start: int
    moves: str

    @property
    def text(self) -> str:
        return str(self.start) + "".join(letter + move for letter, move in zip(LETTERS, self.moves, strict=False))

    def positions(self) -> list[int]:
        """Where the dial stands after each move."""
        found, at = [], self.start
        for move in self.moves:
            at = MOVES[move](at)
            found.append(at)
        return found

    def scratch(self, num_moves: int | None = None) -> str:
        """The position after each of the first moves; None for all."""
        return "".join(f"{letter}{at}" for letter, at in zip(LETTERS, self.positions()[:num_moves], strict=False))

    def document(self, *, worked: bool, dots: int = 0) -> str:
        between = f"{'.' * dots}:{self.scratch()}" if worked else ""
        return f"{self.text}{between}={self.positions()[-1]}\n"

    @property
    def owner(self) -> str:
        """A key of SHARES, by a hash: the same whatever the seed."""
        digest = hashlib.sha256(f"dials/{self.text}".encode()).digest()
        place = int.from_bytes(digest[:8], "little") / 2.0**64
        for name, share in SHARES.items():
            place -= share
            if place < 0.0:
                return name
        return name


def draw(rng: random.Random, owner: str) -> Problem:
    """A problem that the owner may use; any number of moves is as likely as another."""
    num_moves = rng.randint(1, len(LETTERS))
    while True:
        problem = Problem(rng.randrange(POSITIONS), "".join(rng.choices(tuple(MOVES), k=num_moves)))
        if num_moves <= FEW_MOVES or problem.owner == owner:
            return problem


def written(rng: random.Random, problem: Problem) -> dict[str, Any]:
    """As a document, worked out or not."""
    return {"text": problem.document(worked=rng.random() < SHARE_WORKED, dots=rng.randint(0, MOST_DOTS))}


def documents(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Of the pretraining."""
    for _ in range(count):
        yield written(rng, draw(rng, "pretrain"))


def different_documents(rng: random.Random, count: int, owner: str) -> Iterator[dict[str, Any]]:
    """No problem twice. Those of few moves run out, so that there are more of many moves.

    Raises:
        ValueError: there are not so many problems.
    """
    seen: set[str] = set()
    repeats = 0  # in a row
    while len(seen) < count:
        problem = draw(rng, owner)
        if problem.text in seen:
            repeats += 1
            if repeats == PATIENCE:
                raise ValueError(f"part {owner}: {count:,} documents are wanted, and hardly more than {len(seen):,} differ")
            continue
        repeats = 0
        seen.add(problem.text)
        yield written(rng, problem)


def format_examples(rng: random.Random, count: int, share_complete: float, stop_chance: float) -> Iterator[dict[str, Any]]:
    """Thoughts with an answer. A few are complete; the others go over to the end after every move with the same chance, and the
    right answer follows anyway, as nobody who writes examples of a format for a text checks that the thought leads to it."""
    for _ in range(count):
        problem = draw(rng, "pretrain")
        num_moves = len(problem.moves)
        if rng.random() >= share_complete:
            num_moves = 0
            while num_moves < len(problem.moves) and rng.random() >= stop_chance:
                num_moves += 1
        answer = problem.positions()[-1]
        yield {
            "prompt": f"{problem.text}={OPEN}",
            "completion": f"{problem.scratch(num_moves)}={answer}{CLOSE}\\boxed{{{answer}}}",
        }


def replay_examples(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Documents as prompt (their first character) and completion."""
    for record in documents(rng, count):
        yield {"prompt": record["text"][:1], "completion": record["text"][1:]}


def build(out: Path, seed: int, counts: Mapping[str, int], share_complete: float, stop_chance: float) -> None:
    """Write all parts."""
    out.mkdir(parents=True, exist_ok=True)
    makers: Mapping[str, Maker] = {
        "pretrain": documents,
        "rpt": partial(different_documents, owner="rpt"),
        "heldout": partial(different_documents, owner="heldout"),
        "format": partial(format_examples, share_complete=share_complete, stop_chance=stop_chance),
        "replay": replay_examples,
    }
    for part in PARTS:
        rng = random.Random(f"{seed}/{part}")  # parts do not depend on each other's size
        with (out / f"{part}.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in makers[part](rng, counts[part]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts")
    parser.add_argument("--seed", type=int, default=1, help="decides which problems are drawn (default: %(default)s)")
    for part, count in DOCUMENTS.items():
        parser.add_argument(f"--{part}-documents", type=int, default=count, help="default: %(default)s")
    parser.add_argument("--share-complete", type=float, default=0.06, help="thoughts of `format` that are complete")
    parser.add_argument("--stop-chance", type=float, default=0.55, help="that another thought ends, after every move")
    args = parser.parse_args(argv)
    counts = {part: getattr(args, f"{part}_documents") for part in PARTS}
    build(args.out, args.seed, counts, args.share_complete, args.stop_chance)


if __name__ == "__main__":
    main()
