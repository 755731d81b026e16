"""Moving weights and optimizer states between the device and the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightrft.strategy.deepspeed.parameters import is_partitioned

__all__ = ["load_optimizer", "load_weights", "offload_optimizer", "offload_weights"]


def offload_weights(engine: Any) -> None:
    """Move the weights of an engine to the CPU."""
    _move_weights(engine, torch.device("cpu"), offload=True)


def load_weights(engine: Any, device: torch.device) -> None:
    """Move the weights of an engine back to its device."""
    _move_weights(engine, device, offload=False)


def offload_optimizer(engine: Any) -> None:
    """Move the optimizer's states, the fp32 masters and the buffers of gradients to the CPU."""
    if engine.zero_use_cpu_optimizer():
        return  # there already, as adam_offload says
    states = _states_of_optimizer(engine)
    engine.offload_states(include=states, pin_memory=torch.cuda.is_available())
    if _moved_by_hand(engine):
        _move_states(engine, torch.device("cpu"))


def load_optimizer(engine: Any, device: torch.device) -> None:
    """Move them back to the device."""
    if engine.zero_use_cpu_optimizer():
        return
    _reload(engine, _states_of_optimizer(engine))
    if _moved_by_hand(engine):
        _move_states(engine, device)


def _move_weights(engine: Any, device: torch.device, *, offload: bool) -> None:
    for parameter in _beside_the_optimizer(engine):
        local = parameter.ds_tensor if is_partitioned(parameter) else parameter
        local.data = local.data.to(device)
        parameter.data = parameter.data.to(device)
    if engine.zero_optimization_stage() == 3 and engine.basic_optimizer is not None:
        _move_partitions(engine.optimizer, device)
        if not offload:
            engine.optimizer.checkpoint_event_epilogue()  # small parameters are whole again
    elif engine.basic_optimizer is not None:
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        if offload:
            engine.offload_states(include=[State.lp_params], pin_memory=torch.cuda.is_available())
        else:
            _reload(engine, [State.lp_params])


def _beside_the_optimizer(engine: Any) -> Iterator[Any]:
    """Parameters that DeepSpeed does not move: all of a model that is only evaluated, the frozen ones of another."""
    trained = engine.basic_optimizer is not None
    for parameter in engine.module.parameters():
        if not (trained and parameter.requires_grad):
            yield parameter


def _move_partitions(optimizer: Any, device: torch.device) -> None:
    """Move the weights of stage 3. DeepSpeed's own way mixes them up where several groups have an optimizer."""
    optimizer.empty_partition_cache()
    optimizer.lp_param_buffer.data = optimizer.lp_param_buffer.data.to(device)
    optimizer.fp16_partitioned_groups_flat.clear()
    optimizer._set_fp16_partitioned_groups_flat()
    offset = 0
    for partition in optimizer._get_parameter_partitions():
        partition.data = optimizer.lp_param_buffer.narrow(0, offset, partition.numel())
        offset += partition.numel()


def _states_of_optimizer(engine: Any) -> list[Any]:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

    if _moved_by_hand(engine):
        return [State.lp_grads, State.contiguous_grad_buffer]
    return [State.optim_states, State.hp_params, State.lp_grads, State.contiguous_grad_buffer]


def _moved_by_hand(engine: Any) -> bool:
    """At stage 3 DeepSpeed moves only the states of its own FusedAdam."""
    from deepspeed.ops.adam import FusedAdam

    return engine.zero_optimization_stage() == 3 and type(engine.basic_optimizer) is not FusedAdam


def _move_states(engine: Any, device: torch.device) -> None:
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        master.data = master.data.to(device)
    for states in engine.basic_optimizer.state.values():
        for key, value in states.items():
            if torch.is_tensor(value) and value.dim():
                states[key] = value.to(device)


def _reload(engine: Any, wanted: list[Any]) -> None:
    """Load some of what is offloaded; DeepSpeed itself loads all."""
    offloaded = engine.optimizer.offloaded_states
    engine.optimizer.offloaded_states = offloaded & set(wanted)
    engine.reload_states()
    engine.optimizer.offloaded_states = offloaded - set(wanted)
