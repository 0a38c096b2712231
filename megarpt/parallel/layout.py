"""How the world of ranks is divided, and the one call that tells megatron-core."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megarpt.config.schema import ParallelConfig
from megarpt.config.validate import layout_mistakes
from megarpt.errors import ConfigError

_SEED_STRIDE = 100  # between pipeline stages, as in Megatron-LM: two stages must not draw the same weights


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """The groups a training step speaks through, and this rank's place in them."""

    collection: ProcessGroupCollection  # megatron-core's own record, handed back to it
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup  # ranks that hold other samples: where tokens are counted and compete
    dp_cp: ProcessGroup  # ranks that hold the same parameters
    dp_rank: int
    dp_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is on the pipeline stage that computes the loss."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def is_first_of_copy(self) -> bool:
        """Whether this rank is the first of those that share a copy of the model."""
        return self.tp.rank() == self.cp.rank() == self.pp.rank() == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank's count of tokens enters the sum over `dp_cp`: one rank of each context-parallel group."""
        return self.cp.rank() == 0

    @property
    def speaks_for_the_loss(self) -> bool:
        """Whether this rank is the first of those that compute the loss."""
        return self.is_last_stage and self.dp_rank == self.tp.rank() == self.cp.rank() == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """world = tp * cp * pp * dp, and for the experts the same world = etp * ep * pp * edp."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int | None = None

    @classmethod
    def resolve(cls, cfg: ParallelConfig, world_size: int) -> ParallelLayout:
        """Fill in data parallelism.

        Raises:
            ConfigError: the world cannot be divided that way.
        """
        mistakes = layout_mistakes(cfg, world_size)
        if mistakes:
            raise ConfigError("\n  ".join(mistakes))
        tp, pp, cp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, cfg.context_parallel_size
        return cls(
            tp=tp,
            pp=pp,
            cp=cp,
            dp=world_size // (tp * pp * cp),
            ep=cfg.expert_model_parallel_size,
            etp=cfg.expert_tensor_parallel_size or tp,
            vpp=cfg.virtual_pipeline_model_parallel_size,
        )

    def without_interleaving(self) -> ParallelLayout:
        """The same division for a model that only runs forward, in one piece per stage."""
        return ParallelLayout(**{**asdict(self), "vpp": None})

    def initialize(self, seed: int) -> ProcessGroups:
        """Create megatron-core's groups and seed its parallel RNG. The only parallel_state initialization there is."""
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vpp,
                context_parallel_size=self.cp,
                expert_model_parallel_size=self.ep,
                expert_tensor_parallel_size=self.etp,
                create_gloo_process_groups=False,
            )
        collection = ProcessGroupCollection.use_mpu_process_groups()
        tensor_parallel.model_parallel_cuda_manual_seed(stage_seed(seed, collection.pp.rank()), force_reset_rng=True)
        return ProcessGroups(
            collection=collection,
            tp=collection.tp,
            pp=collection.pp,
            cp=collection.cp,
            dp=collection.dp,
            dp_cp=collection.dp_cp,
            dp_rank=collection.dp.rank(),
            dp_size=collection.dp.size(),
        )


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a pipeline stage's weights and dropout."""
    return seed + _SEED_STRIDE * stage
