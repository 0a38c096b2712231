"""What one optimizer step is: micro-batches in, gradients, one division, clip, update, report.

Dims: b micro-batch, s sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarpt.model.build import token_stats
from megarpt.objectives.base import ObjectiveOutput
from megarpt.objectives.language_model import WeightedLanguageModel
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress, StepReport, TokenBatch, TokenStats

Annotate = Callable[[TokenBatch], TokenBatch]
Guard = Callable[[float, float], bool]  # (loss, gradient norm), finite -> whether the update is held back, on every rank


class TrainStep:
    """One optimizer step over the micro-batches of this rank.

    Collectives: megatron-core's gradient reduction; one all-reduce of packed metric sums over the data-parallel group; the
    selection's own when it is global.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        objective: WeightedLanguageModel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        groups: ProcessGroups,
        *,
        seq_length: int,
        annotate: Annotate | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.model, self.objective, self.optimizer, self.scheduler = model, objective, optimizer, scheduler
        self.groups, self.seq_length, self.annotate, self.guard = groups, seq_length, annotate, guard
        self.outputs: list[tuple[TokenBatch, ObjectiveOutput]] = []  # of the last step, for dumps, histograms and samples
        model.config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)
        model.config.grad_scale_func = None

    def __call__(self, batches: Sequence[TokenBatch], progress: Progress) -> StepReport:
        """Run the step; on a non-finite loss or gradient the parameters stay as they are, on every rank."""
        if self.annotate is not None:
            batches = [self.annotate(batch) for batch in batches]
        self.model.train()
        # With one micro-batch the scores come out of the training forward itself; with more, a scoring pass goes first.
        weights: Sequence[Tensor | None] = [None] * len(batches)
        if self.objective.selects_globally and len(batches) > 1:
            weights = self._scoring_pass(batches, progress)
        self.outputs = []
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, progress=progress),
            data_iterator=iter(zip(batches, weights, strict=True)),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=self.seq_length,
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=False,
            pg_collection=self.groups.collection,
        )
        tokens_seen = sum(batch.tokens.numel() for batch in batches) * self.groups.dp_size
        return self._update(tokens_seen)

    @torch.no_grad()
    def parameters_are_finite(self) -> bool:
        """Whether every parameter of every rank is finite. Collectives: one all-reduce over the world."""
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite.item())

    @torch.no_grad()
    def _scoring_pass(self, batches: Sequence[TokenBatch], progress: Progress) -> Sequence[Tensor]:
        """Weights of all micro-batches, chosen together. Cost: one more forward pass."""
        needs_entropy = self.objective.needs_entropy
        stats = [token_stats(self.model, batch, self.seq_length, entropy=needs_entropy) for batch in batches]
        return self.objective.select(stats, batches, progress, self.groups.dp)

    def _forward_step(
        self, work: Iterator[tuple[TokenBatch, Tensor | None]], model: DistributedDataParallel, *, progress: Progress
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """megatron-core's contract: (output, loss function of it)."""
        batch, weight = next(work)
        stats = token_stats(model, batch, self.seq_length, entropy=self.objective.needs_entropy)

        def loss_function(_output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            chosen = weight
            if chosen is None and self.objective.selects_globally:
                entropy = None if stats.entropy is None else stats.entropy.detach()
                detached = TokenStats(stats.logprob.detach(), entropy)
                (chosen,) = self.objective.select([detached], [batch], progress, self.groups.dp)
            out = self.objective(stats, batch, chosen, progress)
            self.outputs.append((batch, out._replace(loss_sum=out.loss_sum.detach())))
            return out.loss_sum, out.num_tokens, {}

        return stats.logprob, loss_function

    def _update(self, tokens_seen: int) -> StepReport:
        """Clip and step, unless anything is not finite or the guard holds it back.

        The learning rate is that of the tokens this step has seen.
        """
        sums = self._reduce_metrics()
        found_inf = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        loss_sum, num_tokens = sums.pop("loss_sum")[0], sums.pop("num_tokens")[0]
        loss_nats = loss_sum / num_tokens if num_tokens else 0.0
        skipped = found_inf or not math.isfinite(grad_norm) or not math.isfinite(loss_sum)
        skipped = skipped or (self.guard is not None and self.guard(loss_nats, grad_norm))
        self.scheduler.step(increment=tokens_seen)
        if not skipped:
            clip = self.optimizer.config.clip_grad
            if clip > 0.0:
                clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), clip, grad_norm)
            self.optimizer.step_with_ready_grads()
        return StepReport(
            loss_nats=loss_nats,
            grad_norm=grad_norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            num_tokens=int(num_tokens),
            skipped=skipped,
            metrics={name: num / den for name, (num, den) in sums.items() if den},
        )

    def _reduce_metrics(self) -> dict[str, tuple[float, float]]:
        """name -> (numerator, denominator), summed over micro-batches and data-parallel ranks. One all-reduce, one sync."""
        one = torch.ones((), device=self.outputs[0][1].loss_sum.device)
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for _, out in self.outputs:
            own = {"loss_sum": (out.loss_sum, one), "num_tokens": (out.num_tokens, one)}
            for name, pair in (own | dict(out.metrics)).items():
                pairs.setdefault(name, []).append(pair)
        names = sorted(pairs)
        packed = torch.stack(
            [torch.stack([x.double() for x in column]).sum() for n in names for column in zip(*pairs[n], strict=True)]
        )
        if self.groups.dp_size > 1:
            dist.all_reduce(packed, group=self.groups.dp)
        values = packed.tolist()
        return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names)}
