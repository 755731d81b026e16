"""The actor's own transformers model, run by the fake engine on the weights that it was sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from lightrft.errors import ConfigError
from lightrft.sim.engine.drawing import Drawer, Step
from lightrft.sim.engine.forward import Forward
from lightrft.sim.engine.key_values import KeyValues, PrefixCache
from lightrft.sim.engine.language_model import LanguageModel
from lightrft.sim.engine.numbers import digest
from lightrft.sim.engine.samples import Drawn, Sample
from lightrft.strategy.utils.fingerprints import fingerprint

__all__ = ["TransformerModel", "checkpoint_tensors"]

_MOST_SEQUENCES = 256
"""Of one batch."""


class TransformerModel(LanguageModel):
    """A causal language model of transformers, computed in double precision.

    The order in which numbers are added depends on what else is in a batch. In double precision that shows far behind
    what decides about a token: so a completion is the same in every batch, and greedy ones are those of
    ``model.generate`` in single precision.

    Args:
        path: folder of the model: its configuration, and its weights if it has any.
        dtype: that the engine holds weights in; they are rounded to it.
        prefix_caching: whether prompts that were seen are taken from the prefix cache.

    Raises:
        ConfigError: the folder has no configuration of a causal language model.
    """

    def __init__(self, path: str, dtype: torch.dtype, *, prefix_caching: bool = True) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(path)
            with torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)  # type: ignore[no-untyped-call, unused-ignore]
        except (OSError, ValueError) as error:
            raise ConfigError(f"the fake engine cannot build the model in {path}: {error}") from error
        self._model = model.eval().requires_grad_(False)
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._tied = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
        self._prefixes = PrefixCache() if prefix_caching else None
        kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise ConfigError(
                f"the fake engine cannot run {path}, whose layers have {', '.join(sorted(kinds))}: use its hash mode"
            )
        self._forward = Forward(model)
        self.vocabulary = config.get_text_config().vocab_size
        self.ends = _ends(config, path)

    def shapes(self) -> Mapping[str, Size]:
        """See ``LanguageModel``."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def optional(self) -> frozenset[str]:
        """See ``LanguageModel``."""
        parameters = dict(self._model.named_parameters())
        return self._tied | {name for name in self._tensors if name not in parameters}

    def put(self, name: str, tensor: Tensor) -> None:
        """See ``LanguageModel``."""
        self._forward.forget()
        with torch.no_grad():
            self._tensors[name].copy_(tensor.detach().to(self._dtype))

    def drop(self) -> None:
        """See ``LanguageModel``."""
        self._forward.forget()
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(float("nan"))

    def fingerprint(self) -> str:
        """See ``LanguageModel``."""
        held = [(name, fingerprint(tensor.to(self._dtype))) for name, tensor in self._model.named_parameters()]
        return f"{digest(sorted(held)):016x}"

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

    def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """See ``LanguageModel``."""
        if any(sample.media for sample in samples):
            raise ConfigError("the fake engine in model mode reads no images or videos: use its hash mode")
        order = sorted(range(len(samples)), key=lambda row: len(samples[row].tokens))
        found: dict[int, Drawn] = {}
        with torch.inference_mode():
            for first in range(0, len(order), _MOST_SEQUENCES):
                rows = order[first : first + _MOST_SEQUENCES]
                found.update(zip(rows, self._draw_batch([samples[row] for row in rows]), strict=True))
        return [found[row] for row in range(len(samples))]

    def _draw_batch(self, samples: Sequence[Sample]) -> list[Drawn]:
        held, logits = self._of_prompts(samples)
        ends = [self._ends_of(sample) for sample in samples]
        drawer = Drawer(samples, ends)
        drawn: list[list[int]] = [[] for _ in samples]
        log_probs: list[list[tuple[float, ...]]] = [[] for _ in samples]
        reasons: dict[int, tuple[Any, int | str | None]] = {}
        active = list(range(len(samples)))
        while active:
            step = drawer.draw(logits, [drawn[row] for row in active])
            for row, token, *found in zip(active, *(each.tolist() for each in _columns(step)), strict=True):
                drawn[row].append(token)
                log_probs[row].append(tuple(found))
                if (reason := self._reason(samples[row], drawn[row], ends[row])) is not None:
                    reasons[row] = reason
            kept = [place for place, row in enumerate(active) if row not in reasons]
            if not kept:
                break
            tokens = step.tokens
            if len(kept) < len(active):
                held, drawer, tokens = held.select(torch.tensor(kept)), drawer.keep(kept), tokens[kept]
                active = [active[place] for place in kept]
            logits = self._forward.step(held, tokens)
        return [
            Drawn(
                tokens=tuple(drawn[row]),
                raw=tuple(raw for raw, _, _ in log_probs[row]),
                processed=tuple(processed for _, processed, _ in log_probs[row]),
                tempered=tuple(tempered for _, _, tempered in log_probs[row]),
                finish_reason=reasons[row][0],
                stop=reasons[row][1],
            )
            for row in range(len(samples))
        ]

    def _ends_of(self, sample: Sample) -> frozenset[int]:
        own = frozenset() if sample.params.ignore_eos else self.ends
        return own | frozenset(sample.params.stop_token_ids)

    def _reason(self, sample: Sample, drawn: list[int], ends: frozenset[int]) -> tuple[str, int | str | None] | None:
        params = sample.params
        if drawn[-1] in ends and len(drawn) > params.min_tokens:
            return "stop", drawn[-1] if drawn[-1] in params.stop_token_ids else None
        if len(drawn) > params.min_tokens and (found := self.stop_in(drawn, params.stop)) is not None:
            return "stop", found
        return ("length", None) if len(drawn) >= (params.max_tokens or 1) else None

    def _of_prompts(self, samples: Sequence[Sample]) -> tuple[KeyValues, Tensor]:
        """Keys and values, and the logits of the last token, of the prompts; each prompt is computed once."""
        room = max(len(one.tokens) for one in samples) + max(one.params.max_tokens or 1 for one in samples)
        several = list(dict.fromkeys(one.tokens for one in samples))
        cache: PrefixCache | dict[tuple[int, ...], Any] = self._prefixes or {}
        known = [tokens for tokens in several if tokens in cache]
        new = [tokens for tokens in several if tokens not in cache]
        if not known:
            held, logits = self._new(new, room)
        else:
            held, logits = self._remembered(known, room)
            if new:
                held, logits = _joined([(held, logits, known), (*self._new(new, room), new)], room)
        place = {tokens: row for row, tokens in enumerate([*known, *new])}
        rows = torch.tensor([place[one.tokens] for one in samples])
        return held.select(rows), logits[rows]

    def _new(self, prompts: Sequence[tuple[int, ...]], room: int) -> tuple[KeyValues, Tensor]:
        held, logits = self._forward.prompts(prompts, room)
        if self._prefixes is not None:
            for tokens, layers in zip(prompts, held.sequences([len(tokens) for tokens in prompts]), strict=True):
                if len(tokens) > 1:
                    self._prefixes.put(tokens, [(keys[:, :-1], values[:, :-1]) for keys, values in layers])
        return held, logits

    def _remembered(self, prompts: Sequence[tuple[int, ...]], room: int) -> tuple[KeyValues, Tensor]:
        """From the prefix cache all but the last token, which is computed with the present weights."""
        assert self._prefixes is not None
        held = KeyValues.of_sequences([self._prefixes[tokens] for tokens in prompts], room)
        return held, self._forward.step(held, torch.tensor([tokens[-1] for tokens in prompts]))


def _joined(
    parts: Sequence[tuple[KeyValues, Tensor, Sequence[tuple[int, ...]]]], room: int
) -> tuple[KeyValues, Tensor]:
    """Several batches as one."""
    layers = [one for held, _, prompts in parts for one in held.sequences([len(tokens) for tokens in prompts])]
    return KeyValues.of_sequences(layers, room), torch.cat([logits for _, logits, _ in parts])


def _columns(step: Step) -> tuple[Tensor, ...]:
    return step.tokens, step.raw, step.processed, step.tempered


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
