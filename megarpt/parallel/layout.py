"""How the world of ranks is divided, and the one call that tells megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megarpt.config.schema import ParallelConfig
from megarpt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """The groups a training step speaks through, and this rank's place in them."""

    collection: ProcessGroupCollection  # megatron-core's own record, handed back to it
    tp: ProcessGroup
    dp: ProcessGroup  # data parallel, context parallel included: where tokens are counted
    tp_rank: int
    dp_rank: int
    dp_size: int


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """world = tp * dp."""

    tp: int
    dp: int

    @classmethod
    def resolve(cls, cfg: ParallelConfig, world_size: int) -> ParallelLayout:
        """Fill in data parallelism.

        Raises:
            ConfigError: the world cannot be divided that way.
        """
        tp = cfg.tensor_model_parallel_size
        if world_size % tp:
            raise ConfigError(
                f"parallel.tensor_model_parallel_size: got {tp} in a world of {world_size} ranks; "
                f"world = tensor parallel {tp} x data parallel, so the number of ranks must be a multiple of {tp}"
            )
        return cls(tp=tp, dp=world_size // tp)

    def initialize(self, seed: int) -> ProcessGroups:
        """Create megatron-core's groups and seed its parallel RNG. The only parallel_state initialization there is."""
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=self.tp)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        dp = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return ProcessGroups(
            collection=ProcessGroupCollection.use_mpu_process_groups(),
            tp=parallel_state.get_tensor_model_parallel_group(),
            dp=dp,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            dp_rank=dp.rank(),
            dp_size=dp.size(),
        )
