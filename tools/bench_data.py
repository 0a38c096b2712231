"""Samples per CPU second of the data layer, beside megatron-core's GPTDataset on the same corpus in the same process.

python tools/bench_data.py --seq-length 2048 --samples 4000 --mean-document 600 --json bench_data.json
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from megarpt.device import mcore_cpu

EOD = 0
VOCAB_SIZE = 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4000, help="samples per measurement and windows in the corpus")
    parser.add_argument("--mean-document", type=int, default=600, help="tokens per document, on average (lognormal)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all contestants; the best of each is shown")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    if not torch.cuda.is_available():
        mcore_cpu.install()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        contestants = prepare(Path(folder), args)
        best = dict.fromkeys(contestants, 0.0)
        for _ in range(args.repeats):
            for name, read in contestants.items():
                start = time.process_time()
                read()
                best[name] = max(best[name], args.samples / (time.process_time() - start))
    baseline = best["GPTDataset, documents apart"]
    for name, rate in best.items():
        print(f"{name:42s} {rate:10,.0f} samples per CPU second   {rate / baseline:5.1f} x")
    if args.json is not None:
        record = {"arguments": {k: v for k, v in vars(args).items() if k != "json"}, "samples_per_cpu_second": best}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Name -> a function that reads `args.samples` samples once."""
    from megarpt.data.batches import TokenBatches
    from megarpt.data.windows import WindowDataset
    from megarpt.testing.tiny import write_corpus, write_sidecar

    s, b, samples = args.seq_length, args.micro_batch_size, args.samples // args.micro_batch_size * args.micro_batch_size
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(args.mean_document) - 0.5, 1.0, size=samples * s // args.mean_document + 1).astype(int) + 1
    documents = [np.append(rng.integers(1, VOCAB_SIZE, size=length - 1), EOD) for length in lengths]
    prefix = str(folder / "corpus")
    write_corpus(prefix, documents, vocab_size=VOCAB_SIZE)
    values = [np.append(np.nan, rng.random(len(document) - 1)) for document in documents]
    write_sidecar(f"{prefix}_nll", prefix, values, seq_length=s, separate_documents=True)

    def batches(separate: bool, stream: bool) -> Callable[[], None]:
        dataset = WindowDataset(prefix, seq_length=s, separate_documents=separate, vocab_size=VOCAB_SIZE)
        if stream:
            dataset.add_stream("ref_nll", f"{prefix}_nll")
        source = TokenBatches(
            [dataset], [1.0], seed=1, global_batch_size=b, micro_batch_size=b, dp_rank=0, dp_size=1, device=torch.device("cpu")
        )

        def read() -> None:
            for _ in range(samples // b):
                source.next_step()

        return read

    return {
        "megarpt, documents apart": batches(True, False),
        "megarpt, documents apart, one sidecar": batches(True, True),
        "megarpt, documents joined": batches(False, False),
        "GPTDataset, documents apart": gpt_dataset(prefix, folder, s, samples, b, reset=True),
        "GPTDataset, documents joined": gpt_dataset(prefix, folder, s, samples, b, reset=False),
        "plain memmap, tokens and labels only": memmap(prefix, s, samples),
    }


def gpt_dataset(prefix: str, folder: Path, s: int, samples: int, b: int, *, reset: bool) -> Callable[[], None]:
    """megatron-core's dataset with the collation every trainer adds; no [s, s] attention masks, which would be far slower."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import default_collate

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=s,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(folder / f"cache{reset}"),
        tokenizer=SimpleNamespace(eod=EOD, pad=-1, vocab_size=VOCAB_SIZE, unique_identifiers={"class": "bench"}),
        reset_position_ids=reset,
        reset_attention_mask=False,
        eod_mask_loss=reset,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix)
    dataset = GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), samples, Split.train, config)

    def read() -> None:
        for first in range(0, samples, b):
            default_collate([dataset[i] for i in range(first, first + b)])

    return read


def memmap(prefix: str, s: int, samples: int) -> Callable[[], None]:
    """What reading alone costs: two slices, widened."""
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    order = np.random.default_rng(0).permutation(samples - 1)

    def read() -> None:
        for window in order:
            torch.from_numpy(tokens[window * s : window * s + s].astype(np.int64))
            torch.from_numpy(tokens[window * s + 1 : window * s + s + 1].astype(np.int64))

    return read


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
