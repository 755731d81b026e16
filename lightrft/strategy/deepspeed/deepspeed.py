"""``DeepspeedStrategy``: training on DeepSpeed ZeRO, stages 1 to 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lightrft.errors import ConfigError
from lightrft.strategy.backend_strategy import BackendStrategy, Loading, Step
from lightrft.strategy.deepspeed import accumulation, parameters, restoring, runtime
from lightrft.strategy.deepspeed.deepspeed_utils import evaluation_config, evaluation_stage, training_config
from lightrft.strategy.prepared import Prepared

__all__ = ["DeepspeedStrategy"]


class DeepspeedStrategy(BackendStrategy):
    """Training on DeepSpeed ZeRO, at the stage that ``zero_stage`` says.

    What ``prepare`` returns for a model is DeepSpeed's engine. Its optimizer is the one that was given: PyTorch's
    schedulers work on it, and what they set reaches DeepSpeed.
    """

    backend = "deepspeed"

    # -- Ranks --------------------------------------------------------------------------------------------------------

    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        if not self._is_set_up:
            super().setup_distributed(timeout, num_gpu_per_node)
            runtime.connect()

    # -- Models -------------------------------------------------------------------------------------------------------

    def init_model_context(self, meta_init: bool = False) -> AbstractContextManager[Any]:
        return nullcontext()

    def create_optimizer(self, model: torch.nn.Module, **kwargs: Any) -> Optimizer:
        prepared = self.prepared.find(model)
        if prepared is not None:
            raise NotImplementedError
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError(f"{type(model).__name__} has no trainable parameter: an optimizer would step nothing")
        decays = [p for p in trained if len(parameters.shape_of(p)) > 1]
        rest = [p for p in trained if len(parameters.shape_of(p)) <= 1]
        settings = {
            "lr": self.config.actor_learning_rate,
            "betas": self.config.adam_betas,
            "eps": 1e-8,
            "weight_decay": self.config.weight_decay,
            **{name: value for name, value in kwargs.items() if value is not None},
        }
        groups = [{"params": decays}, {"params": rest, "weight_decay": 0.0}]
        return runtime.adam_class(offload=self.config.adam_offload)([g for g in groups if g["params"]], **settings)

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
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
        size = parameters.size_of(model)
        if training:
            optimizer = self.create_optimizer(model) if optimizer is None else optimizer
            settings = training_config(
                self.config,
                size,
                accumulation=self.accumulated_gradient,
                pin_memory=torch.cuda.is_available(),
                reshard_after_forward=reshard_after_forward,
            )
            return self._engine_of(model, settings, optimizer), optimizer
        stage = evaluation_stage(self.config, shard_size, self.world_size)
        settings = evaluation_config(self.config, size, stage=stage, reshard_after_forward=reshard_after_forward)
        engine = self._engine_of(model, settings)
        engine.eval()
        return engine, None

    def _engine_of(self, model: torch.nn.Module, settings: dict[str, Any], optimizer: Optimizer | None = None) -> Any:
        import deepspeed

        with runtime.fp16_allowed() if self.config.fp16 else nullcontext():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        return engine

    # -- Training -----------------------------------------------------------------------------------------------------

    def _backward(self, prepared: Prepared, loss: torch.Tensor, *, last: bool, **kwargs: Any) -> None:
        engine: Any = prepared.model
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, **kwargs)

    def _micro_step(self, prepared: Prepared) -> None:
        engine: Any = prepared.model
        engine.step()

    def _step(self, prepared: Prepared) -> Step:
        engine: Any = prepared.model
        engine.step()
        return Step(norm=float(engine.get_global_grad_norm()), applied=engine.was_step_applied())

    def _forget_gradients(self, prepared: Prepared) -> None:
        accumulation.forget(prepared.model)

    def moving_average(
        self, model: torch.nn.Module, ema: torch.nn.Module, beta: float = 0.992, device: str = "cpu"
    ) -> None:
        raise NotImplementedError

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def _write(self, prepared: Prepared, folder: Path) -> None:
        engine: Any = prepared.model
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def _read(self, prepared: Prepared, folder: Path, loading: Loading) -> None:
        restoring.restore(prepared.model, folder, strict=loading.strict, optimizer=loading.optimizer)

    def save_model(self, model: torch.nn.Module, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        raise NotImplementedError

    def full_parameters(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters.full(self.prepared.of(model).module):
            yield name, parameter.data

    # -- Memory -------------------------------------------------------------------------------------------------------

    def _move_model(self, prepared: Prepared, device: torch.device) -> None:
        raise NotImplementedError

    def _move_optimizer(self, prepared: Prepared, device: torch.device) -> None:
        raise NotImplementedError
