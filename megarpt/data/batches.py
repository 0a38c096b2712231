"""From windows to the micro-batches of one data-parallel rank, with a position that can be saved and restored.

Sample i of a global batch goes to micro-batch m and rank r with i = m * (dp * b) + r * b + j, so that the union over ranks is
the same run of samples whatever the layout.

Dims: b micro-batch, s sequence length, dp data-parallel ranks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megarpt.data.fingerprint import OrderFingerprint
from megarpt.data.order import SampleOrder
from megarpt.data.samples import SampleDataset
from megarpt.data.sharing import StepShare
from megarpt.data.windows import PADDING_ID
from megarpt.errors import ConfigError, DataError
from megarpt.structs import TokenBatch

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]


def assemble(datasets: Sequence[SampleDataset], source: Int64Array, window: Int64Array, index: Int64Array) -> TokenBatch:
    """One micro-batch in host memory. A negative window makes a row of padding that trains nothing.

    Shapes: source, window, index [b].
    """
    b, s = len(window), datasets[0].seq_length
    tokens, labels, loss_mask = np.empty((b, s), np.int64), np.empty((b, s), np.int64), np.empty((b, s), np.bool_)
    streams = {name: np.empty((b, s), np.float32) for name in datasets[0].streams}
    starts = []
    for row in range(b):
        row_streams = {name: values[row] for name, values in streams.items()}
        starts.append(np.array([row * s]))
        if window[row] >= 0:
            dataset = datasets[source[row]]
            inside = dataset.read_into(int(window[row]), tokens[row], labels[row], loss_mask[row], row_streams)
            starts.append(inside + row * s)
        else:
            tokens[row], labels[row], loss_mask[row] = PADDING_ID, PADDING_ID, False
            for values in row_streams.values():
                values[:] = 0.0
    edges = np.concatenate([*starts, [b * s]])
    edges = edges[np.append(True, edges[1:] != edges[:-1])]  # empty documents repeat an edge
    position_ids = np.arange(b * s) - np.repeat(edges[:-1], np.diff(edges))
    return TokenBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(position_ids.reshape(b, s)),
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        sample_id=torch.from_numpy(np.array(window, dtype=np.int64)),
        source_id=torch.from_numpy(np.array(source, dtype=np.int64)),
        sample_index=torch.from_numpy(np.array(index, dtype=np.int64)),
        streams={name: torch.from_numpy(values) for name, values in streams.items()},
    )


def _each_tensor(batch: TokenBatch, change: Any) -> TokenBatch:
    changed = {f.name: change(getattr(batch, f.name)) for f in fields(batch) if f.name != "streams"}
    return replace(batch, **changed, streams={name: change(value) for name, value in batch.streams.items()})


def pin(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The batch in page-locked memory when `device` is a GPU, so that its copy overlaps with computation."""
    return _each_tensor(batch, Tensor.pin_memory) if device.type == "cuda" else batch


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The batch on `device`; the copy of a pinned batch runs behind the computation."""
    if device.type == "cpu":
        return batch
    return _each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


class TokenBatches:
    """The endless stream of training micro-batches of one data-parallel rank.

    Steps are read ahead by one thread. What was read ahead is not part of the state: the state is the number of the next sample
    to be handed out, and every sample follows from its number.

    Raises:
        ConfigError: global_batch_size is not a multiple of micro_batch_size times dp_size.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        share_over: ProcessGroup | None = None,
        steps_ahead: int = 2,
    ) -> None:
        """Micro-batches of data-parallel rank `dp_rank` of `dp_size`.

        Args:
            datasets: the corpora of the blend.
            weights: their relative shares.
            seed: of the order.
            global_batch_size: samples of a step over all ranks.
            micro_batch_size: samples of a micro-batch.
            dp_rank: this rank's place.
            dp_size: ranks that read other samples.
            device: where the micro-batches are wanted.
            share_over: ranks that need the same samples, of which the first reads; all must ask for the same steps.
            steps_ahead: how many steps the thread reads before they are asked for.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"batch.global_batch_size: got {global_batch_size}, expected a multiple of batch.micro_batch_size "
                f"({micro_batch_size}) times the data-parallel size ({dp_size}) = {micro_batch_size * dp_size}"
            )
        self.datasets = tuple(datasets)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_microbatches = global_batch_size // (micro_batch_size * dp_size)
        self.seq_length = self.datasets[0].seq_length
        self.consumed_samples = 0
        self._weights = [float(weight) for weight in weights]
        self._seed = seed
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._device = device
        self._share: StepShare | None = None
        if share_over is not None and share_over.size() > 1:
            shape = (self.num_microbatches, micro_batch_size, self.seq_length)
            self._share = StepShare(share_over, shape, sorted(self.datasets[0].streams), device)
        self._order = SampleOrder([dataset.num_windows for dataset in self.datasets], weights, seed)
        self._chain = OrderFingerprint(self._order, self._windows())
        self._steps_ahead = steps_ahead
        self._ahead: deque[Future[list[TokenBatch]]] = deque()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megarpt-data")

    def next_step(self) -> list[TokenBatch]:
        """This rank's micro-batches of the next optimizer step, on the device.

        Raises:
            DataError: a corpus or a sidecar turned out to be damaged; the position stays where it was.
        """
        batches = self._read_ahead() if self._share is None else self._share(self._read_ahead)
        self._chain.advance(self.consumed_samples, self.global_batch_size)
        self.consumed_samples += self.global_batch_size
        return batches

    def _read_ahead(self) -> list[TokenBatch]:
        while len(self._ahead) < max(1, self._steps_ahead):
            first = self.consumed_samples + len(self._ahead) * self.global_batch_size
            self._ahead.append(self._reader.submit(self._read_step, first))
        try:
            batches = self._ahead[0].result()
        except DataError:
            self._forget_ahead()
            raise
        self._ahead.popleft()
        return [to_device(batch, self._device) for batch in batches]

    def move_to(self, sample: int) -> None:
        """Go on with sample `sample`, wherever the position is; what lies between is not read."""
        self._forget_ahead()
        self.consumed_samples = sample

    @property
    def data_order(self) -> str:
        """Fingerprint of all samples handed out since the start of the run; equal on every rank."""
        return self._chain.value

    def _read_step(self, first: int) -> list[TokenBatch]:
        refs = self._order.locate(first, self.global_batch_size)
        batches = []
        for number in range(self.num_microbatches):
            begin = (number * self._dp_size + self._dp_rank) * self.micro_batch_size
            rows = slice(begin, begin + self.micro_batch_size)
            index = np.arange(first + begin, first + begin + self.micro_batch_size)
            batches.append(pin(assemble(self.datasets, refs.source[rows], refs.window[rows], index), self._device))
        return batches

    def _forget_ahead(self) -> None:
        while self._ahead:
            self._ahead.popleft().cancel()

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which tokens sample n holds. Paths are not part of it: data may move."""
        return {
            "seed": self._seed,
            "seq_length": self.seq_length,
            "separate_documents": self.datasets[0].separate_documents,
            "sources": [
                {"weight": weight, **dataset.fingerprint()}
                for weight, dataset in zip(self._weights, self.datasets, strict=True)
            ],
        }

    def _windows(self) -> dict[str, Any]:
        """What decides the text of each window."""
        return {
            "seq_length": self.seq_length,
            "separate_documents": self.datasets[0].separate_documents,
            "corpora": [dataset.content_sha256 for dataset in self.datasets],
        }

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain values; equal on every rank."""
        return {
            "consumed_samples": self.consumed_samples,
            "order": self._chain.state_dict(self.consumed_samples),
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, under any data-parallel size and any global batch size.

        Raises:
            DataError: the run's data are not those of the checkpoint, or would come in another order.
        """
        difference = _first_difference(state["fingerprint"], self.fingerprint(), "data")
        if difference is not None:
            where, saved, now = difference
            raise DataError(
                f"{where}: got {now!r}, expected {saved!r} as in the checkpoint; going on would repeat some text and skip "
                "other text. Restore the data of the checkpoint, or begin a new run with model.init_from"
            )
        self._chain.load_state_dict(state["order"])
        self.move_to(int(state["consumed_samples"]))

    def close(self) -> None:
        """Stop reading ahead."""
        self._forget_ahead()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TokenBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_difference(saved: Any, now: Any, where: str) -> tuple[str, Any, Any] | None:
    """Path, saved and present value of the first place where two nested values differ."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        pairs = [(f"{where}.{key}", saved.get(key), now.get(key)) for key in dict.fromkeys([*saved, *now])]
    elif isinstance(saved, list | tuple) and isinstance(now, list | tuple) and len(saved) == len(now):
        pairs = [(f"{where}[{at}]", *pair) for at, pair in enumerate(zip(saved, now, strict=True))]
    elif isinstance(saved, list | tuple) and isinstance(now, list | tuple):
        return f"{where} (number of entries)", len(saved), len(now)
    else:
        return None if saved == now else (where, saved, now)
    for path, old, new in pairs:
        difference = _first_difference(old, new, path)
        if difference is not None:
            return difference
    return None


def evaluation_batches(
    dataset: SampleDataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    device: torch.device,
    max_tokens: int | None = None,
    first_window: int = 0,
) -> Iterator[TokenBatch]:
    """One pass over a corpus from `first_window` on: each window exactly once over all ranks, in order.

    Every rank gets the same number of micro-batches, filled up with rows that train nothing (sample_id -1), so that collectives
    meet. `max_tokens` stops after the window that reaches it.
    """
    count = dataset.num_windows
    if max_tokens is not None:
        count = min(count, -(-max_tokens // dataset.seq_length))
    for base in range(first_window, count, micro_batch_size * dp_size):
        window = base + dp_rank * micro_batch_size + np.arange(micro_batch_size)
        window = np.where(window < count, window, -1)
        batch = assemble([dataset], np.zeros(micro_batch_size, np.int64), window, window)
        yield to_device(pin(batch, device), device)
