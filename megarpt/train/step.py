"""What one optimizer step is: micro-batches in, gradients, one division, clip, update, report.

Dims: b micro-batch, s sequence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import Tensor

from megarpt.model.experts import take_balance_losses
from megarpt.model.forward import WeightGuess, head_output, run_schedule, token_stats
from megarpt.model.token_stats_gpt import HeadMode
from megarpt.objectives.base import Metric, Objective, ObjectiveOutput
from megarpt.objectives.weighting import TokenWeights
from megarpt.parallel.collectives import from_last_stage
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress, StepReport, TokenBatch, TokenStats
from megarpt.train.timers import StepTimers

logger = logging.getLogger(__name__)

Annotate = Callable[[Sequence[TokenBatch]], Sequence[TokenBatch]]
Guard = Callable[[float, float], bool]  # (loss, gradient norm), finite -> whether the update is held back, on every rank
Output = tuple[TokenBatch, ObjectiveOutput]


class TrainStep:
    """One optimizer step over the micro-batches of this rank.

    The objective runs on the last pipeline stage; the others learn the numbers of the report from it.

    Collectives: megatron-core's pipeline exchange and gradient reduction; one all-reduce of packed metric sums over the
    data-parallel group and, with a pipeline, one broadcast of them; the selection's own when ranks choose together.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        objective: Objective,
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        groups: ProcessGroups,
        *,
        annotate: Annotate | None = None,
        guard: Guard | None = None,
        timers: StepTimers | None = None,
    ) -> None:
        self.chunks, self.objective, self.optimizer, self.scheduler = list(chunks), objective, optimizer, scheduler
        self.groups, self.annotate, self.guard, self.timers = groups, annotate, guard, timers or StepTimers()
        self.outputs: list[Output] = []  # of the last step, for dumps, histograms and samples; empty before the last stage
        self._has_run = False
        config = get_model_config(chunks[0])
        config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)
        config.grad_scale_func = None

    def __call__(self, batches: Sequence[TokenBatch], progress: Progress) -> StepReport:
        """Run the step; on a non-finite loss or gradient the parameters stay as they are, on every rank."""
        if self.annotate is not None:
            with self.timers.phase("reference"):
                batches = self.annotate(batches)
        for chunk in self.chunks:
            chunk.train()
        if not self._has_run and self.objective.awaits_a_step:
            logger.info(
                "objective.scope lagged_global_batch: there is no threshold of a step before; in step %d the best tokens of "
                "every micro-batch are kept",
                progress.step + 1,
            )
        self._has_run = True
        chosen = self._choose_beforehand(batches, progress)
        self.outputs = []
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        run_schedule(
            self.chunks,
            list(zip(batches, chosen, strict=True)),
            partial(self._forward_step, progress=progress),
            self.groups,
            forward_only=False,
        )
        device, config = batches[0].tokens.device, get_model_config(self.chunks[0])
        balance = take_balance_losses(config, self.groups, len(batches), device)
        tokens_seen = sum(batch.tokens.numel() for batch in batches) * self.groups.dp_size
        return self._update(tokens_seen, self._settle(), balance)

    @torch.no_grad()
    def parameters_are_finite(self) -> bool:
        """Whether every parameter of every rank is finite. Collectives: one all-reduce over the world."""
        everything = (parameter for chunk in self.chunks for parameter in chunk.parameters())
        finite = torch.stack([parameter.isfinite().all() for parameter in everything]).all().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite.item())

    def gather_parameters(self) -> None:
        """Wait for parameters that are still being gathered behind the step, so that they can be read."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def selection_state(self) -> dict[str, Any]:
        """What the objective carries to the next step, on all stages. Collectives: with a pipeline one broadcast of objects."""
        return from_last_stage(self.objective.state_dict(), self.groups)

    def first_output(self) -> Output | None:
        """The first micro-batch of the last step and what the objective said of it, on all stages of the pipeline.

        Collectives: with a pipeline one broadcast of objects; cheap only when it is rare.
        """
        return from_last_stage(self.outputs[0] if self.outputs else None, self.groups)

    def _choose_beforehand(self, batches: Sequence[TokenBatch], progress: Progress) -> Sequence[TokenWeights | None]:
        """Weights of all micro-batches, on the last stage; None where they come out of the training forward itself.

        Cost: one more forward pass where the scores of several micro-batches are compared with each other.
        """
        objective, undecided = self.objective, [None] * len(batches)
        if objective.needs_stats and not (objective.spans_micro_batches and len(batches) > 1):
            return undecided
        stats = None
        if objective.needs_stats:
            stats = token_stats(self.chunks, batches, self.groups, entropy=objective.needs_entropy)
        if not self.groups.is_last_stage:
            return undecided
        with self.timers.phase("select"):
            return objective.select(stats, batches, progress, self.groups.dp)

    def _settle(self) -> dict[str, Metric]:
        """What a selection learns from the step, once the pipeline is empty: on the last stage, where the scores are."""
        if not self.objective.learns_from_steps or not self.outputs:
            return {}
        with self.timers.phase("select"):
            return self.objective.settle(self.outputs, self.groups.dp)

    def _forward_step(
        self, work: Iterator[tuple[TokenBatch, TokenWeights | None]], model: torch.nn.Module, *, progress: Progress
    ) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
        """megatron-core's contract: (output, loss function of it)."""
        batch, given = next(work)
        mode = HeadMode.LOGPROB_ENTROPY if self.objective.needs_entropy else HeadMode.LOGPROB
        weight = self._guess_of_weights(batch, progress) if given is None else given.weight
        head = head_output(model, batch, mode, weight)
        if isinstance(head, Tensor):
            return head, None  # hidden states, for the next stage
        stats = TokenStats(*head)

        def loss_function(_output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            chosen = given
            if chosen is None and self.objective.spans_micro_batches:
                entropy = None if stats.entropy is None else stats.entropy.detach()
                detached = TokenStats(stats.logprob.detach(), entropy)
                with self.timers.phase("select"):
                    (chosen,) = self.objective.select([detached], [batch], progress, self.groups.dp)
            out = self.objective(stats, batch, chosen, progress)
            self.outputs.append((batch, out._replace(loss_sum=out.loss_sum.detach())))
            # Every context-parallel rank computes the whole loss; its tokens must enter the division once.
            counted = out.num_tokens if self.groups.counts_tokens else torch.zeros_like(out.num_tokens)
            return out.loss_sum, counted, {}

        return stats.logprob, loss_function

    def _guess_of_weights(self, batch: TokenBatch, progress: Progress) -> WeightGuess | None:
        """How the weights of a micro-batch are guessed while the head has shown some of it, where the objective can."""
        if not self.objective.guesses:
            return None
        shown: list[TokenStats] = []
        positions = torch.arange(batch.tokens.numel(), device=batch.tokens.device).view_as(batch.tokens)

        def weight(tokens: slice, stats: TokenStats) -> Tensor:
            shown.append(stats)
            rest = (0, batch.tokens.numel() - tokens.stop)
            logprob = F.pad(torch.cat([each.logprob for each in shown]), rest).view_as(batch.tokens)
            entropies = [each.entropy for each in shown if each.entropy is not None]
            entropy = F.pad(torch.cat(entropies), rest).view_as(batch.tokens) if entropies else None
            known = replace(batch, loss_mask=batch.loss_mask & (positions < tokens.stop))
            return self.objective.guess(TokenStats(logprob, entropy), known, progress).flatten()[tokens]

        return weight

    def _update(self, tokens_seen: int, settled: Mapping[str, Metric], metrics: Mapping[str, float]) -> StepReport:
        """Clip and step, unless anything is not finite or the guard holds it back.

        The learning rate is that of the tokens this step has seen.
        """
        sums = self._reduce_metrics(settled)
        found_inf = self.optimizer.prepare_grads()
        with self.timers.phase("grad_norm"):
            grad_norm = float(self.optimizer.get_grad_norm())
        loss_sum, num_tokens = sums.pop("loss_sum")[0], sums.pop("num_tokens")[0]
        loss_nats = loss_sum / num_tokens if num_tokens else 0.0
        skipped = found_inf or not math.isfinite(grad_norm) or not math.isfinite(loss_sum)
        skipped = skipped or (self.guard is not None and self.guard(loss_nats, grad_norm))
        self.scheduler.step(increment=tokens_seen)
        if not skipped:
            with self.timers.phase("optimizer"):
                self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        return StepReport(
            loss_nats=loss_nats,
            grad_norm=grad_norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            num_tokens=int(num_tokens),
            skipped=skipped,
            metrics={**{name: num / den for name, (num, den) in sums.items() if den}, **metrics},
        )

    def _clip(self, grad_norm: float) -> None:
        for optimizer in self.optimizer.chained_optimizers:
            if optimizer.config.clip_grad > 0.0 and not optimizer.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), optimizer.config.clip_grad, grad_norm)

    def _reduce_metrics(self, settled: Mapping[str, Metric]) -> dict[str, tuple[float, float]]:
        """name -> (numerator, denominator), summed over micro-batches and data-parallel ranks. One all-reduce, one sync."""
        return from_last_stage(_summed(self.outputs, settled, self.groups) if self.outputs else {}, self.groups)


def _summed(outputs: Sequence[Output], settled: Mapping[str, Metric], groups: ProcessGroups) -> dict[str, tuple[float, float]]:
    one = torch.ones((), device=outputs[0][1].loss_sum.device)
    pairs: dict[str, list[Metric]] = {name: [pair] for name, pair in settled.items()}
    for _, out in outputs:
        own = {"loss_sum": (out.loss_sum, one), "num_tokens": (out.num_tokens, one)}
        for name, pair in (own | dict(out.metrics)).items():
            pairs.setdefault(name, []).append(pair)
    names = sorted(pairs)
    packed = torch.stack(
        [torch.stack([x.double() for x in column]).sum() for n in names for column in zip(*pairs[n], strict=True)]
    )
    if groups.dp_size > 1:
        dist.all_reduce(packed, group=groups.dp)
    values = packed.tolist()
    return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names)}
