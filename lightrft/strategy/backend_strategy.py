"""What DeepSpeed, FSDP2 and the fake backend have in common: the flow of training, saving and offloading.

A backend fills in the steps that differ, the methods without a body below.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.errors import CheckpointError, ConfigError, OffloadStateError
from lightrft.strategy.prepared import Prepared
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.strategy.utils import moving_average, saving
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.call_sites import call_site
from lightrft.strategy.utils.checkpoints import CheckpointFolder

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

__all__ = ["BackendStrategy", "Loading", "Step"]


_NOTICEABLE = 1e-4
"""Norm of a gradient that changes weights for sure: what is left of one by cancellation may change none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What came of one optimizer step.

    Attributes:
        norm: of the whole gradient before clipping.
        applied: whether the optimizer stepped.
    """

    norm: float
    applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What to take from a checkpoint.

    Attributes:
        strict: refuse one whose parameters are not those of the model.
        optimizer: the optimizer's states too.
    """

    strict: bool
    optimizer: bool


class BackendStrategy(StrategyBase):
    """The flow that all backends share."""

    backend: str
    """``"deepspeed"``, ``"fsdp"`` or ``"fake"``, as it is written into checkpoints."""

    def _know_the_world(self) -> None:
        self._averages = moving_average.FineAverages()
        super()._know_the_world()

    # -- What a backend fills in --------------------------------------------------------------------------------------

    @abstractmethod
    def _shard(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | None,
        *,
        training: bool,
        shard_size: int,
        reshard_after_forward: bool,
    ) -> tuple[torch.nn.Module, Optimizer | None]:
        """Spread ``model`` over the ranks; what to use in place of it and of its optimizer."""

    @abstractmethod
    def _backward(self, prepared: Prepared, loss: torch.Tensor, *, last: bool, **kwargs: Any) -> None:
        """Add the gradient of ``loss``; ``last`` is true for the last micro-batch before a step."""

    @abstractmethod
    def _step(self, prepared: Prepared) -> Step:
        """Clip, step and clear the gradients."""

    @abstractmethod
    def _micro_step(self, prepared: Prepared) -> None:
        """A micro-batch ended, and it was not the last one before a step."""

    @abstractmethod
    def _forget_gradients(self, prepared: Prepared) -> None:
        """Clear the gradients of a partial accumulation."""

    @abstractmethod
    def _write(self, prepared: Prepared, folder: Path) -> None:
        """Write model and optimizer into ``folder``."""

    @abstractmethod
    def _read(self, prepared: Prepared, folder: Path, loading: Loading) -> None:
        """Take model and optimizer from ``folder``, which any number of ranks may have written."""

    @abstractmethod
    def _move_model(self, prepared: Prepared, device: torch.device) -> None:
        """Move the weights."""

    @abstractmethod
    def _move_optimizer(self, prepared: Prepared, device: torch.device) -> None:
        """Move the states of the optimizer."""

    # -- Preparing ----------------------------------------------------------------------------------------------------

    def prepare(self, *models_or_pairs: Any, is_rlhf: bool = False) -> Any:  # noqa: ARG002 - see StrategyBase
        if not models_or_pairs:
            raise ConfigError("prepare() got nothing: pass models, or tuples (model, optimizer, scheduler)")
        prepared = [self._prepare_one(given) for given in models_or_pairs]
        return prepared[0] if len(prepared) == 1 else prepared

    def _prepare_one(self, given: Any) -> Any:
        if given is None:
            return None
        if not isinstance(given, (tuple, list)):
            _check_model(given)
            return self._spread(given, training=any(p.requires_grad for p in given.parameters()))
        model, optimizer, scheduler = _parts(given)
        if model is None:
            return tuple(given)
        _check_model(model)
        wrapped = self._spread(model, optimizer=optimizer, scheduler=scheduler, training=optimizer is not None)
        return (wrapped, self.prepared.of(wrapped).optimizer, scheduler)[: len(given)]

    def prepare_model(
        self,
        model: torch.nn.Module,
        is_training: bool = False,
        shard_size: int = -1,
        reshard_after_forward: bool = True,
    ) -> torch.nn.Module:
        _check_model(model)
        return self._spread(
            model, training=is_training, shard_size=shard_size, reshard_after_forward=reshard_after_forward
        )

    def _spread(
        self,
        model: torch.nn.Module,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        training: bool,
        shard_size: int = -1,
        reshard_after_forward: bool = True,
    ) -> torch.nn.Module:
        if self.prepared.find(model) is not None:
            raise ConfigError(f"{type(model).__name__} is prepared already: prepare each model once")
        self._check_shard_size(shard_size)
        self._share_sequences(model, training=training)
        wrapped, stepping = self._shard(
            model, optimizer, training=training, shard_size=shard_size, reshard_after_forward=reshard_after_forward
        )
        if not training:
            wrapped.eval()
        prepared = Prepared(optimizer=stepping, scheduler=scheduler, training=training)
        self.prepared.add(prepared, model=wrapped, module=self.unwrap_model(wrapped))
        return wrapped

    def _share_sequences(self, model: torch.nn.Module, *, training: bool) -> None:
        """Let the attention of ``model`` work on slices; a frozen model without any may see whole sequences."""
        from lightrft.strategy.utils import sequence_parallel

        if self.groups.sp is not None and (training or hasattr(self.unwrap_model(model), "config")):
            sequence_parallel.enable(model, self.groups.sp)

    def _known(self, model: torch.nn.Module, optimizer: Optimizer | None = None) -> Prepared:  # noqa: ARG002
        """What is known of ``model``; a backend may take in one that was never prepared, with its ``optimizer``."""
        return self.prepared.of(model)

    def _check_shard_size(self, shard_size: int) -> None:
        if shard_size != -1 and (shard_size < 1 or self.world_size % shard_size):
            fitting = [size for size in range(1, self.world_size + 1) if self.world_size % size == 0]
            raise ConfigError(
                f"shard_size is {shard_size} in a world of {self.world_size}: expected -1 (all ranks) or one of "
                f"{', '.join(map(str, fitting))}"
            )

    # -- Training -----------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, model: torch.nn.Module, optimizer: Optimizer, **kwargs: Any) -> None:
        prepared = self._trained(model, optimizer)
        self._refuse_offloaded(prepared)
        self._backward(prepared, loss, last=prepared.micro_steps + 1 == self.accumulated_gradient, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module,
        scheduler: Any = None,
        name: str = "model",
        **kwargs: Any,  # noqa: ARG002 - callers may pass what another backend understands
    ) -> float | None:
        prepared = self._trained(model, optimizer)
        self._refuse_offloaded(prepared)
        prepared.micro_steps += 1
        if prepared.micro_steps < self.accumulated_gradient:
            self._micro_step(prepared)
            return None
        step = self._step(prepared)
        prepared.micro_steps = 0
        prepared.steps += 1
        if step.applied and step.norm > _NOTICEABLE:
            prepared.trained |= _changing(prepared)
        scheduler = scheduler if scheduler is not None else prepared.scheduler
        prepared.scheduler = scheduler
        if step.applied and scheduler is not None:
            scheduler.step()
        self.gradient_norms[name] = step.norm
        return step.norm

    def _trained(self, model: torch.nn.Module, optimizer: Optimizer | None) -> Prepared:
        """What is known of ``model``, which is being trained with ``optimizer``."""
        prepared = self._known(model, optimizer)
        if not prepared.training:
            raise ConfigError(
                f"{type(prepared.module).__name__} was prepared for evaluation: pass it to prepare() with trainable "
                "parameters or with its optimizer, or to prepare_model(..., is_training=True)"
            )
        _check_optimizer(prepared, optimizer)
        if prepared.optimizer is None:
            prepared.optimizer = optimizer
        return prepared

    def drop_partial_accumulation(self, model: torch.nn.Module) -> int:
        prepared = self._known(model)
        dropped = prepared.micro_steps
        if dropped:
            warnings.warn(
                f"the gradients of {dropped} of {self.accumulated_gradient} micro-batches of "
                f"{type(prepared.module).__name__} are dropped: the iteration ended before its optimizer step. Make "
                "the number of micro-batches a multiple of the accumulation",
                UserWarning,
                stacklevel=3,
            )
            self._forget_gradients(prepared)
            prepared.micro_steps = 0
        return dropped

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def _folder(self, save_dir: str) -> CheckpointFolder:
        return CheckpointFolder(save_dir, rank=self.get_rank(), world_size=self.world_size)

    def save_ckpt(
        self,
        model: torch.nn.Module,
        save_dir: str,
        tag: str | None = None,
        max_num: int = 3,
        max_mem: float = 1000,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
    ) -> str:
        prepared = self._remembering(model, optimizer, scheduler)
        self.drop_partial_accumulation(model)
        tag = tag or f"global_step{prepared.steps}"
        folder = self._folder(save_dir)
        with folder.saving(
            tag,
            backend=self.backend,
            steps=prepared.steps,
            client_state=client_state,
            scheduler_state=None if prepared.scheduler is None else prepared.scheduler.state_dict(),
            max_num=max_num,
            max_mem=max_mem,
            save_latest=save_latest,
        ) as path:
            self._write(prepared, path)
        return str(folder.save_dir / tag)

    def load_ckpt(
        self,
        model: torch.nn.Module,
        load_dir: str,
        tag: str | None = None,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        prepared = self._remembering(model, optimizer, scheduler)
        self.drop_partial_accumulation(model)
        folder = self._folder(load_dir)
        found = folder.find(tag)
        info = folder.info(found)
        if info.backend != self.backend:
            raise CheckpointError(
                f"{found} was written by the {info.backend} backend, and this is {self.backend}: convert it with "
                "`lightrft ckpt convert`, or load it with the backend that wrote it"
            )
        whole = not load_module_only
        if prepared.offloaded_at is not None or prepared.optimizer_offloaded_at is not None:
            raise OffloadStateError(
                f"load_ckpt at {call_site()}: the model or its optimizer is offloaded, since "
                f"{prepared.offloaded_at or prepared.optimizer_offloaded_at}; load it back first"
            )
        if whole and load_optimizer_states and prepared.training and prepared.optimizer is None:
            raise CheckpointError(
                f"{found} may hold states of an optimizer, and the model has none yet: call create_optimizer(model) "
                "before load_ckpt, pass optimizer=, or pass load_optimizer_states=False"
            )
        state = folder.load_scheduler_state(found) if whole and load_lr_scheduler_states else None
        if state is not None and prepared.scheduler is None:
            raise CheckpointError(
                f"{found} holds the state of a scheduler, and none is known: pass scheduler=, prepare the model with "
                "it, or pass load_lr_scheduler_states=False"
            )
        prepared.trained, prepared.verified = set(), None
        self._read(prepared, found, Loading(strict=load_module_strict, optimizer=whole and load_optimizer_states))
        if not whole:
            return str(found), {}
        prepared.steps = info.steps
        if state is not None:
            _resume_schedule(prepared.scheduler, state)
        folder.restore_random_state(found)
        return str(found), folder.load_client_state(found)

    def save_model(self, model: torch.nn.Module, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        ranks = Ranks(rank=self.get_rank(), world_size=self.world_size)
        module = self.unwrap_model(model)
        saving.save_pretrained(module, self.full_parameters(model), tokenizer, output_dir, ranks, **kwargs)

    def _remembering(self, model: torch.nn.Module, optimizer: Optimizer | None, scheduler: Any) -> Prepared:
        prepared = self._known(model, optimizer)
        _check_optimizer(prepared, optimizer)
        prepared.optimizer = optimizer if optimizer is not None else prepared.optimizer
        prepared.scheduler = scheduler if scheduler is not None else prepared.scheduler
        return prepared

    # -- Memory -------------------------------------------------------------------------------------------------------

    def offload_model(self, model: torch.nn.Module) -> None:
        import torch

        prepared = self._known(model)
        if prepared.offloaded_at is not None:
            raise OffloadStateError(
                f"offload_model at {call_site()}: the model is offloaded already, since {prepared.offloaded_at}; "
                "reload_model comes between two calls"
            )
        self.drop_partial_accumulation(model)
        self._move_model(prepared, torch.device("cpu"))
        prepared.offloaded_at = call_site()

    def reload_model(self, model: torch.nn.Module) -> None:
        prepared = self._known(model)
        if prepared.offloaded_at is None:
            raise OffloadStateError(f"reload_model at {call_site()}: the model was not offloaded")
        self._move_model(prepared, self.device)
        prepared.offloaded_at = None

    def _refuse_offloaded(self, prepared: Prepared) -> None:
        if prepared.offloaded_at is not None:
            raise OffloadStateError(
                f"training at {call_site()}: the model is offloaded, since {prepared.offloaded_at}; call reload_model "
                "first"
            )
        if prepared.optimizer_offloaded_at is not None:
            raise OffloadStateError(
                f"training at {call_site()}: the optimizer is offloaded, since {prepared.optimizer_offloaded_at}; "
                "call maybe_load_optimizer first"
            )

    def maybe_offload_optimizer(self, optimizer: Optimizer) -> None:
        import torch

        prepared = self._of_optimizer(optimizer)
        if prepared.optimizer_offloaded_at is not None:
            raise OffloadStateError(
                f"maybe_offload_optimizer at {call_site()}: the optimizer is offloaded already, since "
                f"{prepared.optimizer_offloaded_at}; maybe_load_optimizer comes between two calls"
            )
        self.drop_partial_accumulation(prepared.model)
        self._move_optimizer(prepared, torch.device("cpu"))
        prepared.optimizer_offloaded_at = call_site()
        prepared.backend.pop("loaded_at", None)

    def maybe_load_optimizer(self, optimizer: Optimizer) -> None:
        prepared = self._of_optimizer(optimizer)
        if prepared.optimizer_offloaded_at is None:
            if "loaded_at" in prepared.backend:
                raise OffloadStateError(
                    f"maybe_load_optimizer at {call_site()}: the optimizer is on the device already, since "
                    f"{prepared.backend['loaded_at']}; maybe_offload_optimizer comes between two calls"
                )
            return
        self._move_optimizer(prepared, self.device)
        prepared.optimizer_offloaded_at = None
        prepared.backend["loaded_at"] = call_site()

    def _of_optimizer(self, optimizer: Optimizer) -> Prepared:
        prepared = self.prepared.of_optimizer(optimizer)
        if prepared is None:
            raise ConfigError(
                f"this strategy does not know the optimizer ({type(optimizer).__name__}): use the one that "
                "prepare() returned, or create it with create_optimizer(prepared_model)"
            )
        return prepared


def _changing(prepared: Prepared) -> set[str]:
    """Names of the parameters that a step with a gradient changes."""
    groups = [] if prepared.optimizer is None else prepared.optimizer.param_groups
    if not all(group["lr"] > 0 for group in groups):
        return set()
    return {name for name, parameter in prepared.module.named_parameters() if parameter.requires_grad}


def _check_optimizer(prepared: Prepared, optimizer: Optimizer | None) -> None:
    if optimizer is not None and prepared.optimizer is not None and optimizer is not prepared.optimizer:
        raise ConfigError(
            f"{type(prepared.module).__name__} is stepped by another optimizer ({type(prepared.optimizer).__name__}): "
            "pass the one that prepare() returned, or that create_optimizer(prepared_model) made"
        )


def _resume_schedule(scheduler: Any, state: Any) -> None:
    """Let ``scheduler`` go on from ``state``; the optimizer gets the learning rate of that step at once."""
    scheduler.load_state_dict(state)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _parts(given: Any) -> tuple[Any, Any, Any]:
    if not 1 <= len(given) <= 3:
        raise ConfigError(f"prepare() got a tuple of {len(given)}: expected (model, optimizer, scheduler)")
    model, optimizer, scheduler = [*given, None, None][:3]
    return model, optimizer, scheduler


def _check_model(model: object) -> None:
    """Refuse what is no ``torch.nn.Module``.

    Raises:
        ConfigError: it is none.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"expected a torch.nn.Module, got {type(model).__name__}")
