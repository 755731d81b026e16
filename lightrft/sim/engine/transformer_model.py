"""The actor's own transformers model, run by the fake engine on the weights that it was sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Size, Tensor

from lightrft.errors import ConfigError
from lightrft.sim.engine.decoding import Decoding
from lightrft.sim.engine.drawing import Drawer, Step
from lightrft.sim.engine.key_values import PrefixCache
from lightrft.sim.engine.language_model import LanguageModel
from lightrft.sim.engine.network import Network
from lightrft.sim.engine.numbers import digest
from lightrft.sim.engine.prompts import Prompts
from lightrft.sim.engine.vision import Patches
from lightrft.sim.engine.weights import Weights
from lightrft.strategy.utils.checkpoint_form import in_checkpoint_form
from lightrft.strategy.utils.fingerprints import fingerprint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightrft.sim.engine.samples import Drawn, Medium, Sample

__all__ = ["TransformerModel", "checkpoint_tensors"]

_MOST_SEQUENCES = 256
"""Of one batch."""

_CROWDED = 0.85
"""Sequences that are complete leave a batch once no more than this share of it goes on: leaving copies the others."""


class TransformerModel(LanguageModel):
    """A causal language model of transformers, computed in single precision.

    The order in which numbers are added depends on what else is in a batch, and so does rounding. Where it might decide
    about a token, the logits are computed again, of that sequence alone and in double precision: so the tokens of a
    completion are the same in every batch.

    Args:
        path: folder of the model: its configuration, and its weights if it has any.
        dtype: that the engine holds weights in; they are rounded to it.
        prefix_caching: whether prompts that were seen are taken from the prefix cache.

    Raises:
        ConfigError: the folder has no configuration of a causal language model.
    """

    def __init__(self, path: str, dtype: torch.dtype, *, prefix_caching: bool = True) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        try:
            config = AutoConfig.from_pretrained(path)
            sees = hasattr(config, "vision_config")
            with torch.random.fork_rng(devices=[]):
                model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(
                    config, dtype=torch.float32
                )  # type: ignore[no-untyped-call, unused-ignore]
        except (OSError, ValueError) as error:
            raise ConfigError(f"the fake engine cannot build the model in {path}: {error}") from error
        kinds = _kinds(config.get_text_config()) - {"full_attention"}
        if kinds:
            raise ConfigError(
                f"the fake engine cannot run {path}, whose layers have {', '.join(sorted(kinds))}: use its hash mode"
            )
        self._model = model.eval().requires_grad_(False)
        self._prefixes = PrefixCache() if prefix_caching else None
        self._network = Network(model, remembers=True)
        self._patches = Patches(path, config) if sees else None
        self._names = _in_checkpoint(model)
        self._optional = _optional(model, self._names)
        self._weights = Weights(model, dtype, self._names.__getitem__)
        self._prompts = Prompts(self._network, self._prefixes)
        self._exactly: Prompts | None = None
        self._fingerprint = ""
        self.vocabulary = config.get_text_config().vocab_size
        self.ends = _ends(config, path)

    def shapes(self) -> Mapping[str, Size]:
        """See ``LanguageModel``."""
        return {name: tensor.shape for name, tensor in self._weights.held.items()}

    def optional(self) -> frozenset[str]:
        """See ``LanguageModel``."""
        return self._optional

    def put(self, name: str, tensor: Tensor) -> None:
        """See ``LanguageModel``."""
        self._weights.put(name, tensor)
        self._fingerprint = ""

    def drop(self) -> None:
        """See ``LanguageModel``."""
        self._weights.drop()
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """See ``LanguageModel``."""
        if not self._fingerprint:
            held = [
                (name, fingerprint(self._weights.held[self._names[name]])) for name, _ in self._model.named_parameters()
            ]
            self._fingerprint = f"{digest(sorted(held)):016x}"
        return self._fingerprint

    def module(self) -> torch.nn.Module:
        """The model of transformers."""
        found: torch.nn.Module = self._model
        return found

    def forget(self) -> None:
        """See ``LanguageModel``."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def forget_media(self) -> None:
        """See ``LanguageModel``."""
        self._network.features.forget()

    def medium(self, kind: str, given: Any) -> Medium:
        """See ``LanguageModel``."""
        if self._patches is None:
            raise ConfigError(f"this model takes no {kind}s")
        with torch.inference_mode():
            return self._patches.medium(kind, given)

    def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """See ``LanguageModel``."""
        order = sorted(range(len(samples)), key=lambda row: len(samples[row].tokens))
        found: dict[int, Drawn] = {}
        with torch.inference_mode():
            self._weights.refresh()
            for first in range(0, len(order), _MOST_SEQUENCES):
                rows = order[first : first + _MOST_SEQUENCES]
                found.update(zip(rows, self._draw_batch([samples[row] for row in rows]), strict=True))
        return [found[row] for row in range(len(samples))]

    def _draw_batch(self, samples: Sequence[Sample]) -> list[Drawn]:
        ends = [self._ends_of(sample) for sample in samples]
        late = [self.ends | frozenset(sample.params.stop_token_ids) for sample in samples]
        decoding, drawer = Decoding(samples, ends, self.stop_in), Drawer(samples, late)
        held, logits = self._prompts.computed(samples, decoding.most)
        rows = np.arange(len(samples))
        for count in range(decoding.most):
            step = drawer.draw(logits, decoding.tokens[rows, :count])
            if bool(step.close.any()):
                step = self._drawn_again(samples, rows, decoding, drawer, step)
            going, tokens = decoding.add(rows, step), step.tokens
            if not going.any():
                break
            if going.mean() <= _CROWDED:
                kept = held.keep(torch.from_numpy(going))
                rows, drawer, tokens = rows[kept.numpy()], drawer.keep(kept.tolist()), tokens[kept]
            logits = self._network.step(held, tokens)
        return decoding.drawn()

    def _drawn_again(
        self, samples: Sequence[Sample], rows: NDArray[np.int64], decoding: Decoding, drawer: Drawer, step: Step
    ) -> Step:
        """Replace the tokens about which rounding might have decided, by what double precision gives."""
        exact = self._weights.exact()
        if self._exactly is None:
            self._exactly = Prompts(Network(exact), None)
        certain = {}
        for place in step.close.nonzero().flatten().tolist():
            row = int(rows[place])
            if decoding.is_open(row):
                drawn = decoding.tokens[row : row + 1, : decoding.count]
                sequence = replace(samples[row], tokens=(*samples[row].tokens, *drawn[0].tolist()))
                _, logits = self._exactly.computed([sequence], 1)
                certain[place] = drawer.keep([place]).draw(logits, drawn)
        return step.replaced(certain)

    def _ends_of(self, sample: Sample) -> frozenset[int]:
        own = frozenset() if sample.params.ignore_eos else self.ends
        return own | frozenset(sample.params.stop_token_ids)


def _kinds(config: Any) -> set[str]:
    """Of attention, of all layers."""
    named = getattr(config, "layer_types", None)
    if named is None and getattr(config, "sliding_window", None):
        return {"sliding_attention"}
    return set(named or ())


def _in_checkpoint(model: torch.nn.Module) -> dict[str, str]:
    """What each weight of a model is called in its checkpoint.

    Raises:
        ConfigError: a checkpoint has one of them as several, or together with others.
    """
    marks = {name: torch.zeros(1) for name in model.state_dict()}
    names = {id(mark): name for name, mark in in_checkpoint_form(model, marks.items())}
    other = [name for name, mark in marks.items() if id(mark) not in names]
    if other:
        raise ConfigError(
            f"the fake engine cannot run this model, whose {other[0]} a checkpoint has in another form: use its hash "
            "mode"
        )
    return {name: names[id(mark)] for name, mark in marks.items()}


def _optional(model: Any, names: Mapping[str, str]) -> frozenset[str]:
    """What weights of a model that are tied to others, or no parameters, are called in its checkpoint."""
    tied = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
    parameters = dict(model.named_parameters())
    return frozenset(theirs for ours, theirs in names.items() if ours in tied or ours not in parameters)


def _ends(config: Any, path: str) -> frozenset[int]:
    """End tokens, of the generation configuration if there is one."""
    file = Path(path) / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    if found is None:
        found = config.get_text_config().eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


def checkpoint_tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """The weights in the safetensors files of a folder, one at a time; none if it has no such file."""
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                yield name, opened.get_tensor(name)
