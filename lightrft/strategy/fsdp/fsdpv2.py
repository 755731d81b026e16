"""FSDPV2Strategy: training on PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightrft.errors import ConfigError
from lightrft.strategy.backend_strategy import BackendStrategy
from lightrft.strategy.fsdp import fsdp_optimizer
from lightrft.strategy.fsdp.fsdp_utils import (
    blocks_of,
    let_go,
    local,
    low_precision,
    make_mesh,
    offload_policy,
    precision_policy,
    sharded_parameters,
    whole,
)
from lightrft.strategy.fsdp.meta_init import Materializer, without_storage
from lightrft.strategy.fsdp.sharded_model import ShardedModel
from lightrft.strategy.utils import activations, moving_average, optimizers
from lightrft.strategy.utils.loss_scale import LossScale

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from lightrft.strategy.backend_strategy import Loading, Step
    from lightrft.strategy.prepared import Prepared

__all__ = ["FSDPV2Strategy"]

_SHARDED = "sharded"


class FSDPV2Strategy(BackendStrategy):
    """Weights, gradients and optimizer states are spread over the ranks, and gathered block by block.

    With ``bf16`` or ``fp16`` a model computes in that dtype. What is trained is kept in fp32; with ``use_mp_opt`` it is
    kept in 16 bits, with an fp32 master of this rank's part that the optimizer steps. Gradients are accumulated before
    they are reduced over the ranks, whole on each of them: with more than one micro-batch in a step, a rank holds the
    whole gradient in the dtype it is reduced in.
    """

    backend = "fsdp"

    def _know_the_world(self) -> None:
        self._meshes: dict[int, DeviceMesh] = {}
        self._builds_without_storage = False
        super()._know_the_world()

    # -- Models -------------------------------------------------------------------------------------------------------

    def init_model_context(self, meta_init: bool = False) -> AbstractContextManager[Any]:
        if not meta_init:
            return nullcontext()
        self._builds_without_storage = True
        return without_storage()

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def _shard(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        training: bool,
        shard_size: int,
        reshard_after_forward: bool,
    ) -> tuple[nn.Module, Optimizer | None]:
        groups = None if optimizer is None else fsdp_optimizer.release(optimizer, model)
        if training and self.config.gradient_checkpointing:
            activations.recompute(model)
        self._cast(model, training=training)
        self._fully_shard(model, self._mesh(shard_size), _resharding(reshard_after_forward, training=training))
        if optimizer is not None and groups is not None:
            fsdp_optimizer.point(optimizer, groups, sharded_parameters(model))
        return model, optimizer

    def _fully_shard(self, model: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool | None) -> None:
        filler = self._materializer(model)
        policy = precision_policy(model, self.config)
        offload = offload_policy(self.config, self.device)
        for unit in (*blocks_of(model), model):
            if filler is not None:
                filler.fill(unit)
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=reshard_after_forward,
                mp_policy=policy,
                offload_policy=offload,
            )

    def _materializer(self, model: nn.Module) -> Materializer | None:
        if self._builds_without_storage and self.world_size > 1 and Materializer.is_needed(model, self.device):
            return Materializer(model, self.device)
        if any(one.is_meta for one in model.parameters()):
            raise ConfigError(
                f"{type(model).__name__} has parameters without storage: build it in "
                "strategy.init_model_context(meta_init=True), not under torch.device('meta')"
            )
        return None

    def _cast(self, model: nn.Module, *, training: bool) -> None:
        """To the dtype in which parameters are kept; buffers stay what they are."""
        low = low_precision(self.config)
        if low is None:
            return
        dtype = torch.float32 if training and not self.config.use_mp_opt else low
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    def _mesh(self, shard_size: int) -> DeviceMesh:
        size = self.world_size if shard_size == -1 else shard_size
        if size not in self._meshes:
            self._meshes[size] = make_mesh(self.device, self.world_size, size)
        return self._meshes[size]

    def _spread(self, model: nn.Module, *, optimizer: Optimizer | None = None, **kwargs: Any) -> nn.Module:
        wrapped = super()._spread(model, optimizer=optimizer, **kwargs)
        prepared = self.prepared.of(wrapped)
        trained = prepared.training
        prepared.backend[_SHARDED] = ShardedModel(
            wrapped,
            self.device,
            masters=trained and self.config.use_mp_opt,
            loss_scale=LossScale() if trained and self.config.fp16 else None,
        )
        if optimizer is not None:
            _of(prepared).adopt(optimizer)
        return wrapped

    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        settings = optimizers.adamw_settings(self.config, kwargs)
        prepared = self.prepared.find(model)
        if prepared is not None:
            sharded_parameters(prepared.module)  # not those that a forward pass has gathered
        groups = optimizers.parameter_groups(model, settings.pop("weight_decay"))
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        if prepared is not None:
            self._adopt(prepared, optimizer)
        return optimizer

    def _adopt(self, prepared: Prepared, optimizer: Optimizer) -> None:
        _of(prepared).adopt(optimizer)
        prepared.optimizer = optimizer

    def _known(self, model: nn.Module, optimizer: Optimizer | None = None) -> Prepared:
        prepared = super()._known(model, optimizer)
        if optimizer is not None and optimizer is not prepared.optimizer and prepared.training:
            self._adopt(prepared, optimizer)
        return prepared

    # -- Training -----------------------------------------------------------------------------------------------------

    def _backward(self, prepared: Prepared, loss: torch.Tensor, *, last: bool, **kwargs: Any) -> None:
        _of(prepared).backward(prepared.module, loss, parts=self.accumulated_gradient, last=last, **kwargs)

    def _micro_step(self, prepared: Prepared) -> None:
        """Nothing: FSDP2 keeps the gradients."""

    def _step(self, prepared: Prepared) -> Step:
        return _of(prepared).step(prepared.module, self.config.max_norm)

    def _forget_gradients(self, prepared: Prepared) -> None:
        _of(prepared).forget_gradients(prepared.module)

    def moving_average(self, model: nn.Module, ema: nn.Module, beta: float = 0.992, device: str = "cpu") -> None:
        """As in ``StrategyBase``. A prepared ``ema`` in 16 bits gets fp32 masters, which hold the average."""
        source = _of(self._known(model)).kept
        known = self.prepared.find(ema)
        if known is None:
            self._averages.update(source.items(), ema.named_parameters(), beta, device)
            moving_average.copy_buffers(self.unwrap_model(model).named_buffers(), ema.named_buffers())
            return
        target = _of(known)
        target.keep_in_fp32()
        let_go(known.module)
        where = next((local(one).device for one in target.kept.values()), self.device)
        moving_average.update(source.items(), target.kept.items(), beta, where)
        target.masters.give_weights()
        moving_average.copy_buffers(self.unwrap_model(model).named_buffers(), known.module.named_buffers())

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def _write(self, prepared: Prepared, folder: Path) -> None:
        _of(prepared).write(prepared.module, folder)

    def _read(self, prepared: Prepared, folder: Path, loading: Loading) -> None:
        sharded = _of(prepared)
        if loading.optimizer and prepared.training:
            sharded.check_optimizer()
        sharded.read(prepared.module, folder, loading)
        if prepared.optimizer_offloaded_at is not None:
            self._move_optimizer(prepared, torch.device("cpu"))

    def full_parameters(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        low = low_precision(self.config)
        for name, parameter in sharded_parameters(model).items():
            dtype = low if low is not None and parameter.is_floating_point() else parameter.dtype
            yield name, whole(parameter, self.device, dtype)

    # -- Memory -------------------------------------------------------------------------------------------------------

    def _move_model(self, prepared: Prepared, device: torch.device) -> None:
        if not self.config.fsdp_cpu_offload and self.device.type != "cpu":
            prepared.module.to(device)

    def _move_optimizer(self, prepared: Prepared, device: torch.device) -> None:
        if not self.config.fsdp_cpu_offload and self.device.type != "cpu":
            mover = _of(prepared).mover
            assert mover is not None
            mover.move(device)


def _of(prepared: Prepared) -> ShardedModel:
    sharded: ShardedModel = prepared.backend[_SHARDED]
    return sharded


def _resharding(reshard_after_forward: bool, *, training: bool) -> bool | None:
    """FSDP2's default keeps the root gathered from forward to backward; without backward it would stay so."""
    return None if reshard_after_forward and training else reshard_after_forward
