"""One micro-batch through the loss of the actor, or of the critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.trainer.aggregation import StepTotals, aggregate
from lightrft.trainer.correction import importance_weights
from lightrft.trainer.entropy import entropy_loss
from lightrft.trainer.kl import KLController, kl_estimate, policy_drift
from lightrft.trainer.masking import inside
from lightrft.trainer.policy_losses import PolicyInputs, policy_loss
from lightrft.trainer.scoring import Scoring, values_of
from lightrft.trainer.value_loss import value_loss

if TYPE_CHECKING:
    from torch import Tensor

    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.experience import Experience
    from lightrft.trainer.metrics import Means
    from lightrft.trainer.settings import TrainerConfig

__all__ = ["Learner", "Trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model, and what trains it.

    Attributes:
        model: as the strategy has prepared it.
        optimizer: its optimizer.
        scheduler: of the optimizer; ``None`` without one.
        name: by which its gradient norm is known.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Turns micro-batches into gradients and optimizer steps.

    Attributes:
        strategy: which has prepared the models.
        config: the settings.
        actor: the policy.
        critic: ``None`` where there is none.
        scoring: log-probs of samples.
        kl: the weight of the divergence.
    """

    strategy: StrategyBase
    config: TrainerConfig
    actor: Trained
    critic: Trained | None
    scoring: Scoring
    kl: KLController

    def learn(self, batch: Experience, totals: StepTotals, means: Means) -> None:
        """Add the gradients of ``batch``; with the last micro-batch of an optimizer step, step. *Collective*.

        A batch with nothing to learn from, or whose loss is NaN, goes the same way as any other.

        Args:
            batch: of this rank.
            totals: of the optimizer step.
            means: gets what is to be reported.
        """
        self._backward(self.actor, self._actor_loss(batch, totals, means), means)
        if self.critic is not None:
            self._backward(self.critic, self._critic_loss(self.critic, batch, totals, means), means)

    def _backward(self, trained: Trained, loss: Tensor, means: Means) -> None:
        rate = trained.optimizer.param_groups[0]["lr"]
        self.strategy.backward(loss, trained.model, trained.optimizer)
        norm = self.strategy.optimizer_step(trained.optimizer, trained.model, trained.scheduler, name=trained.name)
        means.expect([f"{trained.name}/grad_norm", f"{trained.name}/lr"])
        if norm is not None:
            means.add(f"{trained.name}/grad_norm", norm)
            means.add(f"{trained.name}/lr", rate)

    def _actor_loss(self, batch: Experience, totals: StepTotals, means: Means) -> Tensor:
        config, mask = self.config, batch.action_mask
        scores = self.scoring(self.actor.model, batch, entropy=config.entropy_coef > 0)
        found = policy_loss(
            config.policy_loss,
            PolicyInputs(
                log_probs=scores.log_probs,
                old_log_probs=batch.log_probs,
                advantages=batch.advantages,
                mask=mask,
                eps_low=config.eps_clip_low,
                eps_high=config.eps_clip_high,
            ),
        )
        parts = {"policy_loss": self._corrected(found.per_token, batch)}
        if config.use_kl_loss and batch.initial_log_probs is not None:
            divergence = kl_estimate(str(config.kl_estimator), scores.log_probs, batch.initial_log_probs, mask)
            parts["kl_loss"] = self.kl.value * divergence
        if config.policy_drift_coef:
            parts["drift_loss"] = config.policy_drift_coef * policy_drift(scores.log_probs, batch.log_probs, mask)
        if config.entropy_coef and scores.entropy is not None:
            parts["entropy_loss"] = config.entropy_coef * entropy_loss(scores.entropy, mask)
        means.add("clipped", found.clipped.sum(), mask.sum())
        means.add("policy_kl", policy_drift(scores.log_probs.detach(), batch.log_probs, mask).sum(), mask.sum())
        return self._sum(parts, mask, totals, means)

    def _corrected(self, losses: Tensor, batch: Experience) -> Tensor:
        """Losses of tokens, weighted by how they were drawn, and 0 where they were not chosen."""
        mask = batch.action_mask
        if self.config.importance_cap:
            cap = self.config.importance_cap
            losses = losses * importance_weights(batch.log_probs, batch.engine_log_probs, mask, cap)
        return losses if batch.chosen is None else inside(losses, batch.chosen)

    def _critic_loss(self, critic: Trained, batch: Experience, totals: StepTotals, means: Means) -> Tensor:
        assert batch.values is not None
        mask = batch.action_mask
        values = values_of(critic.model, batch)
        losses, clipped = value_loss(values, batch.values, batch.returns, mask, self.config.value_clip)
        means.add("values_clipped", clipped.sum(), mask.sum())
        means.add("values", inside(values.detach(), mask).sum(), mask.sum())
        return self._sum({"value_loss": losses}, mask, totals, means)

    def _sum(self, parts: dict[str, Tensor], mask: Tensor, totals: StepTotals, means: Means) -> Tensor:
        """What to give ``backward``; each part is reported. The sum of the shares of a step is its mean."""
        longest = self.strategy.config.generate_max_len
        shares = {
            name: aggregate(losses, mask, how=str(self.config.loss_aggregation), totals=totals, longest=longest)
            for name, losses in parts.items()
        }
        for name, share in shares.items():
            means.add(name, share)
        found: Tensor = sum(shares.values())  # type: ignore[assignment]
        return found
