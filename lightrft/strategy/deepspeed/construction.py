"""Building models, and engines around them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.strategy.deepspeed import runtime
from lightrft.strategy.deepspeed.parameters import is_partitioned

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["build_engine", "cast", "partitioned_construction", "shard_group", "spread_over_group"]


@contextmanager
def partitioned_construction(settings: dict[str, Any], device: torch.device) -> Iterator[None]:
    """In this context every module is spread over the ranks as soon as it is built, as ZeRO-3 wants it. *Collective*.

    Parameters get the dtype of ``settings``; their first values, and all buffers, are computed as outside of the
    context. ``from_pretrained`` of transformers fills such modules from disk, one parameter whole at a time.
    """
    known = _known_to_transformers(settings)
    # Models import it as they are built, and it looks at torch.Tensor.__new__, which DeepSpeed replaces meanwhile.
    importlib.import_module("torch._dynamo")
    with runtime.launched(device), _zero_init(settings):
        yield
    del known  # transformers has a weak reference to it


def _zero_init(settings: dict[str, Any]) -> AbstractContextManager[Any]:
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    class CastsParameters(Init):  # type: ignore[misc]
        """DeepSpeed's own lets every new tensor have the dtype: the frequencies of rotary embeddings lose digits."""

        def _zero_init_param(self, parameter: torch.nn.Parameter) -> None:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
            super()._zero_init_param(parameter)

    return CastsParameters(config_dict_or_path=settings, tensor_overrides=[DeepSpeedTensorOverride.device])


def _known_to_transformers(settings: dict[str, Any]) -> Any:
    if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):
        return None
    integrations: Any = importlib.import_module("transformers.integrations")
    return integrations.HfDeepSpeedConfig(settings)


def build_engine(
    model: torch.nn.Module, settings: Mapping[str, Any], device: torch.device, optimizer: Optimizer | None = None
) -> Any:
    """DeepSpeed's engine around ``model``. *Collective*.

    Raises:
        ConfigError: the model was built for stage 3, and the settings are of another one.
    """
    import deepspeed

    stage = settings["zero_optimization"]["stage"]
    if stage != 3 and any(is_partitioned(parameter) for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} was built in init_model_context() at ZeRO 3, so it is spread over all ranks, and "
            "it is prepared to be whole on each: build it outside of the context, or leave shard_size at -1"
        )
    with runtime.launched(device), runtime.fp16_allowed() if "fp16" in settings else nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(settings))
    if stage == 3:
        runtime.launch_forward(model, device)
    return engine


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the weights ``dtype``; buffers, such as the frequencies of rotary embeddings, keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not is_partitioned(parameter):
            parameter.data = parameter.data.to(dtype)


def shard_group(shard_size: int) -> dist.ProcessGroup:
    """A new group of the ``shard_size`` consecutive ranks with this one. *Collective* of all ranks."""
    firsts = range(0, dist.get_world_size(), shard_size)
    groups: list[dist.ProcessGroup] = [dist.new_group(list(range(first, first + shard_size))) for first in firsts]
    return groups[dist.get_rank() // shard_size]


def spread_over_group(
    model: torch.nn.Module, settings: Mapping[str, Any], device: torch.device, group: dist.ProcessGroup
) -> None:
    """Spread ``model`` over the ranks of ``group``, so that they have all of it together. *Collective*.

    Raises:
        ConfigError: it is spread over all ranks already.
    """
    import deepspeed

    if any(is_partitioned(parameter) for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} was built in init_model_context() at ZeRO 3, so it is spread over all ranks: "
            f"build it outside of the context to spread it over {dist.get_world_size(group)} ranks"
        )
    with runtime.launched(device):
        deepspeed.zero.Init(module=model, data_parallel_group=group, config_dict_or_path=dict(settings))
