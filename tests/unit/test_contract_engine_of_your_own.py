"""An engine that is neither vLLM nor SGLang, held to the contracts as its own tests would do it."""

import dataclasses

import pytest
import torch

from lightrft.errors import ConfigError, WeightSyncError
from lightrft.models import tiny
from lightrft.sim.contracts import engine as engine_contract
from lightrft.sim.contracts import weight_sync
from lightrft.sim.engine.samples import Sample
from lightrft.sim.engine.transformer_model import TransformerModel, checkpoint_tensors
from lightrft.strategy.coverage import Coverage
from lightrft.strategy.engine import StatefulEngine
from lightrft.strategy.model_files import ModelFiles
from lightrft.strategy.request_seeds import content_of, seeds_for
from lightrft.strategy.requests import Completion
from lightrft.strategy.utils import held_weights
from lightrft.strategy.utils.agreement import Ranks

pytest.importorskip("transformers")


class MyEngine(StatefulEngine):
    """A model in this process, without a library around it."""

    weights_dtype = torch.float32

    def __init__(self, folder, max_model_len, max_tokens):
        super().__init__("my engine")
        self._files = ModelFiles.of(folder)
        self._max_model_len, self._max_tokens, self._calls = max_model_len, max_tokens, 0
        self._model = TransformerModel(folder, torch.float32)
        self._model.load(checkpoint_tensors(folder))

    def _generate(self, requests, params):
        self._calls += 1
        self._refuse_options(params)
        tokens = [self._tokens(request) for request in requests]
        seeds = seeds_for([content_of(one) for one in requests], self._calls if params.seed is None else params.seed)
        samples = [
            Sample(tokens=prompt, params=self._limited(params, len(prompt)), seed=seed + 1000 * index)
            for prompt, seed in zip(tokens, seeds, strict=True)
            for index in range(params.n)
        ]
        return [
            Completion(
                prompt_token_ids=sample.tokens,
                output_token_ids=drawn.tokens,
                log_probs=drawn.processed if params.logprobs else None,
                log_probs_mode="processed",
                finish_reason=drawn.finish_reason,
                weight_version=self.weight_version,
            )
            for sample, drawn in zip(samples, self._model.draw(samples), strict=True)
        ]

    def _tokens(self, request):
        if not request.is_tokens:
            raise ConfigError("this engine takes token ids: no text, no image")
        tokens = request.prompt_token_ids
        outside = [token for token in tokens if not 0 <= token < self._files.vocab_size]
        if not tokens or outside:
            raise ConfigError(f"token ids {outside} of {self._files.vocab_size}" if outside else "the prompt is empty")
        if len(tokens) >= self._max_model_len:
            raise ConfigError(f"{len(tokens)} tokens leave no room in {self._max_model_len}")
        return tokens

    def _refuse_options(self, params):
        wrong = [name for name in ("presence_penalty", "frequency_penalty") if abs(getattr(params, name)) > 2]
        wrong += ["repetition_penalty"] * (params.repetition_penalty <= 0) + list(params.options)
        wrong += ["logit_bias"] * any(token >= self._files.vocab_size for token in params.logit_bias or ())
        if wrong:
            raise ConfigError(f"not allowed, or not there: {', '.join(wrong)}")

    def _limited(self, params, length):
        most = min(params.max_tokens or self._max_tokens, self._max_model_len - length)
        return dataclasses.replace(params, n=1, max_tokens=most, min_tokens=min(params.min_tokens, most))

    def _sleep(self, level):
        if level == 2:
            self._model.drop()
        self._reset_caches()

    def _wake_up(self, tags):
        pass

    def _load(self, buckets):
        coverage = Coverage(self._files)
        with Ranks(rank=0, world_size=1).together("my engine has not got new weights", WeightSyncError):
            for bucket in buckets:
                fitting = [one for one in bucket if coverage.fits(one[0], one[1].shape, one[1].dtype)]
                self._model.load(fitting, whole=False)
                del bucket, fitting  # or a part of it stays in memory while the next is gathered
            coverage.check()

    def _fingerprints(self):
        return held_weights.fingerprints(self._model.module(), self._files.told_shapes(), dtype=torch.float32)

    def _reset_caches(self):
        self._model.forget()

    def _shutdown(self):
        self._model = None


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folders = [str(tmp_path_factory.mktemp("model")) for _ in range(2)]
    models = [tiny.tiny_text_model(folder, seed) for seed, folder in enumerate(folders)]
    made = engine_contract.Subject(
        start=lambda index: MyEngine(folders[index], max_model_len=64, max_tokens=8),
        models=models,
        name="my engine",
        vocabulary=tiny.VOCABULARY,
        max_model_len=64,
        max_tokens=8,
        end=tiny.EOS,
        first_token=len(tiny.SPECIAL),
        lacks={"text": "it has no tokenizer", "shared": "one rank alone has it"},
    )
    yield made
    made.close()


@pytest.mark.parametrize("check", [*engine_contract.CHECKS, *weight_sync.CHECKS], ids=str)
def test_my_engine_keeps_the_contract(subject, check):
    check(subject)
