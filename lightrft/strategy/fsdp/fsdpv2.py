"""FSDPV2Strategy: training on PyTorch's FSDP2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.backend_strategy import BackendStrategy, Loading, Step
from lightrft.strategy.fsdp import averaging, fsdp_optimizer
from lightrft.strategy.fsdp import fsdp_checkpoint as checkpoint
from lightrft.strategy.fsdp.fsdp_optimizer import Masters, StateMover
from lightrft.strategy.fsdp.fsdp_utils import (
    blocks_of,
    forget_gradients,
    local,
    low_precision,
    make_mesh,
    offload_policy,
    precision_policy,
    sharded_parameters,
    whole,
)
from lightrft.strategy.fsdp.meta_init import Materializer, without_storage
from lightrft.strategy.prepared import Prepared
from lightrft.strategy.utils import saving
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.loss_scale import LossScale

__all__ = ["FSDPV2Strategy"]


class FSDPV2Strategy(BackendStrategy):
    """Weights, gradients and optimizer states are spread over the ranks, and gathered block by block.

    With ``bf16`` or ``fp16`` a model computes in that dtype. What is trained is kept in fp32; with ``use_mp_opt`` it is
    kept in 16 bits, with an fp32 master of this rank's part that the optimizer steps. Gradients are accumulated before
    they are reduced over the ranks, whole on each of them: with more than one micro-batch in a step, a rank holds the
    whole gradient in the dtype it is reduced in.
    """

    backend = "fsdp"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._meshes: dict[int, DeviceMesh] = {}
        self._builds_without_storage = False
        super().__init__(*args, **kwargs)

    def setup_distributed(self, timeout: timedelta | None = None, num_gpu_per_node: int | None = None) -> None:
        super().setup_distributed(timeout, num_gpu_per_node)
        if not dist.is_initialized():  # alone: FSDP2 wants a group nevertheless
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)

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
            _recompute_activations(model)
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
                filler.fill(unit, model)
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
        parameters = sharded_parameters(wrapped)
        prepared.backend["parameters"] = parameters
        if prepared.training:
            prepared.backend["masters"] = Masters(parameters.values() if self.config.use_mp_opt else ())
            prepared.backend["loss_scale"] = LossScale() if self.config.fp16 else None
        if optimizer is not None:
            self._adopt(prepared, optimizer)
        return wrapped

    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        prepared = self.prepared.find(model)
        if prepared is not None:
            sharded_parameters(prepared.module)
        optimizer = self._new_optimizer(model, **kwargs)
        if prepared is not None:
            self._adopt(prepared, optimizer)
        return optimizer

    def _new_optimizer(
        self,
        model: nn.Module,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> Optimizer:
        from lightrft.strategy.utils.optimizers import parameter_groups

        config = self.config
        groups = parameter_groups(model, config.weight_decay if weight_decay is None else weight_decay)
        return torch.optim.AdamW(
            groups,
            lr=config.actor_learning_rate if lr is None else lr,
            betas=config.adam_betas if betas is None else betas,
            eps=eps,
            **{"fused": True, **kwargs},
        )

    def _adopt(self, prepared: Prepared, optimizer: Optimizer) -> None:
        """Make ``optimizer`` the one of ``prepared``."""
        prepared.backend["masters"].adopt(optimizer)
        prepared.backend["mover"] = StateMover(optimizer, prepared.backend["masters"])
        prepared.optimizer = optimizer

    def _known(self, model: nn.Module, optimizer: Optimizer | None = None) -> Prepared:
        prepared = super()._known(model, optimizer)
        if optimizer is not None and optimizer is not prepared.optimizer and prepared.training:
            self._adopt(prepared, optimizer)
        return prepared

    # -- Training -----------------------------------------------------------------------------------------------------

    def _backward(self, prepared: Prepared, loss: torch.Tensor, *, last: bool, **kwargs: Any) -> None:
        if prepared.backend.get("synchronizing", True) != last:
            prepared.module.set_requires_gradient_sync(last)  # type: ignore[operator]
            prepared.backend["synchronizing"] = last
        scale: LossScale | None = prepared.backend["loss_scale"]
        factor = (1.0 if scale is None else scale.scale) / self.accumulated_gradient
        (loss if factor == 1 else loss * factor).backward(**kwargs)

    def _micro_step(self, prepared: Prepared) -> None:
        pass

    def _step(self, prepared: Prepared) -> Step:
        masters: Masters = prepared.backend["masters"]
        scale: LossScale | None = prepared.backend["loss_scale"]
        assert prepared.optimizer is not None
        masters.take_gradients()
        stepped = [masters.of(one) for one in prepared.backend["parameters"].values()]
        gradients = [one.grad for one in stepped if one.grad is not None]
        shrink = 1.0 if scale is None else 1 / scale.scale
        norm = _global_norm(gradients) * shrink
        applied = math.isfinite(norm)
        if applied:
            if 0 < self.config.max_norm < norm:
                shrink *= self.config.max_norm / (norm + 1e-6)
            if shrink != 1:
                torch._foreach_mul_([local(one) for one in gradients], shrink)
            prepared.optimizer.step()
            masters.give_weights()
        for one in stepped:
            one.grad = None
        if scale is not None:
            scale.update(overflow=not applied)
        return Step(norm=norm, applied=applied)

    def _forget_gradients(self, prepared: Prepared) -> None:
        forget_gradients(prepared.module)

    def moving_average(self, model: nn.Module, ema: nn.Module, beta: float = 0.992, device: str = "cpu") -> None:
        """As in ``StrategyBase``. A prepared ``ema`` that is kept in 16 bits gets fp32 masters, which take part."""
        source = self._kept(self._known(model))
        known = self.prepared.find(ema)
        if known is None:
            averaging.move_whole(ema, source, beta=beta, on=torch.device(device), device=self.device)
            return
        masters = known.backend.setdefault("masters", Masters(known.backend["parameters"].values()))
        averaging.move_sharded(self._kept(known), source, beta=beta, device=self.device)
        masters.give_weights()

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def _kept(self, prepared: Prepared) -> dict[str, nn.Parameter]:
        """The parameters by name in the precision they are kept in."""
        parameters = sharded_parameters(prepared.module)
        masters = prepared.backend.get("masters") or Masters(())
        return {name: masters.of(one) for name, one in parameters.items()}

    def _write(self, prepared: Prepared, folder: Path) -> None:
        kept = self._kept(prepared)
        entries = checkpoint.model_entries(prepared.module, kept)
        if prepared.optimizer is not None:
            prepared.backend["mover"].wait()
            entries |= checkpoint.optimizer_entries(prepared.optimizer, {one: name for name, one in kept.items()})
        scale: LossScale | None = prepared.backend.get("loss_scale")
        if scale is not None:
            entries["loss_scale"] = torch.tensor([scale.scale, scale.good_steps], dtype=torch.float64)
        checkpoint.save(folder, entries)

    def _read(self, prepared: Prepared, folder: Path, loading: Loading) -> None:
        metadata = checkpoint.read_metadata(folder)
        kept = self._kept(prepared)
        names = {one: name for name, one in kept.items()}
        entries = checkpoint.model_entries(prepared.module, kept)
        entries = checkpoint.check_model(entries, metadata, strict=loading.strict)
        optimizer = prepared.optimizer if loading.optimizer else None
        if loading.optimizer and prepared.training and prepared.optimizer is None:
            raise CheckpointError(
                "there is no optimizer to load states into: pass optimizer=, or load_optimizer_states=False"
            )
        if optimizer is not None:
            entries |= checkpoint.empty_optimizer_entries(metadata, names)
        scale: LossScale | None = prepared.backend.get("loss_scale")
        if scale is not None and loading.optimizer and "loss_scale" in metadata:
            entries["loss_scale"] = torch.zeros(2, dtype=torch.float64)
        checkpoint.load(folder, entries)
        if prepared.backend.get("masters"):
            prepared.backend["masters"].give_weights()
        if optimizer is not None:
            checkpoint.set_optimizer(optimizer, entries, names)
        if "loss_scale" in entries:
            scale.scale, scale.good_steps = entries["loss_scale"][0].item(), int(entries["loss_scale"][1].item())

    def full_parameters(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        low = low_precision(self.config)
        for name, parameter in sharded_parameters(model).items():
            dtype = low if low is not None and parameter.is_floating_point() else parameter.dtype
            yield name, whole(parameter, self.device, dtype)

    def save_model(self, model: nn.Module, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        parameters = self.full_parameters(model)
        saving.save_pretrained(self.unwrap_model(model), parameters, tokenizer, output_dir, Ranks(), **kwargs)

    # -- Memory -------------------------------------------------------------------------------------------------------

    def _move_model(self, prepared: Prepared, device: torch.device) -> None:
        if not self.config.fsdp_cpu_offload and self.device.type != "cpu":
            prepared.module.to(device)

    def _move_optimizer(self, prepared: Prepared, device: torch.device) -> None:
        if not self.config.fsdp_cpu_offload and self.device.type != "cpu":
            prepared.backend["mover"].move(device)


def _resharding(reshard_after_forward: bool, *, training: bool) -> bool | None:
    """FSDP2's default keeps the root gathered from forward to backward; without backward it would stay so."""
    return None if reshard_after_forward and training else reshard_after_forward


def _recompute_activations(model: nn.Module) -> None:
    able: Any = next((one for one in model.modules() if hasattr(one, "gradient_checkpointing_enable")), None)
    if able is None:
        raise ConfigError(
            f"gradient_checkpointing is on, and {type(model).__name__} has no gradient_checkpointing_enable(): give it "
            "one, as models of transformers have it, or switch the setting off"
        )
    able.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _global_norm(gradients: list[torch.Tensor]) -> float:
    """The 2-norm of all gradients together, in one collective. *Collective*."""
    if not gradients:
        return 0.0
    norms = torch._foreach_norm([local(one) for one in gradients], 2, torch.float32)
    total = torch.stack(norms).square().sum()
    first = next((one for one in gradients if isinstance(one, DTensor)), None)
    if first is not None:
        mesh = first.device_mesh
        dist.all_reduce(total, group=mesh["shard"].get_group() if mesh.ndim > 1 else mesh.get_group())
    return math.sqrt(float(total))
