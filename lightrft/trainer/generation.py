"""Prompts in, samples out: what an iteration begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.utils.agreement import Ranks
from lightrft.trainer.experience import Images, Sample
from lightrft.trainer.scoring import never_drawn

if TYPE_CHECKING:
    from lightrft.datasets import Prompt
    from lightrft.strategy.requests import Completion
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.images import ImageReader

__all__ = ["Generation", "seed_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Generates for prompts, ``n`` times each.

    Attributes:
        strategy: whose engine generates.
        n: samples of each prompt.
        temperature: 0 is greedy.
        top_p: as in ``SamplingParams``.
        decode: token ids to text, where the engine gives none.
        reader: makes images what the model sees.
        forbidden: tokens that are never drawn.
        needs_log_probs: whether an engine that gives no log-probs of what it has drawn from is refused.
    """

    strategy: StrategyBase
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    decode: Callable[[Sequence[int]], str] | None = None
    reader: ImageReader | None = None
    forbidden: tuple[int, ...] = ()
    needs_log_probs: bool = False

    def __call__(self, prompts: Sequence[Prompt], seed: int) -> list[Sample]:
        """Samples of this rank's prompts, those of one prompt one after the other. *Collective*.

        Prompts, labels and images stay with their samples. Ranks of one sequence-parallel group have the same prompts,
        and get the same samples: the first of them generates. A prompt of more than ``prompt_max_len`` tokens,
        those of its images included, has no samples.

        Args:
            prompts: of this rank; any number, none included.
            seed: of what is drawn, the same on all ranks, for an engine that takes seeds.

        Raises:
            EngineStateError: generation failed, on some rank of the engine.
            StaleWeightsError: completions came of other weights than the engine was given last.
        """
        with Ranks().together("prompts were not read", EngineStateError):
            read = [(one, self._seen(one)) for one in prompts]
            fitting = [(one, seen) for one, seen in read if self._fits(one, seen)]
        mine = [one for one, _ in fitting] if self._generates else []
        completions = self.strategy.gather_and_generate(
            self._params(seed),
            all_prompt_token_ids=[list(one.token_ids) for one in mine],
            all_images=[list(one.images) for one in mine] if any(one.images for one in mine) else None,
        )
        if self.strategy.groups.sp is not None:
            completions = Ranks(self.strategy.groups.sp).gather(completions)[0]
        with Ranks().together("no samples came of completions", EngineStateError):
            if len(completions) != self.n * len(fitting):
                raise EngineStateError(f"{len(completions)} came for {len(fitting)} prompts, {self.n} samples each")
            self._check_versions(completions)
            return [self._sample(*fitting[place // self.n], one) for place, one in enumerate(completions)]

    @property
    def _generates(self) -> bool:
        """Whether this rank speaks for its sequence-parallel group."""
        return self.strategy.get_rank() % self.strategy.groups.sp_size == 0

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.strategy.config.generate_max_len,
            seed=seed if self.strategy.inference_engine.takes_seeds else None,
            logprobs=True,
            logit_bias=never_drawn(self.forbidden),
        )

    def _sample(self, prompt: Prompt, seen: Images, one: Completion) -> Sample:
        return Sample(
            prompt=prompt.prompt,
            response=self._text(one),
            label=prompt.label,
            index=prompt.index,
            prompt_token_ids=tuple(one.prompt_token_ids),
            output_token_ids=tuple(one.output_token_ids),
            engine_log_probs=self._log_probs(one),
            truncated=one.finish_reason == "length",
            weight_version=one.weight_version,
            images=seen,
        )

    def _text(self, one: Completion) -> str:
        if one.text is not None:
            return one.text
        return "" if self.decode is None else self.decode(one.output_token_ids)

    def _log_probs(self, one: Completion) -> tuple[float, ...] | None:
        """Those of the distribution that was drawn from; ``None`` if the engine gave others."""
        untouched = self.temperature == 1 and not self.forbidden
        if one.log_probs is not None and (one.log_probs_mode == "processed" or untouched):
            return tuple(one.log_probs)
        if self.needs_log_probs:
            raise ConfigError(
                "importance_cap needs the log-probs that the engine has drawn with, and it gives others at temperature="
                f"{self.temperature}: let it give processed ones"
            )
        return None

    def _check_versions(self, completions: Sequence[Completion]) -> None:
        newest = self.strategy.inference_engine.weight_version
        old = {one.weight_version for one in completions} - {newest}
        if old:
            raise StaleWeightsError(
                f"some came of the weights of version {min(old)}, and the engine was given version {newest}: it has "
                "answered with what it held before"
            )

    def _seen(self, prompt: Prompt) -> Images:
        if not prompt.images:
            return {}
        if self.reader is None:
            raise ConfigError("a prompt has images: give the trainer a processor, which makes them what the model sees")
        return self.reader(prompt.images)

    def _fits(self, prompt: Prompt, seen: Images) -> bool:
        """Whether a prompt is short enough, with the tokens that its images become."""
        images = len(prompt.images)
        more = self.reader.tokens(seen, images) - images if self.reader is not None and images else 0
        return len(prompt.token_ids) + more <= self.strategy.config.prompt_max_len


def seed_of(*parts: int) -> int:
    """A seed that follows from ``parts``, unlike that of any others: 0 to 2**31 - 1."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1
