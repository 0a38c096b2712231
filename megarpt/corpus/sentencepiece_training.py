"""Trains a sentencepiece tokenizer that loses nothing: decode(encode(text)) is text, blanks, line ends and all.

Only U+2581, which sentencepiece itself writes for a space, comes back as one.
"""

from __future__ import annotations

import heapq
import io
import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megarpt import __version__
from megarpt.corpus.atomic import atomic_write_bytes, atomic_write_json
from megarpt.corpus.console import ProgressLine, StopSignal
from megarpt.corpus.encoders import PROBES
from megarpt.corpus.inputs import Format, InputFile, find_inputs
from megarpt.corpus.readers import ReadOptions, cut, read_documents
from megarpt.corpus.tokenizers import SentencePieceTokenizer
from megarpt.corpus.worker import too_many_malformed
from megarpt.errors import ConfigError, DataError, ExtensionError

logger = logging.getLogger(__name__)

_SENTENCE_BYTES = 4096  # text is given to the trainer in pieces of about this size
_SPECIAL = 3  # <unk>, <s>, </s>
_SPACE = "▁"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """The command line of `tools/train_tokenizer.py`."""

    inputs: Sequence[str]
    output: str
    vocab_size: int
    model_type: Literal["bpe", "unigram"] = "bpe"
    byte_fallback: bool = True
    split_digits: bool = True
    character_coverage: float = 0.9995
    format: Format | None = None
    read: ReadOptions = ReadOptions()  # noqa: RUF009  frozen
    skip_malformed: int = 0
    max_sentences: int = 2_000_000
    max_bytes: int = 100_000_000
    seed: int = 1234
    threads: int = 1
    overwrite: bool = False


def train_tokenizer(options: TrainingOptions, stop: StopSignal) -> SentencePieceTokenizer:
    """Read a sample of the text, train, check that nothing is lost, write the model and its manifest.

    Cost: memory for `max_bytes` of text and sentencepiece's several times that.

    Raises:
        ConfigError: the output exists, or the vocabulary does not fit the text.
        DataError: an input is at fault, or the model cannot be written.
        ExtensionError: sentencepiece is not installed.
        Stopped: a signal came while reading; training itself cannot be stopped half-way.
    """
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise ConfigError(f"{output}: is there already; choose another --output, or pass --overwrite")
    smallest = _SPECIAL + 256 * options.byte_fallback + 1
    if options.vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size: got {options.vocab_size}, expected at least {smallest}: {_SPECIAL} special pieces, "
            f"{256 if options.byte_fallback else 0} bytes and the letters of the text"
        )
    files = find_inputs(options.inputs, format=options.format)
    sample = _Sample(options.max_sentences, options.max_bytes, options.seed)
    counts = _read(files, options, sample, stop)
    if not sample.texts:
        raise DataError(
            f"no text in {', '.join(file.path for file in files[:5])}; are the files empty, or is --text-key wrong?"
        )
    logger.info(
        "training %s on %d pieces, %.1f MB of %.1f MB of text",
        options.model_type,
        len(sample.texts),
        sample.bytes / 1e6,
        sample.seen / 1e6,
    )
    stop.check("nothing is left behind, run the same command again")
    content = _train(options, sample.in_order())
    tokenizer = SentencePieceTokenizer(output, content)
    _check_lossless(tokenizer, [*PROBES, *itertools.islice(sample.in_order(), 200)], byte_fallback=options.byte_fallback)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(output, content)
    settings = {key: value for key, value in asdict(options).items() if key not in ("inputs", "output", "threads", "overwrite")}
    atomic_write_json(
        f"{output}.json",
        {
            "kind": "tokenizer",
            "version": 1,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "settings": settings,
            "inputs": [
                {"name": file.name, "size_bytes": file.size, "fingerprint": file.fingerprint, "num_documents": count}
                for file, count in zip(files, counts, strict=True)
            ],
            "num_documents": sum(counts),
            "text_bytes": sample.seen,
            "sample_sentences": len(sample.texts),
            "sample_bytes": sample.bytes,
            "tool_version": __version__,
        },
    )
    return tokenizer


class _Sample:
    """A uniform sample of pieces of text within a number and a size, in one pass: the pieces with the smallest lots stay."""

    def __init__(self, max_sentences: int, max_bytes: int, seed: int) -> None:
        self._lots = random.Random(seed)
        self._max_sentences, self._max_bytes = max_sentences, max_bytes
        self.texts: list[tuple[float, int, str, int]] = []  # a heap: minus the lot, place in the input, text, bytes
        self.bytes = self.seen = self._place = 0

    def add(self, text: str) -> None:
        size = len(text.encode())
        self.seen += size
        self._place += 1
        heapq.heappush(self.texts, (-self._lots.random(), self._place, text, size))
        self.bytes += size
        while len(self.texts) > self._max_sentences or (self.bytes > self._max_bytes and len(self.texts) > 1):
            self.bytes -= heapq.heappop(self.texts)[3]

    def in_order(self) -> Iterator[str]:
        """The pieces in the order of the input."""
        return (text for _lot, _place, text, _size in sorted(self.texts, key=lambda each: each[1]))


def _read(files: Sequence[InputFile], options: TrainingOptions, sample: _Sample, stop: StopSignal) -> list[int]:
    """Fill the sample; the documents of each file."""
    counts, done, malformed = [0] * len(files), 0, 0
    with ProgressLine("reading", sum(file.size for file in files)) as progress:
        for segment in cut(files, options.read, segment_bytes=1 << 62):
            file = files[segment.file]

            def on_malformed(line: int, reason: str, file: InputFile = file) -> None:
                nonlocal malformed
                malformed += 1
                if malformed > options.skip_malformed:
                    raise too_many_malformed(file, line, reason, options.skip_malformed)
                logger.warning("skipped %s:%d: malformed: %s", file.path, line, reason)

            for block in read_documents(file, segment, options.read, on_malformed):
                stop.check("nothing is left behind, run the same command again")
                counts[segment.file] += len(block.texts)
                done += block.read_bytes
                for text in block.texts:
                    for piece in _pieces(text):
                        sample.add(piece)
                progress.update(done, f"{sample.seen / 1e6:.0f} MB of text")
    return counts


def _pieces(text: str) -> Iterator[str]:
    """A document in pieces of whole lines, as far as its lines allow."""
    start = 0
    while start < len(text):
        end = start + _SENTENCE_BYTES
        if end < len(text):
            newline = text.rfind("\n", start, end)
            end = newline + 1 if newline > start else end
        yield text[start:end]
        start = end


def _train(options: TrainingOptions, texts: Iterator[str]) -> bytes:
    try:
        import sentencepiece
    except ImportError as error:
        raise ExtensionError("training a tokenizer needs sentencepiece: pip install sentencepiece") from error
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": options.vocab_size,
        "model_type": options.model_type,
        "character_coverage": options.character_coverage,
        "byte_fallback": options.byte_fallback,
        "split_digits": options.split_digits,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        # What is lost is lost for good: no normalization, no space put in front, runs of blanks kept and learned.
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": 8 * _SENTENCE_BYTES,
        "num_threads": options.threads,
        "minloglevel": 2,
    }
    try:
        # The trainer refuses text with NUL and takes U+2581 for a space; both are left out of the sample, not of the language.
        clean = (text.replace("\0", "").replace(_SPACE, "") for text in texts)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=clean, model_writer=model, **settings)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"sentencepiece cannot train {options.vocab_size} {options.model_type} pieces on this text: {reason}; choose "
            "another --vocab-size or give more text"
        ) from error
    return model.getvalue()


def _check_lossless(tokenizer: SentencePieceTokenizer, texts: Sequence[str], *, byte_fallback: bool) -> None:
    """Without byte fallback letters outside the vocabulary are lost, and that was asked for."""
    for text in texts if byte_fallback else ():
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text.replace(_SPACE, " "):
            raise DataError(
                f"the trained tokenizer loses text: got {back[:80]!r} back, expected {text[:80]!r}; this version of "
                "sentencepiece does not do what it was told: use another"
            )
