"""Attention and attention masks of a sequence-parallel model, in the form in which transformers calls them.

The model makes its masks itself, once a forward pass, and asks `make_mask` for them, which answers for the full
length; its layers then call `attend` with them. So sliding windows, padding and packing come from the model's own code
and that of its base attention, and a layer that is recomputed gets the mask of its own forward pass.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.strategy.utils.sequence_parallel.exchange import exchange

__all__ = ["ATTRIBUTE", "NAME", "Enabled", "FullSequence", "attend", "check_heads", "current", "make_mask", "register"]

NAME = "lightrft_ulysses"
"""What the configuration of an enabled model calls its attention."""

ATTRIBUTE = "_lightrft_sequence_parallel"
"""Where a module of an enabled model keeps its `Enabled`."""


class Enabled:
    """How one model is sequence-parallel. Copies of the model share it, since a process group cannot be copied.

    Attributes:
        group: the ranks that share each sequence.
        size: how many they are.
        config: the configuration of the model as it was, with the name of its own attention.
        base: that name: ``"sdpa"``, ``"eager"`` or one that begins with ``"flash_attention"``.
    """

    def __init__(self, group: dist.ProcessGroup, config: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.config = config
        self.base: str = config._attn_implementation

    def __deepcopy__(self, memo: dict[int, Any]) -> Enabled:
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class FullSequence:
    """What a forward pass knows of the whole sequence.

    Attributes:
        enabled: of the model.
        padding: which tokens are real, shape (batch, full length), bool; None if the model got no attention mask.
        packed: the number of the sequence to which each token belongs, shape (batch, full length); None if there is
            one sequence in each row.
    """

    enabled: Enabled
    padding: torch.Tensor | None
    packed: torch.Tensor | None = field(default=None)


current: ContextVar[FullSequence | None] = ContextVar("current", default=None)
"""That of the forward pass that is under way in this thread."""


def register() -> None:
    """Tell transformers of this attention; again is a no-op."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    *,
    mask_function: Callable[..., Any],
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    config: Any = None,  # noqa: ARG001 - replaced by that of the base attention
    **others: Any,
) -> Any:
    """The mask of the full sequence, as the base attention of the model wants it.

    Args:
        mask_function: which key a query sees, a function of (batch, head, query, key) indices. It must depend on
            nothing else, since this rank's tensors say nothing of the other slices.
        use_vmap: true if it is a function of the model's own making.
        allow_is_causal_skip: whether None may stand for a mask that is just causal.
        config: of the model.
        others: what else the base attention's mask takes. Lengths, offsets and the padding mask are this rank's, and
            are replaced by those of the full sequence.

    Raises:
        ConfigError: nothing is known of the full sequence, or the mask is one of the model's own making.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, packed_sequence_mask_function

    sequence = current.get()
    if sequence is None:
        raise ConfigError(
            "got a forward pass of a sequence-parallel model that did not start with a call of the model; expected "
            "model(...), not model.forward(...): call the model, or its wrapper"
        )
    if use_vmap:
        raise ConfigError(
            "got a model with an attention mask of its own making, which may depend on tensors of this rank; sequence "
            "parallelism knows causal masks, sliding windows, padding and packing: train this model with sp_size=1"
        )
    if sequence.packed is not None:
        mask_function = and_masks(packed_sequence_mask_function(sequence.packed), mask_function)
    length = others.pop("q_length") * sequence.enabled.size
    return ALL_MASK_ATTENTION_FUNCTIONS[sequence.enabled.base](
        **{
            **others,
            "q_length": length,
            "kv_length": length,
            "q_offset": 0,
            "kv_offset": 0,
            "attention_mask": sequence.padding,
            "mask_function": mask_function,
            "use_vmap": False,
            "allow_is_causal_skip": allow_is_causal_skip and sequence.packed is None,
            "config": sequence.enabled.config,
        }
    )


class _LocalHeads:
    """An attention module as the base attention shall see it: with this rank's heads, and the name of the base."""

    def __init__(self, module: torch.nn.Module, **others: Any) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of this rank's tokens to those of all ranks of the group.

    Key and value heads are repeated where there are fewer than ranks, as often as it takes.

    Args:
        module: the attention module.
        query: shape (batch, heads, local length, head size); key and value likewise, with their number of heads.
        key: see ``query``.
        value: see ``query``.
        attention_mask: what `make_mask` made for the full length.
        others: what the base attention takes.

    Returns:
        Shape (batch, local length, heads, head size), and no attention weights: no rank holds those of all heads.

    Raises:
        ConfigError: the model is not enabled, or asks for something that a slice of heads or tokens cannot give.
    """
    enabled: Enabled | None = module.__dict__.get(ATTRIBUTE)
    if enabled is None:
        raise ConfigError(f"got attention {NAME!r} in a model that is not enabled: choose it by enable(model, group)")
    _check(module, enabled, query, key, others)
    repeats = enabled.size // math.gcd(enabled.size, key.shape[1])
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    query, key, value = exchange([query, key, value], enabled.group)
    _check_mask(attention_mask, query.shape[2])
    others.pop("position_ids", None)  # of this rank's slice: the mask, or cu_seq_lens, say it of all
    heads = _LocalHeads(module, config=enabled.config, num_key_value_groups=query.shape[1] // key.shape[1])
    output, _ = _base(module, enabled.base)(heads, query, key, value, attention_mask, **others)
    return exchange([output], enabled.group)[0], None


def _base(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "eager":
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    for kind in type(module).__mro__:  # each model file has an eager attention of its own
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise ConfigError(
        f"got {type(module).__name__} with eager attention, but its module has no eager_attention_forward: "
        "use attn_implementation='sdpa'"
    )


def check_heads(name: str, heads: int, size: int) -> None:
    """Refuse a number of attention heads that ``size`` ranks cannot share evenly."""
    if heads % size:
        allowed = ", ".join(str(divisor) for divisor in range(1, heads + 1) if heads % divisor == 0)
        raise ConfigError(
            f"got sp_size {size} and {heads} attention heads in {name}; expected an sp_size that divides the heads: "
            f"choose one of {allowed}"
        )


def _check(
    module: torch.nn.Module, enabled: Enabled, query: torch.Tensor, key: torch.Tensor, others: dict[str, Any]
) -> None:
    name = type(module).__name__
    check_heads(name, query.shape[1], enabled.size)
    if query.shape[2] != key.shape[2]:
        raise ConfigError(
            f"got {query.shape[2]} queries and {key.shape[2]} keys in {name}; expected as many: sequence parallelism "
            "works without cache and without cross-attention; disable the model to generate"
        )
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        raise ConfigError(f"got {name}, which is not causal; sequence parallelism is for causal models: use sp_size=1")
    for argument in ("s_aux", "position_bias"):
        if others.get(argument) is not None:
            raise ConfigError(
                f"got {argument!r} in {name}, which has a value for each head; sequence parallelism does not slice "
                "it: use sp_size=1"
            )


def _check_mask(mask: Any, length: int) -> None:
    if mask is not None and mask.shape[-1] != length:
        raise ConfigError(
            f"got an attention mask for {mask.shape[-1]} keys, expected {length}, the full length: pass the attention "
            "mask of the slice, of shape (batch, local length), and let the model make the rest"
        )
