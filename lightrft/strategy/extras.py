"""Names the extra to install when an optional package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightrft.errors import ConfigError

__all__ = ["naming_extras"]

_EXTRAS = {
    "PIL": "data",
    "accelerate": "deepspeed",
    "datasets": "data",
    "deepspeed": "deepspeed",
    "matplotlib": "plots",
    "peft": "train",
    "pyarrow": "data",
    "safetensors": "train",
    "sglang": "sglang",
    "tensorboard": "plots",
    "tqdm": "train",
    "transformers": "train",
    "vllm": "vllm",
    "yaml": "train",
}
"""The extra of this project that brings a package."""


@contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Turn the failed import of an optional package into an error that names the extra which brings it.

    Args:
        what: what needs the package, as the message begins.

    Raises:
        ConfigError: in place of the ``ModuleNotFoundError`` of such a package, and caused by it. Every other error
            passes.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS or error.name != package:
            raise
        command = f'pip install "lightrft[{_EXTRAS[package]}]"'
        raise ConfigError(f"{what} needs the package {package}, which is not installed: {command}") from error
