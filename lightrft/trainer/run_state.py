"""Checkpoints of a run: the models, and how far it is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.errors import CheckpointError
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.checkpoints import CheckpointFolder
from lightrft.trainer.shaping import RunningMoments

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.kl import KLController
    from lightrft.trainer.learner import Trained
    from lightrft.trainer.settings import TrainerConfig

__all__ = ["RunCheckpoints", "RunState"]


@dataclass(slots=True, kw_only=True)
class RunState:
    """How far a run is.

    Attributes:
        kl: the weight of the divergence.
        moments: of all rewards.
        step: iterations that are done.
        consumed_prompts: that all ranks together have had.
        weight_version: how often the engine was given weights that training had made, over the whole run.
    """

    kl: KLController
    moments: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0
    consumed_prompts: int = 0
    weight_version: int = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "step": self.step,
            "consumed_prompts": self.consumed_prompts,
            "weight_version": self.weight_version,
            "kl": self.kl.state_dict(),
            "moments": self.moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint held."""
        self.step = state["step"]
        self.consumed_prompts = state["consumed_prompts"]
        self.weight_version = state["weight_version"]
        self.kl.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCheckpoints:
    """Saves and loads a run: one folder for each model, in ``config.ckpt_path``.

    That of the actor is written last, so that a checkpoint of it is one of the whole run. The others keep one more than
    it does: while they have their new one, and the actor not yet, the run can still go on from the one before.

    Attributes:
        strategy: which has prepared the models.
        config: of the trainer.
        actor: with its optimizer and scheduler.
        critic: the same, or ``None``.
        ema_model: or ``None``.
    """

    strategy: StrategyBase
    config: TrainerConfig
    actor: Trained
    critic: Trained | None
    ema_model: Any

    def save(self, state: RunState) -> None:
        """Save everything. *Collective*.

        Raises:
            CheckpointError: it could not be written; the checkpoints before it are as they were.
        """
        tag, more = f"step_{state.step:08d}", self.config.max_ckpt_num + 1
        if self.critic is not None:
            self._save(self.critic, "critic", tag, more)
        if self._saves_average:
            self.strategy.save_ckpt(self.ema_model, self._folder("ema"), tag=tag, max_num=more)
        self._save(self.actor, "actor", tag, self.config.max_ckpt_num, client_state=self._state(state))

    def _save(self, trained: Trained, name: str, tag: str, max_num: int, **more: Any) -> None:
        self.strategy.save_ckpt(
            trained.model,
            self._folder(name),
            tag=tag,
            max_num=max_num,
            max_mem=self.config.max_ckpt_mem,
            optimizer=trained.optimizer,
            scheduler=trained.scheduler,
            **more,
        )

    def load(self, state: RunState) -> bool:
        """Take up the latest checkpoint, if there is one; whether there was. *Collective*.

        Raises:
            CheckpointError: it is incomplete, or does not fit.
        """
        there = bool(CheckpointFolder(self._folder("actor"), rank=0, world_size=1).checkpoints())
        if not Ranks().gather(there)[0]:
            return False
        found = CheckpointFolder(self._folder("actor")).find()
        if self.critic is not None:
            self._load(self.critic, "critic", found.name)
        if self._saves_average:
            self.strategy.load_ckpt(self.ema_model, self._folder("ema"), tag=found.name)
        client_state = self._load(self.actor, "actor", found.name)
        if "run" not in client_state:
            raise CheckpointError(
                f"{found} is no checkpoint of a run of the trainer: its client state has "
                f"{', '.join(client_state) or 'nothing'}; choose another ckpt_path"
            )
        state.load_state_dict(client_state["run"])
        if "ema" in client_state:
            self.ema_model.load_state_dict(client_state["ema"])
        return True

    def _load(self, trained: Trained, name: str, tag: str) -> dict[str, Any]:
        _, client_state = self.strategy.load_ckpt(
            trained.model, self._folder(name), tag=tag, optimizer=trained.optimizer, scheduler=trained.scheduler
        )
        return client_state

    @property
    def _saves_average(self) -> bool:
        """Whether the averaged model is prepared; a plain copy, the same on all ranks, goes with the run's state."""
        return self.ema_model is not None and self.strategy.prepared.find(self.ema_model) is not None

    def _state(self, state: RunState) -> dict[str, Any]:
        own = {"run": state.state_dict()}
        if self.ema_model is not None and not self._saves_average:
            own["ema"] = {name: tensor.cpu() for name, tensor in self.ema_model.state_dict().items()}
        return own

    def _folder(self, name: str) -> str:
        return os.fspath(Path(str(self.config.ckpt_path)) / name)
