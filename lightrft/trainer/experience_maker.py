"""Experiences of samples: rewards, log-probs, values and advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightrft.strategy.utils.agreement import Ranks
from lightrft.trainer import shaping
from lightrft.trainer.advantages import AdvantageInputs, estimate
from lightrft.trainer.aggregation import data_parallel_sum
from lightrft.trainer.correction import mismatch
from lightrft.trainer.entropy import high_entropy
from lightrft.trainer.experience import Experience, Sample, padded
from lightrft.trainer.fillers import blank, image_filler
from lightrft.trainer.generation import Generation, seed_of
from lightrft.trainer.kl import KLController, kl_estimate
from lightrft.trainer.masking import masked_sum
from lightrft.trainer.scoring import Scoring, values_of

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.metrics import Means, Stopwatch
    from lightrft.trainer.prompt_stream import PromptStream
    from lightrft.trainer.rewards.source import RewardSource
    from lightrft.trainer.settings import TrainerConfig

__all__ = ["ExperienceMaker", "Rollout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Samples of one rank with their rewards.

    Attributes:
        samples: those of one prompt one after the other.
        rewards: of each, before they are shaped, shape (samples,).
    """

    samples: list[Sample] = field(default_factory=list)
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0))

    def chosen(self, mask: Tensor) -> Rollout:
        """The samples where ``mask`` (samples,) is true."""
        return Rollout(
            samples=[one for one, stays in zip(self.samples, mask.tolist(), strict=True) if stays],
            rewards=self.rewards[mask],
        )

    def joined(self, other: Rollout) -> Rollout:
        """The samples of both."""
        return Rollout(samples=[*self.samples, *other.samples], rewards=torch.cat([self.rewards, other.rewards]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperienceMaker:
    """Makes the experiences of an iteration.

    Attributes:
        strategy: which has prepared the models.
        config: the settings.
        actor: the policy.
        critic: expects rewards; ``None`` where nothing needs it.
        initial_model: what the policy is not to leave too far; ``None`` where nothing needs it.
        rewards: where they come from; all ranks ask together.
        generation: prompts to samples.
        scoring: log-probs of samples.
        kl: the weight of the divergence.
        moments: of all rewards.
        watch: measures the phases.
    """

    strategy: StrategyBase
    config: TrainerConfig
    actor: Any
    critic: Any
    initial_model: Any
    rewards: RewardSource
    generation: Generation
    scoring: Scoring
    kl: KLController
    moments: shaping.RunningMoments
    watch: Stopwatch

    # -- Prompts, generation, rewards ---------------------------------------------------------------------------------

    def collect(self, stream: PromptStream, step: int, means: Means) -> Rollout:
        """The samples of an iteration, with rewards. *Collective*.

        With dynamic sampling, prompts whose samples got the same reward are left out, and others are tried until each
        rank has its share, or ``dynamic_sampling_rounds`` are over; all ranks go through the same number of rounds.

        Args:
            stream: of prompts.
            step: number of the iteration.
            means: gets what is to be reported.
        """
        if not self.config.dynamic_sampling:
            return self.generated(stream.take(), step, 0, means)
        found = Rollout()
        for turn in range(self.config.dynamic_sampling_rounds):
            found = found.joined(self._informative(self.generated(stream.take(), step, turn, means), means))
            if self._is_enough(found):
                break
        return found.chosen(torch.arange(len(found.samples)) < self._share)

    def generated(self, prompts: Sequence[Any], step: int, turn: int, means: Means) -> Rollout:
        """Samples of this rank's prompts, with rewards. *Collective*."""
        with self.watch.phase("generate"):
            samples = self.generation(prompts, seed_of(self.strategy.config.seed, step, turn))
        with self.watch.phase("reward"):
            found = self.rewards(samples)
        missing = len(prompts) - len(samples) // self.generation.n
        means.add("prompts_too_long", missing, len(prompts))
        lengths = torch.tensor([float(len(one.output_token_ids)) for one in samples])
        means.add("response_length", lengths.sum(), len(samples))
        means.add("truncated", sum(one.truncated for one in samples), len(samples))
        means.add("reward", found.rewards.sum(), len(samples))
        means.expect(f"reward/{name}" for names in Ranks().gather(tuple(found.metrics)) for name in names)
        for name, each in found.metrics.items():
            means.add(f"reward/{name}", each.sum(), len(samples))
        return Rollout(samples=samples, rewards=found.rewards)

    @property
    def _share(self) -> int:
        """Samples of an iteration that a rank has room for."""
        return self.strategy.config.rollout_batch_size // self.strategy.groups.dp_size * self.generation.n

    def _informative(self, found: Rollout, means: Means) -> Rollout:
        stays = shaping.informative_groups(found.rewards, self.generation.n)
        means.add("informative_prompts", stays.sum(), len(stays))
        return found.chosen(stays)

    def _is_enough(self, found: Rollout) -> bool:
        """Whether all ranks have their share."""
        return bool(self.strategy.all_reduce(len(found.samples), op="min") >= self._share)

    # -- Log-probs, values, advantages --------------------------------------------------------------------------------

    def experiences(self, rollout: Rollout, means: Means) -> Experience:
        """What can be learned of ``rollout``. *Collective*: ranks with fewer samples pass as often through the models.

        Args:
            rollout: of this rank; any number of samples, none included.
            means: gets what is to be reported.
        """
        with self.watch.phase("score"):
            scored = self._scored(rollout.samples)
        shaped = self._shaped(rollout)
        means.add("reward/shaped", shaped.sum(), len(shaped))
        divergence = self._divergence(scored, means)
        in_reward = None if divergence is None or self.config.use_kl_loss else self.kl.value * divergence
        found = estimate(
            self.config.advantage_estimator,
            AdvantageInputs(
                rewards=shaped.to(scored.sequences.device),
                mask=scored.action_mask,
                penalties=in_reward,
                values=scored.values,
                group_size=self.generation.n,
                gamma=self.config.gamma,
                lambd=self.config.lambd,
                whitened=self.config.whiten_advantages,
                total=data_parallel_sum(self.strategy),
            ),
        )
        self._note_mismatch(scored, means)
        return dataclasses.replace(
            scored,
            rewards=shaped.to(scored.sequences.device),
            advantages=found.advantages,
            returns=found.returns,
            chosen=self._chosen(scored),
        )

    def _chosen(self, scored: Experience) -> Tensor | None:
        """The tokens of highest entropy, if these alone are trained on."""
        if not self.config.needs_entropy or scored.entropy is None:
            return None
        share = self.config.high_entropy_token_ratio
        return high_entropy(scored.entropy, scored.action_mask, share, data_parallel_sum(self.strategy))

    def _shaped(self, rollout: Rollout) -> Tensor:
        """Rewards as advantages are computed of them, shape (samples,)."""
        lengths = torch.tensor([len(one.output_token_ids) for one in rollout.samples], dtype=torch.int64)
        longest = self.strategy.config.generate_max_len
        rewards = rollout.rewards + shaping.overlong_penalty(
            lengths, longest, self.config.overlong_buffer_len, self.config.overlong_penalty
        )
        if self.config.normalize_reward:
            self.moments.update(rewards, data_parallel_sum(self.strategy))
            rewards = self.moments.normalised(rewards)
        return shaping.clip_rewards(rewards, self.config.reward_clip)

    def _scored(self, samples: Sequence[Sample]) -> Experience:
        """Log-probs and values of the samples, with nothing in place of advantages yet."""
        size = self.strategy.config.micro_rollout_batch_size
        batches = [self._batch(samples[first : first + size]) for first in range(0, len(samples), size)]
        rounds = self.strategy.all_reduce(len(batches), op="max")
        filler = self.filler(samples)
        for model in (self.actor, self.critic, self.initial_model):
            if model is not None:
                model.eval()
        nothing = Experience.placeholder(self._device)
        with torch.no_grad():
            passed = [
                self._passed(batch.with_filler(filler)).first(len(batch))
                for batch in [*batches, *[nothing] * (rounds - len(batches))]
            ]
        parts = passed[: len(batches)]
        return Experience.joined(parts) if parts else Experience.placeholder(self._device, rows=0)

    def filler(self, samples: Sequence[Sample]) -> Experience | None:
        """A sequence with an image for batches without any, if models see. *Collective*."""
        reader = self.generation.reader
        if reader is None:
            return None
        found = image_filler(samples, self.strategy) or blank(reader, self.generation.forbidden)
        if found is None:
            return None
        batch = self._batch([found])
        nothing = torch.zeros_like(batch.log_probs)
        return dataclasses.replace(
            batch,
            action_mask=nothing.bool(),
            chosen=nothing.bool(),
            initial_log_probs=nothing,
            entropy=nothing,
            values=nothing,
        )

    @property
    def _device(self) -> torch.device:
        return self.strategy.device

    def _batch(self, samples: Sequence[Sample]) -> Experience:
        """Samples as tensors."""
        length = max(2, *(len(one.tokens) for one in samples))
        generated = padded(
            [[0] * len(one.prompt_token_ids) + [1] * len(one.output_token_ids) for one in samples], length, torch.bool
        )
        log_probs = padded(
            [[0.0] * len(one.prompt_token_ids) + self._of_engine(one) for one in samples], length, torch.float32
        )
        nothing = torch.zeros(len(samples), length - 1)
        return Experience(
            sequences=padded([one.tokens for one in samples], length, torch.int64),
            attention_mask=padded([[1] * len(one.tokens) for one in samples], length, torch.int64),
            action_mask=generated[:, 1:],
            log_probs=nothing,
            engine_log_probs=log_probs[:, 1:],
            rewards=torch.zeros(len(samples)),
            advantages=nothing,
            returns=nothing,
            images=tuple(one.images for one in samples),
        ).to(self._device)

    def _of_engine(self, one: Sample) -> list[float]:
        """The engine's log-probs, NaN where they cannot be compared with the trainer's."""
        return list(one.engine_log_probs or [float("nan")] * len(one.output_token_ids))

    def _passed(self, batch: Experience) -> Experience:
        """``batch`` with what each model makes of it."""
        scores = self.scoring(self.actor, batch, entropy=self.config.needs_entropy)
        initial = None if self.initial_model is None else self.scoring(self.initial_model, batch).log_probs
        values = None if self.critic is None else values_of(self.critic, batch)
        return dataclasses.replace(
            batch, log_probs=scores.log_probs, entropy=scores.entropy, initial_log_probs=initial, values=values
        )

    def _divergence(self, scored: Experience, means: Means) -> Tensor | None:
        """Of the policy from the initial model at each token; ``None`` without one."""
        if self.initial_model is None or scored.initial_log_probs is None:
            return None
        estimator = str(self.config.kl_estimator)
        found = kl_estimate(estimator, scored.log_probs, scored.initial_log_probs, scored.action_mask)
        means.add("kl", found.sum(), scored.action_mask.sum())
        means.add("kl/sequence", found.sum(), len(found))
        return found

    def _note_mismatch(self, scored: Experience, means: Means) -> None:
        comparable = scored.action_mask & scored.engine_log_probs.isfinite()
        means.add_all(mismatch(scored.log_probs, scored.engine_log_probs, comparable))
        if self.config.needs_entropy and scored.entropy is not None:
            means.add("entropy", masked_sum(scored.entropy, scored.action_mask), scored.action_mask.sum())
