"""FakeStrategy: the strategy interface with torch alone, alone or on any number of ranks.

It keeps whole weights on every rank and shares out the optimizer (see ``flat_parameters``), which gives the numbers
of FSDP2 and of ZeRO up to rounding, in a fraction of their time. What a trainer can see of the backend that it mirrors
is the same: what ``prepare`` returns, when the optimizer steps, what a checkpoint folder holds, which moves between
devices are refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.errors import ConfigError
from lightrft.sim.current import current_task
from lightrft.sim.engine.faces import MODES
from lightrft.sim.fake_checkpoints import LAYOUTS
from lightrft.sim.flat_parameters import FlatParameters, repoint
from lightrft.strategy.backend_strategy import BackendStrategy, Loading, Step
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.deepspeed.deepspeed_utils import check_training_shards
from lightrft.strategy.prepared import Prepared
from lightrft.strategy.utils import activations, moving_average, optimizers
from lightrft.strategy.utils.loss_scale import LossScale

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightrft.strategy.engine import RolloutEngine
    from lightrft.strategy.engine_settings import EngineSettings

__all__ = ["FakeEngine", "FakeStrategy", "get_fake_strategy"]

MIRRORS = ("deepspeed", "fsdp")


class FakeEngine(nn.Module):
    """What DeepSpeed puts around a model, as far as a trainer sees it: attributes of the model are found through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class FakeStrategy(BackendStrategy):
    """A drop-in for the real strategies that needs torch alone.

    Without a launcher's variables and without a process group it is one rank, and makes no process group. It then also
    takes models that were never prepared.

    Args:
        seed: as in ``StrategyBase``.
        max_norm: as in ``StrategyBase``.
        micro_train_batch_size: as in ``StrategyBase``.
        train_batch_size: as in ``StrategyBase``.
        args: as in ``StrategyBase``.
        mirrors: ``"deepspeed"`` or ``"fsdp"``; as ``args.fsdp`` says if ``None``.
        engines: what ``setup_inference_engine`` starts outside of a ``SimWorld``, in which the world says it: a fake
            engine that runs the model itself (``"model"``), one that derives tokens from a digest of the weights
            (``"hash"``), or the installed package (``False``).
    """

    backend = "fake"

    def __init__(
        self,
        seed: int = 42,
        max_norm: float = 1.0,
        micro_train_batch_size: int = 1,
        train_batch_size: int = 128,
        args: Any = None,
        *,
        mirrors: str | None = None,
        engines: str | bool = "model",
    ) -> None:
        if mirrors is not None and mirrors not in MIRRORS:
            raise ConfigError(f"mirrors is {mirrors!r}: expected one of {', '.join(MIRRORS)}")
        if engines not in (False, *MODES):
            raise ConfigError(f"engines={engines!r} is unknown: expected False, or one of {', '.join(MODES)}")
        self.engines = engines
        config = StrategyConfig.from_args(args)
        self.mirrors = mirrors or ("fsdp" if config.fsdp else "deepspeed")
        self._flats: weakref.WeakKeyDictionary[nn.Module, list[FlatParameters]] = weakref.WeakKeyDictionary()
        super().__init__(seed, max_norm, micro_train_batch_size, train_batch_size, args)

    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        launched = self._place(num_gpu_per_node).source != "alone"
        if launched or dist.is_initialized():
            super().setup_distributed(timeout, num_gpu_per_node)
        self._is_set_up = True

    @property
    def _is_alone(self) -> bool:
        return not dist.is_initialized()

    def _start_engine(self, engine_type: str, settings: EngineSettings) -> RolloutEngine:
        if current_task() is not None or not isinstance(self.engines, str):
            return super()._start_engine(engine_type, settings)
        from lightrft.sim.engine.alone import start_alone

        return start_alone(engine_type, settings, self.engines)

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        """What the model computes in; ``None`` for what it was built in."""
        if self.config.bf16:
            return torch.bfloat16
        return torch.float16 if self.config.fp16 else None

    # -- Models -------------------------------------------------------------------------------------------------------

    def init_model_context(self, meta_init: bool = False) -> AbstractContextManager[Any]:  # noqa: ARG002 - as mirrored
        """Models are built whole on every rank."""
        return nullcontext()

    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        prepared = self.prepared.find(model)
        settings = optimizers.adamw_settings(self.config, kwargs)
        decay = settings.pop("weight_decay")
        groups = optimizers.parameter_groups(model if prepared is None else prepared.module, decay)
        if prepared is None:
            return torch.optim.AdamW(groups, **settings)
        for one in self._flat(prepared):
            repoint(groups, one.pieces)
        prepared.optimizer = torch.optim.AdamW(groups, **settings)
        return prepared.optimizer

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, FakeEngine) else model

    def _shard(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        training: bool,
        shard_size: int,
        reshard_after_forward: bool,  # noqa: ARG002 - the same
    ) -> tuple[nn.Module, Optimizer | None]:
        if optimizer is not None and optimizer.state:
            raise ConfigError("the optimizer has stepped already: prepare the model before its first step")
        if optimizer is None and training and self.mirrors == "deepspeed":
            optimizer = self.create_optimizer(model)
        if self.mirrors == "deepspeed" and training:
            check_training_shards(shard_size, self.world_size)
        if self.config.gradient_checkpointing and training:
            activations.recompute(model)
        model = model.to(self.device)
        self._cast(model)
        flat = self._flattened(model) if training else []
        for one in flat:
            repoint([] if optimizer is None else optimizer.param_groups, one.pieces)
        wrapped = FakeEngine(model) if self.mirrors == "deepspeed" else model
        self._flats[wrapped] = flat
        return wrapped, optimizer

    def _cast(self, model: nn.Module) -> None:
        """Parameters to what the model computes in; buffers stay what they are."""
        for parameter in model.parameters() if self._compute_dtype is not None else ():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._compute_dtype)

    def _flattened(self, model: nn.Module) -> list[FlatParameters]:
        by_dtype: dict[torch.dtype, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, {})[name] = parameter
        return [
            FlatParameters(
                named,
                rank=self.get_rank(),
                world_size=self.world_size,
                deepspeed=self.mirrors == "deepspeed",
            )
            for named in by_dtype.values()
        ]

    def _flat(self, prepared: Prepared) -> list[FlatParameters]:
        return self._flats.get(prepared.model, [])

    def _known(self, model: nn.Module, optimizer: Optimizer | None = None) -> Prepared:
        prepared = self.prepared.find(model)
        if prepared is None and self._is_alone and isinstance(model, nn.Module):
            prepared = self._adopt(model)
        prepared = super()._known(model, optimizer) if prepared is None else prepared
        if optimizer is not None and prepared.optimizer is None:
            for one in self._flat(prepared):
                repoint(optimizer.param_groups, one.pieces)
            prepared.optimizer = optimizer
        return prepared

    def _adopt(self, model: nn.Module) -> Prepared:
        """Take in a model that was not prepared: a single rank has nothing to spread it over."""
        flat = self._flats[model] = self._flattened(model)
        return self.prepared.add(Prepared(training=bool(flat)), model=model)

    # -- Training -----------------------------------------------------------------------------------------------------

    def _backward(self, prepared: Prepared, loss: torch.Tensor, *, last: bool, **kwargs: Any) -> None:  # noqa: ARG002
        (loss * self._loss_scale(prepared) if self.config.fp16 else loss).backward(**kwargs)

    def _loss_scale(self, prepared: Prepared) -> float:
        if not (self.config.fp16 and prepared.training):
            return 1.0
        scale: LossScale = prepared.backend.setdefault("loss_scale", LossScale())
        return scale.scale

    def _step(self, prepared: Prepared) -> Step:
        divisor = self.world_size * self.accumulated_gradient * self._loss_scale(prepared)
        flat = self._flat(prepared)
        norm = math.sqrt(sum(one.reduce_gradients(divisor).item() for one in flat))
        applied = math.isfinite(norm)
        if applied:
            self._apply(prepared, flat, norm)
        if "loss_scale" in prepared.backend:
            prepared.backend["loss_scale"].update(overflow=not applied)
        self._forget_gradients(prepared)
        return Step(norm=norm, applied=applied)

    def _apply(self, prepared: Prepared, flat: list[FlatParameters], norm: float) -> None:
        if 0 < self.config.max_norm < norm:
            for one in flat:
                one.scale_gradients(self.config.max_norm / (norm + 1e-6))
        if prepared.optimizer is None:
            raise ConfigError("the model has no optimizer: pass one to optimizer_step, or call create_optimizer(model)")
        prepared.optimizer.step()
        for one in flat:
            one.publish()

    def _micro_step(self, prepared: Prepared) -> None:
        """Gradients stay where they are until the last micro-batch."""

    def _forget_gradients(self, prepared: Prepared) -> None:
        for one in self._flat(prepared):
            one.clear()

    def moving_average(self, model: nn.Module, ema: nn.Module, beta: float = 0.992, device: str = "cpu") -> None:
        source, target = self.unwrap_model(model), self.unwrap_model(ema)
        known = self.prepared.find(ema)
        parameters, averages = dict(source.named_parameters()), dict(target.named_parameters())
        moving_average.check_alike(*({n: p.shape for n, p in each.items()} for each in (parameters, averages)))
        for flat in [] if known is None else self._flat(known):
            for piece in flat.pieces:
                del averages[piece.name]
                own = piece.of(parameters.pop(piece.name))
                moving_average.update([(piece.name, own)], [(piece.name, piece.master)], beta, device)
            flat.publish()
        self._averages.update(parameters.items(), averages.items(), beta, device)
        moving_average.copy_buffers(source.named_buffers(), target.named_buffers())

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def _write(self, prepared: Prepared, folder: Path) -> None:
        self._loss_scale(prepared)  # it is there from now on
        LAYOUTS[self.mirrors].write(prepared, self._flat(prepared), folder, self.get_rank())

    def _read(self, prepared: Prepared, folder: Path, loading: Loading) -> None:
        self._loss_scale(prepared)
        LAYOUTS[self.mirrors].read(prepared, self._flat(prepared), folder, loading)

    def full_parameters(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.unwrap_model(model).named_parameters():
            yield name, parameter.detach()

    # -- Memory -------------------------------------------------------------------------------------------------------

    def _move_model(self, prepared: Prepared, device: torch.device) -> None:
        for one in self._flat(prepared):
            one.move(device)
        prepared.module.to(device)

    def _move_optimizer(self, prepared: Prepared, device: torch.device) -> None:
        if prepared.optimizer is None:
            return
        for state in prepared.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    state[name] = value.to(device)


def get_fake_strategy(args: Any = None) -> FakeStrategy:
    """A FakeStrategy with the settings of ``args``, or the defaults."""
    config = StrategyConfig.from_args(args)
    return FakeStrategy(config.seed, config.max_norm, config.micro_train_batch_size, config.train_batch_size, args=args)
