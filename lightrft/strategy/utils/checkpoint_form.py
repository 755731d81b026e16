"""Parameters of a model as its checkpoint has them: adapters merged, names and layouts of the files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lightrft.strategy.utils import adapters
from lightrft.strategy.utils.saving import persistent_buffers, savable

__all__ = ["in_checkpoint_form", "keep_used_conversions"]

Named = tuple[str, Tensor]


def in_checkpoint_form(
    model: nn.Module, parameters: Iterable[Named], *, buffers: Collection[str] = ()
) -> Iterator[Named]:
    """``parameters`` of ``model`` as an engine loads them, each as soon as all that it is made of has come.

    Adapters are merged as ``adapters.merged`` says. Names, and layouts that transformers changes when it loads a model,
    are those of the files.

    Args:
        model: of transformers, perhaps with adapters of PEFT, or one that has such a model inside: what is outside of
            it is left out. Of any other model parameters stay as they are.
        parameters: names of the model and whole tensors.
        buffers: names of a checkpoint. Buffers of ``model`` that belong to its state and have one of them come last.

    Raises:
        WeightSyncError: adapters cannot be merged, or were not sent whole.
    """
    prefix, inner = savable(model)
    own: Iterable[Named] = (
        (name.removeprefix(prefix), tensor) for name, tensor in parameters if name.startswith(prefix)
    )
    if inner is not None and getattr(inner, "peft_config", None):
        own = adapters.merged(inner, own)
        inner = inner.get_base_model()  # type: ignore[operator]
    revert = _reverting(inner)
    for name, tensor in own:
        yield from revert(name, tensor)
    for name, tensor in persistent_buffers(inner).items() if inner is not None and buffers else ():
        yield from ((one, value) for one, value in revert(name, tensor) if one in buffers)


def keep_used_conversions(model: nn.Module) -> None:
    """Let models of transformers forget conversions of names that loading them did not use.

    Loading without ZeRO-3 does so. With it, all that are known would be undone when the model is saved or sent, and
    give names that no checkpoint has.
    """
    for module in model.modules():
        known = vars(module).get("_weight_conversions")
        if known:
            module._weight_conversions = [one for one in known if one.was_used()]  # type: ignore[assignment]


def _reverting(model: nn.Module | None) -> Any:
    """From one parameter to what the checkpoint has of it."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # an older version, which changes names alone, or none
        return lambda name, tensor: [(name, tensor)]
    nothing: dict[str, Tensor] = {}
    if (
        not isinstance(model, PreTrainedModel)
        or getattr(model, "_weight_conversions", None) == []
        or revert_weight_conversion(model, nothing) is nothing
    ):  # to find that out for each parameter would take longer than to send it
        return lambda name, tensor: [(name, tensor)]
    return lambda name, tensor: revert_weight_conversion(model, {name: tensor}).items()
