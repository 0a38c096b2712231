"""Reinforcement learning of a policy: prompts -> rollouts -> rewards -> advantages -> packed batches -> steps -> new weights.

`PolicyLoop.train_step` is the algorithm. Every rank runs the same program. The ranks that share a copy of the model work on the
same prompts, each data-parallel rank on its own. Everything random follows from the seed, the number of the iteration and the
prompt, so that an iteration that is done again, after a crash or under another layout, draws the same completions.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.distributed as dist

from megarpt.config.schema import DynamicSamplingConfig, RLConfig
from megarpt.errors import NumericsError
from megarpt.objectives.policy_gradient import kl_estimate
from megarpt.parallel.collectives import from_all_samples, from_first_of_copy, from_last_stage
from megarpt.parallel.layout import ProcessGroups
from megarpt.rl.advantages import ADVANTAGES, Advantages, as_rewards, is_dead, overlong_penalty, without_truncated
from megarpt.rl.batching import PackedRollouts
from megarpt.rl.monitor import RlMonitor, combined
from megarpt.rl.policy import ReferencePolicy, logprobs
from megarpt.rl.prompts import PromptStream
from megarpt.rl.rollout import RolloutEngine, Sampling
from megarpt.rl.rollout_log import RolloutLog
from megarpt.rl.statistics import merge, rollout_statistics, summary
from megarpt.rl.structs import Reward, RolloutGroup, StopReason
from megarpt.rl.verifiers import Verifier
from megarpt.structs import StepReport
from megarpt.train.reports import EvaluationScalars
from megarpt.train.run_loop import RunLoop, Surroundings
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A group and what its completions were found to be worth."""

    number: int  # among the groups of all ranks in this iteration, in the order of the prompts
    group: RolloutGroup
    rewards: Sequence[Reward]

    @property
    def is_dead(self) -> bool:
        """Whether it teaches nothing."""
        return bool(is_dead(as_rewards([reward.value for reward in self.rewards])))


class PolicyLoop(RunLoop):
    """Iterations of rollouts and updates until the configured number is done."""

    def __init__(
        self,
        cfg: RLConfig,
        step: TrainStep,
        state: TrainState,
        around: Surroundings,
        prompts: PromptStream,
        engine: RolloutEngine,
        verifier: Verifier,
        *,
        stop_tokens: Sequence[int],
        reference: ReferencePolicy | None,
        restart_optimizer: Callable[[], None],
        evaluate: Callable[[int], Mapping[str, EvaluationScalars]],
        monitor: RlMonitor,
        rollouts: RolloutLog,
        groups: ProcessGroups,
        device: torch.device,
    ) -> None:
        super().__init__(
            step,
            state,
            around,
            total_steps=cfg.train.train_steps,
            max_skipped_steps=cfg.train.max_skipped_steps,
            evaluation=cfg.evaluation,
            checkpoint=cfg.checkpoint,
        )
        self.cfg, self.prompts, self.engine, self.verifier = cfg, prompts, engine, verifier
        self.reference, self.restart_optimizer = reference, restart_optimizer
        self._evaluate, self.monitor, self.rollouts = evaluate, monitor, rollouts
        self.groups, self.device = groups, device
        rollout = cfg.rollout
        self.sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            stop_tokens=tuple(stop_tokens),
        )
        self.place = prompts.state_dict()  # where the next iteration begins
        self.seconds: dict[str, float] = {}  # of the iteration under way

    def train_step(self) -> bool:
        """One iteration: what is drawn, judged, weighed, trained on and published."""
        started, self.seconds = time.perf_counter(), {}
        number = self.state.progress.step
        drawn = self.draw(number)
        chosen = self.choose(drawn)
        packs = [self.pack(share) for share in self.shares(chosen)]
        with self.timed("score"):
            for pack in packs:
                self.score(pack.packed)
        advantages = [self.weigh(pack) for pack in packs]
        with self.timed("train"), self.perf.step():
            reports = [self.update(pack.packed) for pack in packs]
        self.publish(number + 1)
        self.seconds["rest"] = time.perf_counter() - started - sum(self.seconds.values())
        self.record(reports, drawn, packs, advantages)
        return True

    def draw(self, iteration: int) -> list[Judged]:
        """This rank's groups, judged; with dynamic sampling also those that teach nothing, and what was drawn in their place.

        Raises:
            NumericsError: too few groups teach anything, and the configuration says to stop then.
        """
        wanted = missing = self.cfg.rollout.prompts_per_step
        rule = self.replacing(iteration)
        if rule is None:
            return self.draw_once(iteration, 0, 0, wanted)
        drawn: list[Judged] = []
        for attempt in range(rule.max_rounds):
            first = sum(from_all_samples(len(drawn), self.groups))
            drawn += self.draw_once(iteration, attempt, first, missing)
            missing = wanted - len(self.living(drawn))
            if missing == 0:
                return drawn
        if rule.at_cap == "stop":
            raise NumericsError(
                f"step {iteration + 1}: after {rule.max_rounds} rounds of prompts {wanted - missing} groups have rewards that "
                f"differ, expected rollout.prompts_per_step = {wanted}; use prompts that are neither too easy nor too hard, "
                "raise objective.dynamic_sampling.max_rounds, or set at_cap to train"
            )
        return drawn

    def draw_once(self, iteration: int, attempt: int, first: int, count: int) -> list[Judged]:
        """Groups for this rank's share of the next `count` prompts, judged once for all ranks of a copy of the model."""
        step = f"step {iteration + 1}"
        prompts = self.prompts.next(count)[self.groups.dp_rank :: self.groups.dp_size]
        numbers = range(first + self.groups.dp_rank, first + count, self.groups.dp_size)
        sampling = replace(self.sampling, seed=seed_of(self.cfg.run.seed, iteration, attempt))
        self.watchdog.beat(f"generating for {step}")
        with self.timed("generate"):
            groups = self.engine.generate(prompts, group_size=self.cfg.rollout.group_size, sampling=sampling)
        self.stop.check(f"in {step}")
        self.watchdog.beat(f"verifying for {step}")
        with self.timed("verify"):
            rewards = from_first_of_copy(self.verifier(groups) if self.groups.is_first_of_copy else [], self.groups)
        self.watchdog.beat(f"training in {step}")
        return [Judged(*each) for each in zip(numbers, groups, rewards, strict=True)]

    def living(self, drawn: Sequence[Judged]) -> list[int]:
        """Numbers of the groups of all ranks that teach something, the first `prompts_per_step` of them."""
        own = [judged.number for judged in drawn if not judged.is_dead]
        return sorted(chain.from_iterable(from_all_samples(own, self.groups)))[: self.cfg.rollout.prompts_per_step]

    def choose(self, drawn: Sequence[Judged]) -> list[Judged]:
        """What is trained on: all that was drawn at first, or the groups that teach something where others were drawn too."""
        if self.replacing(self.state.progress.step) is None:
            return list(drawn)
        numbers = set(self.living(drawn) or range(self.cfg.rollout.prompts_per_step))
        return [judged for judged in drawn if judged.number in numbers]

    def replacing(self, iteration: int) -> DynamicSamplingConfig | None:
        """How groups that teach nothing are replaced in this iteration; None where they are not."""
        rule = self.cfg.objective.dynamic_sampling
        return None if rule is None or iteration < rule.start_step else rule

    def shares(self, chosen: Sequence[Judged]) -> list[list[Judged]]:
        """The groups of each update: the chosen ones of all ranks, in order, divided evenly."""
        updates = self.cfg.objective.updates_per_rollout
        own = [judged.number for judged in chosen]
        order = sorted(chain.from_iterable(from_all_samples(own, self.groups)))
        place = {number: index * updates // len(order) for index, number in enumerate(order)}
        return [[judged for judged in chosen if place[judged.number] == update] for update in range(updates)]

    def pack(self, share: Sequence[Judged]) -> Pack:
        """Groups as rows of tokens."""
        completions = [(judged.group.prompt, each) for judged in share for each in judged.group.completions]
        packed = PackedRollouts(
            [(prompt.tokens, completion.tokens) for prompt, completion in completions],
            seq_length=self.cfg.data.seq_length,
            micro_batch_size=self.cfg.batch.micro_batch_size,
            device=self.device,
            group=self.groups.dp,
        )
        packed.per_token("rollout_logprob", [completion.logprobs for _, completion in completions])
        return Pack(share, packed)

    def score(self, packed: PackedRollouts) -> None:
        """Lay what the old policy and the reference make of the tokens beside them, where it is needed."""
        objective = self.cfg.objective
        needs_old = objective.updates_per_rollout > 1 or (self.reference is not None and objective.kl_in == "reward")
        if needs_old and (old := logprobs(self.step.chunks, packed.batches, self.groups)):
            packed.per_label("old_logprob", old)
        if self.reference is not None and (reference := self.reference.logprobs(packed.batches)):
            packed.per_label("ref_logprob", reference)

    def weigh(self, pack: Pack) -> list[Advantages]:
        """Advantages of every group, which also become a stream; what is not known or not wanted leaves the loss."""
        objective, limit = self.cfg.objective, self.cfg.rollout.max_new_tokens
        penalties = iter(self.kl_of_rollouts(pack.packed))
        found = []
        for judged in pack.share:
            completions = judged.group.completions
            reward = as_rewards([each.value for each in judged.rewards])
            length = torch.tensor([len(each.tokens) for each in completions])
            shaped = reward - torch.tensor([next(penalties) for _ in completions], dtype=torch.float64)
            if objective.overlong == "penalty":
                shaped = shaped + overlong_penalty(length, limit, objective.overlong_buffer_tokens)
            worth = ADVANTAGES[objective.advantage](shaped, length)
            if objective.overlong == "mask":
                truncated = torch.tensor([each.stop is StopReason.LENGTH for each in completions])
                worth = without_truncated(worth, truncated)
            found.append(worth)
        pack.packed.per_rollout("advantage", [value for worth in found for value in worth.value.tolist()])
        pack.packed.train_only([does for worth in found for does in worth.trains.tolist()])
        return found

    def kl_of_rollouts(self, packed: PackedRollouts) -> list[float]:
        """What the KL divergence from the reference takes from the reward of every rollout."""
        objective = self.cfg.objective
        if self.reference is None or objective.kl_in != "reward":
            return [0.0] * len(packed.places)
        found: list[float] = []
        if self.groups.is_last_stage:
            pairs = zip(packed.tokens_of("old_logprob"), packed.tokens_of("ref_logprob"), strict=True)
            for own, theirs in pairs:
                estimate = kl_estimate(torch.from_numpy(own), torch.from_numpy(theirs), objective.kl_estimator)
                found.append(objective.kl_coef * float(estimate.sum(dtype=torch.float64)))
        return from_last_stage(found, self.groups)

    def update(self, packed: PackedRollouts) -> StepReport:
        """One optimizer step, and how far the engine's log-probabilities are from the trainer's."""
        report = self.step(packed.batches, self.state.progress)
        gap = self.largest_gap() if self.cfg.objective.updates_per_rollout == 1 else {}
        return replace(report, metrics={**report.metrics, **gap})

    def largest_gap(self) -> dict[str, float]:
        """Between the engine and the trainer, at one token of the step that was just run."""
        largest = torch.zeros((), device=self.device)
        for batch, out in self.step.outputs:
            gap = (out.token_loss + batch.streams["rollout_logprob"]).abs()
            largest = torch.maximum(largest, torch.where(batch.loss_mask, gap, 0.0).max())
        if self.groups.dp_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.dp)
        return {"policy/sampler_gap_max_nats": from_last_stage(float(largest), self.groups)}

    def publish(self, version: int) -> None:
        """Hand the new weights to the engine, and to the reference when that is due."""
        self.step.gather_parameters()
        every = self.cfg.objective.reference_reset_steps
        if self.reference is not None and every and version % every == 0:
            self.reference.reset(self.step.chunks[0])
            self.restart_optimizer()
            logger.info("step %d: the reference is the policy of now, and the optimizer starts afresh", version)
        self.engine.publish(version)

    def record(
        self,
        reports: Sequence[StepReport],
        drawn: Sequence[Judged],
        packs: Sequence[Pack],
        advantages: Sequence[Sequence[Advantages]],
    ) -> None:
        """The state after the iteration, and what is shown of it."""
        trained = dict(zip([each.number for pack in packs for each in pack.share], chain(*advantages), strict=True))
        groups, rewards = [each.group for each in drawn], [each.rewards for each in drawn]
        worth = [trained.get(each.number) or nothing(len(each.rewards)) for each in drawn]
        shown = rollout_statistics(groups, rewards, worth, max_new_tokens=self.cfg.rollout.max_new_tokens)
        everything = merge(from_all_samples(shown, self.groups))
        tokens = sum(pack.packed.num_tokens for pack in packs) * self.groups.dp_size
        before = self.state.progress.step
        self.state = self.state.after_step(
            combined(reports), samples=int(everything.counts["rl/completions"]), tokens_seen=tokens
        )
        self.place = self.prompts.state_dict()
        self.run.record(self.state.progress, counts=self.state.counts())
        self.monitor.step(reports, self.state.progress, summary(everything), self.seconds, tokens=tokens)
        if self.rollouts.is_due(before, self.state.progress.step):
            self.rollouts.write(self.state.progress.step, groups, rewards, worth)
        self.give_up_on_skipped_steps()

    def evaluate(self) -> None:
        """Rewards of held-out prompts."""
        step = self.state.progress.step
        self.watchdog.beat(f"evaluation after step {step}")
        with self.perf.phase("evaluation"):
            results = self._evaluate(step)
        self.log.evaluation(results, self.state.progress)
        self.evaluated_at = step

    def state_to_save(self) -> TrainState:
        """The state with the place in the prompts, before those of an iteration that was not finished."""
        return replace(self.state, data=self.place)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside as spent on `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Pack:
    """The groups of one update of this rank, and their tokens in rows."""

    share: Sequence[Judged]
    packed: PackedRollouts


def nothing(size: int) -> Advantages:
    """Of a group that is not trained on."""
    return Advantages(torch.zeros(size), torch.zeros(size, dtype=torch.bool))


def seed_of(seed: int, iteration: int, attempt: int) -> int:
    """Of the draws of one round of prompts; the same on every rank."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:7])
