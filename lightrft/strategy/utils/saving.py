"""Writing weights for ``from_pretrained``, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["OUTSIDE", "WEIGHTS", "persistent_buffers", "save_pretrained"]

WEIGHTS = "model.safetensors"
"""Weights of a model that cannot save itself."""

OUTSIDE = "outside.safetensors"
"""Weights of a module around a transformers model, such as the value head of a critic."""


def save_pretrained(
    module: nn.Module,
    parameters: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Any,
    output_dir: str,
    ranks: Ranks,
    **kwargs: Any,
) -> None:
    """Write the weights of ``module``, its configuration and the tokenizer. *Collective*.

    Rank 0 writes, and holds what it writes in host memory. Of a PEFT model the adapters are written, of a transformers
    model what its ``save_pretrained`` writes, of anything else ``model.safetensors``. If ``module`` holds a PEFT or
    transformers model, that one is written so that it loads on its own; weights around it go to
    ``outside.safetensors``, under their names in ``module``.

    Args:
        module: with the names that the model had before it was prepared.
        parameters: whole ones, one after the other, each name once; every rank goes through all of them.
        tokenizer: or a processor; ``None`` for none.
        output_dir: is made.
        ranks: all ranks that have the module.
        kwargs: of ``save_pretrained`` of the model.

    Raises:
        CheckpointError: rank 0 could not write.
    """
    writes = ranks.rank == 0
    prefix, model = savable(module)
    kept = _kept_by(model)
    with ranks.together(f"the model was not saved in {output_dir}"):
        weights = _copies(
            parameters, lambda name: writes and (not name.startswith(prefix) or kept(name.removeprefix(prefix)))
        )
        if writes:
            weights |= {name: value.detach().to("cpu", copy=True) for name, value in persistent_buffers(module).items()}
            inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            outside = {name: value for name, value in weights.items() if not name.startswith(prefix)}
            _write(model, inside, outside, Path(output_dir), kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)


def _copies(parameters: Iterable[tuple[str, torch.Tensor]], wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Those that are wanted, in host memory. *Collective*: what fails on a rank is raised when it went through all."""
    copies: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    for name, tensor in parameters:
        try:
            if failure is None and wanted(name):
                copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
        except Exception as error:  # noqa: BLE001 - it is raised below
            failure = error
            copies.clear()
    if failure is not None:
        raise failure
    return copies


def savable(module: nn.Module) -> tuple[str, nn.Module | None]:
    """The outermost model inside that can save itself, and the beginning of its parameters' names; or ``""``, none."""
    for name, one in module.named_modules():
        if callable(getattr(one, "save_pretrained", None)):
            return f"{name}." if name else "", one
    return "", None


def _kept_by(model: nn.Module | None) -> Any:
    """Which parameters are written: of a PEFT model the adapters, and what is trained beside them."""
    adapters = getattr(model, "peft_config", None)
    if model is None or not adapters:
        return lambda _: True
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return lambda name: name in trained or not set(adapters).isdisjoint(name.split("."))


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to the state of ``module``, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, one in module.named_modules()
        for name, buffer in one._buffers.items()
        if buffer is not None and name not in one._non_persistent_buffers_set
    }


def _write(
    model: Any, inside: dict[str, torch.Tensor], outside: dict[str, torch.Tensor], folder: Path, kwargs: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if outside:
        save_file(outside, folder / OUTSIDE, metadata={"format": "pt"})
    if model is None:
        save_file(inside, folder / WEIGHTS, metadata={"format": "pt"})
        return
    dtype = next((str(one.dtype).removeprefix("torch.") for one in inside.values() if one.is_floating_point()), None)
    if getattr(model, "peft_config", None):
        model.save_pretrained(folder, state_dict=inside, **kwargs)
        return
    kept = getattr(model.config, "dtype", dtype)
    try:
        model.save_pretrained(folder, state_dict=inside, **kwargs)
        if getattr(model.config, "dtype", dtype) != dtype:
            model.config.dtype = dtype  # that of the file, not that in which it is trained
            model.config.save_pretrained(folder)
    finally:
        if getattr(model.config, "dtype", kept) != kept:
            model.config.dtype = kept
