"""Models that only rank 0 builds with storage, until they are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.errors import ConfigError, LightRFTError
from lightrft.strategy.utils.agreement import Ranks

__all__ = ["Materializer", "without_storage"]

_WHERE = {
    "_commit_hash",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
}
"""Arguments of ``from_pretrained`` that say where files are."""

_LOADING = {
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "adapter_name",
    "device_map",
    "disable_mmap",
    "ignore_mismatched_sizes",
    "key_mapping",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "output_loading_info",
    "state_dict",
    "use_safetensors",
    "variant",
    "weights_only",
}
"""Arguments that say how weights are loaded."""


@contextmanager
def without_storage() -> Iterator[None]:
    """Rank 0 builds as always, the others on the meta device; ``from_pretrained`` reads weights on rank 0 alone.

    At the end all ranks have the random state of rank 0, as if all had built. *Collective*.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    with Ranks().together("the model was not built", LightRFTError):
        if dist.get_rank() == 0:
            yield
        else:
            with torch.device("meta"), _pretrained_without_storage():
                yield
    state = torch.get_rng_state()
    torch.set_rng_state(_from_rank_0(state, torch.device(_device_type())).cpu())


def _device_type() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def _pretrained_without_storage() -> Iterator[None]:
    """Transformers refuses ``from_pretrained`` on the meta device: build from the configuration instead."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        yield
        return
    loads = PreTrainedModel.__dict__["from_pretrained"]
    patched: Any = PreTrainedModel
    patched.from_pretrained = classmethod(_built_from_config)
    try:
        yield
    finally:
        patched.from_pretrained = loads


def _built_from_config(cls: Any, path: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> nn.Module:
    if kwargs.get("quantization_config") is not None:
        raise ConfigError("a quantized model cannot be built with meta_init: use init_model_context() without it")
    wants_info = kwargs.get("output_loading_info", False)
    where = {name: kwargs.pop(name) for name in _WHERE & kwargs.keys()}
    about_model = {name: value for name, value in kwargs.items() if name not in _LOADING}
    chosen = {name: about_model.pop(name) for name in ("attn_implementation",) if name in about_model}
    dtype = about_model.pop("dtype", about_model.pop("torch_dtype", None))
    chosen |= {} if dtype in {None, "auto"} else {"dtype": dtype}
    if config is None or isinstance(config, str):
        loads = cls.config_class.from_pretrained
        config, about_model = loads(config or path, return_unused_kwargs=True, **where, **about_model)
        about_model = {name: value for name, value in about_model.items() if name not in _WHERE}
    model: nn.Module = cls._from_config(config, *args, **chosen, **about_model).eval()
    return (model, {}) if wants_info else model  # type: ignore[return-value]


class Materializer:
    """Gives a model that was built without storage on some ranks the tensors of rank 0, part by part. *Collective*.

    Buffers, and tensors that modules keep as plain attributes, come at once; parameters when ``fill`` is called.

    Args:
        model: built by all ranks alike.
        device: where the tensors will be.

    Raises:
        ConfigError: the ranks have built different models.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._model = model
        self._waiting = dict(model.named_parameters())
        others = _others(model)
        tensors = [*self._waiting.values(), *(tensor for _, _, tensor in others)]
        dtypes = self._agreed_dtypes([*self._waiting, *(name for _, name, _ in others)], tensors)
        self._dtypes = dict(zip(self._waiting, dtypes, strict=False))
        self._fill_others(others, dtypes[len(self._waiting) :])

    @classmethod
    def is_needed(cls, model: nn.Module, device: torch.device) -> bool:
        """Whether any rank has a tensor without storage. *Collective*."""
        bare = any(tensor.is_meta for _, _, tensor in _others(model)) or any(one.is_meta for one in model.parameters())
        return _any(bare, device)

    def fill(self, unit: nn.Module) -> None:
        """Give the parameters of ``unit`` that have no storage yet the values of rank 0; tied ones stay one."""
        inside = {id(one) for one in unit.parameters()}
        mine = [name for name, one in self._waiting.items() if id(one) in inside]
        new: dict[int, nn.Parameter] = {}
        for name in mine:
            old = self._waiting.pop(name)
            data = _from_rank_0(old.detach(), self._device, self._dtypes[name])
            new[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
        for module in self._model.modules():
            for key, held in module._parameters.items():
                if id(held) in new:
                    module._parameters[key] = new[id(held)]

    def _agreed_dtypes(self, names: list[str], tensors: list[torch.Tensor]) -> list[torch.dtype]:
        """The dtypes that rank 0 has: a pretrained model gets them from its files, which the others do not read."""
        mine = [(name, tuple(tensor.shape)) for name, tensor in zip(names, tensors, strict=True)]
        told: list[Any] = [(mine, [tensor.dtype for tensor in tensors])]
        dist.broadcast_object_list(told, src=0, device=self._device)
        shapes, dtypes = told[0]
        if _any(mine != shapes, self._device):
            odd = sorted({name for name, _ in set(mine) ^ set(shapes)})
            where = f", this one differs from rank 0 in {', '.join(odd[:3])}" if odd else ""
            raise ConfigError(
                f"the ranks have built different models ({type(self._model).__name__}{where}): build the same one on "
                "every rank, in strategy.init_model_context(meta_init=True)"
            )
        agreed: list[torch.dtype] = dtypes
        return agreed

    def _fill_others(self, others: list[tuple[dict[str, Any], str, torch.Tensor]], dtypes: list[torch.dtype]) -> None:
        done: dict[int, torch.Tensor] = {}
        for (holder, name, tensor), dtype in zip(others, dtypes, strict=True):
            if id(tensor) not in done:
                done[id(tensor)] = _from_rank_0(tensor, self._device, dtype)
            holder[name] = done[id(tensor)]


def _any(mine: bool, device: torch.device) -> bool:
    """Whether it is so on any rank. *Collective*."""
    flag = torch.tensor([float(mine)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _others(model: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    holders = [holder for module in model.modules() for holder in (module._buffers, vars(module))]
    return [
        (holder, name, value)
        for holder in holders
        for name, value in holder.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
    ]


def _from_rank_0(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of rank 0. *Collective*."""
    if dist.get_rank() == 0:
        data = tensor.to(device).contiguous()
    else:
        data = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
    dist.broadcast(data, src=0)
    return data
