"""``DeepspeedStrategy``: training on DeepSpeed ZeRO, stages 1 to 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightrft.strategy.backend_strategy import BackendStrategy, Loading, Step
from lightrft.strategy.deepspeed import (
    accumulation,
    averaging,
    construction,
    moving,
    optimizers,
    parameters,
    restoring,
    runtime,
    writing,
)
from lightrft.strategy.deepspeed.deepspeed_utils import (
    ModelSize,
    evaluation_config,
    evaluation_stage,
    training_config,
)
from lightrft.strategy.utils import activations
from lightrft.strategy.utils.checkpoint_form import keep_used_conversions
from lightrft.strategy.utils.optimizers import adamw_settings

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.optim import Optimizer

    from lightrft.strategy.prepared import Prepared

__all__ = ["DeepspeedStrategy"]


class DeepspeedStrategy(BackendStrategy):
    """Training on DeepSpeed ZeRO, at the stage that ``zero_stage`` says.

    What ``prepare`` returns for a model is DeepSpeed's engine: one with an optimizer if the model is trained; else one
    that spreads the weights at stage 3, and one that keeps them whole below. The optimizer that comes back is the
    object that was given: PyTorch's schedulers work on it, and the learning rates that they set are those that
    DeepSpeed uses. A trainable model that is prepared without an optimizer gets one with default settings, which
    ``create_optimizer`` then returns, set as it is asked for.
    """

    backend = "deepspeed"

    # -- Ranks --------------------------------------------------------------------------------------------------------

    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        """Join the process group, and let DeepSpeed use it."""
        if not self._is_set_up:
            super().setup_distributed(timeout, num_gpu_per_node)
            runtime.connect()

    def _know_the_world(self) -> None:
        self._shard_groups: dict[int, dist.ProcessGroup] = {}
        super()._know_the_world()

    # -- Models -------------------------------------------------------------------------------------------------------

    def init_model_context(self, meta_init: bool = False) -> AbstractContextManager[Any]:  # noqa: ARG002 - below
        """At stage 3, build models spread over the ranks; below, as usual. DeepSpeed builds nothing without storage."""
        if self.config.zero_stage != 3:
            return nullcontext()
        settings = evaluation_config(self.config, ModelSize(elements=1, width=0), stage=3)
        return construction.partitioned_construction(settings, self.device)

    def create_optimizer(self, model: torch.nn.Module, **kwargs: Any) -> Optimizer:
        """As in ``StrategyBase``. For a prepared model it is the engine's, with other settings from now on."""
        prepared = self.prepared.find(model)
        settings = adamw_settings(self.config, kwargs)
        if prepared is None:
            return optimizers.create(model, settings, offload=self.config.adam_offload)
        trained = self._trained(model, None)
        return optimizers.change(trained.optimizer, settings, name=type(trained.module).__name__)

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module inside DeepSpeed's engine."""
        import deepspeed

        return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model

    def _shard(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | None,
        *,
        training: bool,
        shard_size: int,
        reshard_after_forward: bool,
    ) -> tuple[torch.nn.Module, Optimizer | None]:
        keep_used_conversions(model)
        if not training:
            return self._evaluating(model, shard_size, reshard_after_forward=reshard_after_forward), None
        optimizer = self.create_optimizer(model) if optimizer is None else optimizer
        optimizers.mark_decay(optimizer)
        if self.config.gradient_checkpointing:
            activations.recompute(model)
        settings = training_config(
            self.config,
            parameters.size_of(model),
            shard_size=shard_size,
            world_size=self.world_size,
            accumulation=self.accumulated_gradient,
            pin_memory=torch.cuda.is_available(),
            reshard_after_forward=reshard_after_forward,
        )
        return construction.build_engine(model, settings, self.device, optimizer), optimizer

    def _evaluating(self, model: torch.nn.Module, shard_size: int, *, reshard_after_forward: bool) -> torch.nn.Module:
        stage = evaluation_stage(self.config, shard_size)
        size = parameters.size_of(model)
        settings = evaluation_config(self.config, size, stage=stage, reshard_after_forward=reshard_after_forward)
        if self.config.bf16 or self.config.fp16:
            construction.cast(model, torch.bfloat16 if self.config.bf16 else torch.float16)
        if stage == 3 and shard_size not in (-1, self.world_size):
            construction.spread_over_group(model, settings, self.device, self._shard_group(shard_size))
        engine: torch.nn.Module = construction.build_engine(model, settings, self.device)
        engine.eval()
        return engine

    def _shard_group(self, shard_size: int) -> dist.ProcessGroup:
        if shard_size not in self._shard_groups:
            self._shard_groups[shard_size] = construction.shard_group(shard_size)
        return self._shard_groups[shard_size]

    # -- Training -----------------------------------------------------------------------------------------------------

    def _backward(self, prepared: Prepared, loss: torch.Tensor, *, last: bool, **kwargs: Any) -> None:
        engine: Any = prepared.model
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, **kwargs)

    def _micro_step(self, prepared: Prepared) -> None:
        engine: Any = prepared.model
        engine.step()
        accumulation.end_micro_batch(engine.optimizer)

    def _step(self, prepared: Prepared) -> Step:
        engine: Any = prepared.model
        if self.config.adam_offload and self.accumulated_gradient > 1:
            accumulation.complete(engine)
        engine.step()
        accumulation.clear_buffers(engine.optimizer)
        return Step(norm=float(engine.get_global_grad_norm()), applied=engine.was_step_applied())

    def _forget_gradients(self, prepared: Prepared) -> None:
        accumulation.forget(prepared.model)

    def moving_average(
        self, model: torch.nn.Module, ema: torch.nn.Module, beta: float = 0.992, device: str = "cpu"
    ) -> None:
        """As in ``StrategyBase``; one parameter is whole at a time."""
        known = self.prepared.find(ema)
        averaging.move_towards(
            self.prepared.of(model).module,
            ema if known is None else known.module,
            fine=self._averages,
            engine=known.model if known is not None and known.training else None,
            beta=beta,
            device=torch.device(device),
        )

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def _write(self, prepared: Prepared, folder: Path) -> None:
        writing.write(prepared.model, folder)

    def _read(self, prepared: Prepared, folder: Path, loading: Loading) -> None:
        restoring.restore(prepared.model, folder, strict=loading.strict, optimizer=loading.optimizer)

    def full_parameters(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """As in ``StrategyBase``; at stage 3 one parameter is gathered at a time."""
        for name, parameter in parameters.full(self.prepared.of(model).module):
            yield name, parameter.data.clone() if parameters.is_partitioned(parameter) else parameter.data

    # -- Memory -------------------------------------------------------------------------------------------------------

    def _move_model(self, prepared: Prepared, device: torch.device) -> None:
        if prepared.offloaded_at is None:
            moving.offload_weights(prepared.model)
        else:
            moving.load_weights(prepared.model, device)

    def _move_optimizer(self, prepared: Prepared, device: torch.device) -> None:
        if prepared.optimizer_offloaded_at is None:
            moving.offload_optimizer(prepared.model)
        else:
            moving.load_optimizer(prepared.model, device)
