"""The weights of a network in memory, into a Hugging Face folder and from one: how a run and a server exchange a policy.

Writing goes through a sharded copy beside the folder, so any layout can be written, one parameter in memory at a time. Reading
changes the network only once everything fits.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.config.hf_settings import Architecture, from_model_config, read_settings, write_settings
from megarpt.config.schema import ModelConfig
from megarpt.corpus.atomic import fsync_directory, require_free_bytes, write_errors
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import CheckpointError, DataError
from megarpt.model.convert_hf import Move, misfits, moves
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ProcessGroups
from megarpt.run import hf_folder
from megarpt.run.hf_folder import HuggingFaceWeights
from megarpt.train.checkpoint_files import describe_file
from megarpt.train.sharded import first_error, gathered_on_rank_0, on_rank_0, read_slice, read_tensor, stored_tensors
from megarpt.train.sharded_save import Distribution, Written, complete
from megarpt.train.weights import sharded_weights

_MAX_SHARD_BYTES = 5_000_000_000
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class PolicyExporter:
    """Writes the weights as they are at a call.

    Args:
        chunks: this rank's chunks of the network, in any of megatron-core's wrappings.
        groups: of the layout.
        model: its configuration.
        vocab_size: rows of the vocabulary, without those that pad it.
        tokenizer: of the model; its file is copied into the folder where it has one.
        dtype: of the weights.

    Raises:
        CheckpointError: no known family computes this model.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: ProcessGroups,
        model: ModelConfig,
        *,
        vocab_size: int,
        tokenizer: Tokenizer,
        dtype: torch.dtype,
    ) -> None:
        self._chunks, self._dtype, self._tokenizer = chunks, dtype, tokenizer
        self._architecture = from_model_config(model, vocab_size)
        self._distribution = Distribution(groups.dp_cp)

    def __call__(self, folder: Path) -> None:
        """Make the folder, which must not exist. Every rank calls this.

        Cost: the weights are written twice, and read once by rank 0; disk of both until the folder is whole.

        Collectives: four of objects over the world; the first call those of `Distribution.part` too.

        Raises:
            DataError: the file system refused, or a weight is no number.
        """
        temporary = folder.with_name(f".{folder.name}.tmp")
        sharded = temporary / "sharded"
        on_rank_0(lambda: _make_anew(temporary, sharded))
        entries = sharded_weights(self._chunks)
        keys = {_LAYER.sub(".layers.#.", name): entry.key for chunk in entries.values() for name, entry in chunk.items()}
        part = self._distribution.part(entries)
        part.freeze(None)
        written, problem = None, None
        try:
            with write_errors(folder):
                written = part.write(sharded, dist.get_rank())
        except DataError as error:
            problem = str(error)
        problem = first_error(problem)
        if problem is not None or written is None:
            raise DataError(problem)
        everyone = gathered_on_rank_0((written, keys))
        on_rank_0(lambda: self._finish(temporary, sharded, folder, everyone or []))

    def _finish(self, temporary: Path, sharded: Path, folder: Path, everyone: Sequence[tuple[Written, dict[str, str]]]) -> None:
        keys = {name: key for _, known in everyone for name, key in known.items()}
        with write_errors(folder):
            complete(sharded, [written for written, _ in everyone])
            try:
                self._write(sharded, temporary, keys)
            except CheckpointError as error:
                raise DataError(f"the policy cannot be published: {error}") from error  # which the other ranks hear of
            shutil.rmtree(sharded)
            for path in sorted(temporary.iterdir()):
                describe_file(path)  # makes sure that it is on the disk
            fsync_directory(temporary)
            temporary.rename(folder)
            fsync_directory(folder.parent)

    def _write(self, sharded: Path, folder: Path, keys: Mapping[str, str]) -> None:
        if self._architecture.gpt["share_embeddings_and_output_weights"]:
            keys = {name: key for name, key in keys.items() if name != "output_layer.weight"}  # a copy for the last stage
        stored = {key: shape for key, (_, shape) in stored_tensors(sharded).items()}
        planned = moves(self._architecture, _whole_parameters(keys, stored))
        shapes = {name: shape for move in planned for name, shape in move.theirs.items()}
        require_free_bytes(folder, sum(torch.Size(shape).numel() for shape in shapes.values()) * self._dtype.itemsize)
        hf_folder.write_weights(folder, shapes, self._dtype, self._parts(planned, sharded, keys), _MAX_SHARD_BYTES)
        name = str(self._dtype).removeprefix("torch.")
        settings = write_settings(self._architecture, dtype=name, eos=self._tokenizer.eod)
        hf_folder.write_json(folder / hf_folder.CONFIG, settings)
        if (file := Path(self._tokenizer.spec)).is_file():
            shutil.copyfile(file, folder / ("tokenizer.json" if file.suffix == ".json" else "tokenizer.model"))
            hf_folder.copy_companions(file.parent, folder)

    def _parts(self, planned: Sequence[Move], sharded: Path, keys: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
        for move in planned:
            layer = _LAYER.search(move.ours)
            key = keys[_LAYER.sub(".layers.#.", move.ours)]
            whole = read_slice(sharded, key, int(layer[1])) if layer else read_tensor(sharded, key)
            yield move.split(whole, self._architecture.heads)


def load_policy(folder: Path, network: TokenStatsGPT, model: ModelConfig) -> None:
    """Fill a network of one rank with the weights of a Hugging Face folder.

    Cost: reads the files twice, first to see that they are good; memory of one parameter.

    Raises:
        CheckpointError: the folder is damaged or of another model; the network is as before.
    """
    here = from_model_config(model, network.valid_vocab_size)
    there = read_settings(hf_folder.read_json(folder / hf_folder.CONFIG))
    problems = _differences(here, there)
    parameters = dict(network.named_parameters())
    planned = moves(here, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with HuggingFaceWeights(folder) as weights:
        problems += misfits(planned, weights.shapes, tied=bool(here.gpt["share_embeddings_and_output_weights"]))
        if problems:
            raise CheckpointError("\n  ".join([f"{folder} is of another model than the one that is served:", *problems]))
        for move in planned:
            for name in move.theirs:
                weights.read(name)
        with torch.no_grad():
            for move in planned:
                wanted = parameters[move.ours]
                wanted.copy_(move.join([weights.read(name) for name in move.theirs], here.heads, wanted.shape[0]))


def _make_anew(temporary: Path, sharded: Path) -> None:
    with write_errors(temporary):
        shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
        sharded.mkdir(parents=True)


def _whole_parameters(keys: Mapping[str, str], stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of the whole model on one rank; those of all layers are stored together.

    Args:
        keys: name, with # for the layer -> what it is stored as.
        stored: that -> shape; what is not there is no parameter.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, key in keys.items():
        shape = stored.get(key)
        if shape is not None and "#" in name:
            found.update({name.replace("#", str(layer)): shape[1:] for layer in range(shape[0])})
        elif shape is not None:
            found[name] = shape
    return found


def _differences(here: Architecture, there: Architecture) -> list[str]:
    """One message for each setting that differs and changes what the same weights compute."""
    ours, theirs = ({**each.transformer, **each.gpt} for each in (here, there))
    return [f"{name}: got {theirs[name]!r}, expected {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
