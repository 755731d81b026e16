"""Sequence parallelism of one transformers model: on and off."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.strategy.utils.sequence_parallel import attention
from lightrft.strategy.utils.sequence_parallel.attention import ATTRIBUTE, NAME, Enabled, FullSequence
from lightrft.strategy.utils.sequence_parallel.exchange import gather_sequence

__all__ = ["disable", "enable", "group_of"]

_BASES = ("sdpa", "eager", "flash_attention")
_LAYERS = {"full_attention", "sliding_attention"}
_HOOKS = "_lightrft_sequence_parallel_hooks"


def enable(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Let ``model`` work on slices of sequences, of which each rank of ``group`` holds one.

    From now on it takes what `SequenceParallelProcessor.preprocess` returns. Its weights, its class and its own
    attention (sdpa, eager, flash) stay; other models that were built from the same configuration object are not
    touched. It may be enabled before or after it is sharded.

    Args:
        model: a transformers model, or anything around some: an engine of DeepSpeed, a model sharded by FSDP2, one
            with PEFT adapters, a module with a value head. Models in it are found.
        group: consecutive ranks that get the same data. With one rank nothing is done.

    Raises:
        ConfigError: there is no transformers model; ``sp_size`` does not divide its attention heads; it mixes tokens
            elsewhere than in causal attention (linear attention, encoders); it is enabled already with another group.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    models = _models(model)
    for owners in models:
        _check_model(owners, size, group)
    attention.register()
    for owners in models:
        if ATTRIBUTE not in owners[-1].__dict__:
            _enable(owners, group)


def disable(model: torch.nn.Module) -> None:
    """Undo `enable`: full sequences again, by the model's own attention. A model that is not enabled stays as it is."""
    for owners in _models(model):
        enabled = owners[-1].__dict__.get(ATTRIBUTE)
        if enabled is None:
            continue
        owners[-1].config._attn_implementation = enabled.base
        for module in owners[0].modules():
            module.__dict__.pop(ATTRIBUTE, None)
            for hook in module.__dict__.pop(_HOOKS, ()):
                hook.remove()


def group_of(model: torch.nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share each sequence of ``model``, or of the first enabled model in it; ``None`` if none is."""
    found = (module.__dict__[ATTRIBUTE] for module in model.modules() if ATTRIBUTE in module.__dict__)
    enabled: Enabled | None = next(found, None)
    return None if enabled is None else enabled.group


def _models(model: torch.nn.Module) -> list[list[Any]]:
    """Each transformers model in ``model``: from the outermost part to the decoder, which makes masks."""
    from transformers import PreTrainedModel

    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not found:
        raise ConfigError(
            f"got {type(model).__name__}, in which there is no transformers model; sequence parallelism changes the "
            "attention of transformers models: pass one, or use sp_size=1"
        )
    parts = {id(owner): {id(module) for module in owner.modules()} for owner in found}
    decoders = [owner for owner in found if sum(id(other) in parts[id(owner)] for other in found) == 1]
    return [[owner for owner in found if id(decoder) in parts[id(owner)]] for decoder in decoders]


def _check_model(owners: list[Any], size: int, group: dist.ProcessGroup) -> None:
    decoder, config = owners[-1], owners[-1].config
    name = type(owners[0]).__name__
    enabled = decoder.__dict__.get(ATTRIBUTE)
    if enabled is not None:
        if enabled.group is not group:
            raise ConfigError(f"got {name}, which is enabled with another group: disable it first")
        return
    parts = {part for owner in owners for part in owner.config.sub_configs}
    if parts or config.is_encoder_decoder:
        raise ConfigError(
            f"got {name}, which has several parts ({', '.join(sorted(parts)) or 'encoder, decoder'}); sequence "
            "parallelism is for decoders of text: use sp_size=1"
        )
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if others or decoder._is_stateful:
        raise ConfigError(
            f"got {name} with layers of type {', '.join(sorted(others)) or 'recurrent'}; sequence parallelism knows "
            f"{', '.join(sorted(_LAYERS))}: use sp_size=1"
        )
    base = config._attn_implementation
    if not decoder._supports_attention_backend or not base.startswith(_BASES):
        raise ConfigError(
            f"got {name} with attention {base!r}; expected one of {', '.join(_BASES)}, called through the attention "
            "interface of transformers: choose it by attn_implementation, or use sp_size=1"
        )
    attention.check_heads(name, config.num_attention_heads, size)


def _enable(owners: list[Any], group: dist.ProcessGroup) -> None:
    decoder = owners[-1]
    shared = decoder.config
    enabled = Enabled(group, shared)
    own = copy.copy(shared)  # another model, even one of another simulated rank, may have been built from this object
    own._attn_implementation = NAME
    for module in owners[0].modules():
        if module.__dict__.get("config") is shared:
            module.config = own
            module.__dict__[ATTRIBUTE] = enabled
    decoder.__dict__[_HOOKS] = [
        decoder.register_forward_pre_hook(_see_full_sequence, with_kwargs=True),
        decoder.register_forward_hook(_forget_full_sequence, always_call=True),
    ]
    if owners[0] is not decoder:
        owners[0].__dict__[_HOOKS] = [owners[0].register_forward_pre_hook(_refuse_labels, with_kwargs=True)]


def _refuse_labels(model: torch.nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ConfigError(
            f"got labels in {type(model).__name__}, which would shift them within the slice and lose the target at "
            "its end: compute the loss from gathered log-probs, or pass shift_labels of preprocess beside them"
        )


def _see_full_sequence(
    decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gather what masks need, once for all layers.

    The decoder always gets an attention mask, so that it does not look for packed sequences in its slice.
    """
    call = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
    enabled: Enabled = decoder.__dict__[ATTRIBUTE]
    positions, mask = _checked(decoder, call)
    told = gather_sequence(
        torch.stack([positions] if mask is None else [positions, mask.to(positions)], -1), enabled.group
    ).unbind(-1)
    packed = None if len(told) > 1 else _packed(told[0])
    padding = told[1].bool() if len(told) > 1 else None
    attention.current.set(FullSequence(enabled=enabled, padding=padding, packed=packed))
    call["attention_mask"] = torch.ones_like(positions) if mask is None else mask
    if packed is not None and enabled.base.startswith("flash_attention"):
        call.update(_boundaries(packed))
    return (), call


def _forget_full_sequence(*_: Any) -> None:
    attention.current.set(None)


def _checked(decoder: torch.nn.Module, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Position ids, shape (batch, local length), and the attention mask of that shape or None."""
    name = type(decoder).__name__
    if call.get("past_key_values") is not None:
        raise ConfigError(f"got past_key_values in {name}, which is sequence-parallel: disable(model) to generate")
    tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    batch, length = tokens.shape[:2]
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if positions is None or positions.shape not in {(1, length), (batch, length)}:
        got = "none" if positions is None else f"shape {tuple(positions.shape)}"
        raise ConfigError(
            f"got position_ids of {got} in {name}, expected shape {(batch, length)}: a slice does not know its place "
            "in the sequence; pass those that preprocess returns"
        )
    if mask is not None and mask.shape != (batch, length):
        raise ConfigError(
            f"got an attention mask of shape {tuple(mask.shape)} in {name}, expected {(batch, length)}: pass the one "
            "that preprocess returns"
        )
    return positions.expand(batch, -1), mask


def _packed(positions: torch.Tensor) -> torch.Tensor | None:
    """The number of the sequence of each token, shape (batch, length); None if no position restarts."""
    restarts = torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1
    return restarts.cumsum(1) if restarts.any() else None


def _boundaries(packed: torch.Tensor) -> dict[str, Any]:
    """Where sequences begin, as flash attention takes it: positions in the rows laid end to end."""
    first = torch.diff(packed, dim=1, prepend=packed[:, :1] - 1) != 0
    begins = first.flatten().nonzero().flatten()
    offsets = torch.cat([begins, begins.new_tensor([packed.numel()])]).to(torch.int32)
    longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
