"""megatron-core's optimizer and learning-rate schedule, counted in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarpt.config.schema import OptimizerConfig, StepConfig, TrainConfig
from megarpt.errors import ConfigError
from megarpt.model.build import unknown_fields
from megarpt.parallel.layout import ProcessGroups

_DECLARED = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")


def optimizer_mistakes(cfg: OptimizerConfig) -> list[str]:
    """What only the engine can know to be wrong in `optimizer`, before anything is built."""
    return unknown_fields("optimizer.mcore", cfg.mcore, McoreOptimizerConfig)


def build_optimizer(
    cfg: OptimizerConfig, train: StepConfig, chunks: Sequence[DistributedDataParallel], groups: ProcessGroups
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """AdamW over the model's parameters, and the schedule that sets its learning rate.

    Units: the schedule's steps are tokens fed through the model, global over all ranks.

    Raises:
        ConfigError: unknown names, or values megatron-core refuses.
    """
    mistakes = optimizer_mistakes(cfg)
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    bf16 = train.precision == "bf16"
    ddp = chunks[0].ddp_config
    fields: dict[str, Any] = {name: getattr(cfg, name) for name in _DECLARED}
    try:
        config = McoreOptimizerConfig(
            optimizer="adam",
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
            **fields,
            **cfg.mcore,
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"optimizer.mcore: megatron-core refuses these values: {error}") from error
    optimizer = get_megatron_optimizer(config, list(chunks), pg_collection=groups.collection, use_gloo_process_groups=False)
    decay_tokens = cfg.lr_decay_tokens or (train.train_tokens if isinstance(train, TrainConfig) else cfg.lr_warmup_tokens + 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        lr_warmup_steps=cfg.lr_warmup_tokens,
        lr_decay_steps=decay_tokens,
        lr_decay_style=cfg.lr_decay_style,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=decay_tokens,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=cfg.lr_wsd_decay_tokens if cfg.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=cfg.lr_wsd_decay_style if cfg.lr_decay_style == "WSD" else None,
    )
    return optimizer, scheduler
