"""The contracts of engines and of sending weights, checked of the fake engine behind either face, in either mode."""

import importlib

import pytest
from engines import on_cpu

from lightrft.models import tiny
from lightrft.sim import SimWorld
from lightrft.sim.contracts import engine as engine_contract
from lightrft.sim.contracts import weight_sync as weight_sync_contract
from lightrft.sim.engine.faces import faces
from lightrft.strategy import engine as engines

pytest.importorskip("transformers")

CHECKS = [*engine_contract.CHECKS, *weight_sync_contract.CHECKS]
USUAL = ("fake vLLM", "fake SGLang, hash mode")
KINDS = {
    "fake vLLM": ("vllm", "model", {}),
    "fake SGLang": ("sglang", "model", {"enable_deterministic_inference": True}),
    "fake vLLM, hash mode": ("vllm", "hash", {}),
    "fake SGLang, hash mode": ("sglang", "hash", {"enable_deterministic_inference": True}),
}


@pytest.fixture(scope="module")
def models():
    return on_cpu.pair(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    return [on_cpu.save(model, tmp_path_factory.mktemp("model"), tiny.tokenizer()) for model in models]


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=() if kind in USUAL else pytest.mark.slow) for kind in KINDS]
)
def subject(request, models, folders):
    kind, mode, options = KINDS[request.param]

    def start(index):
        return on_cpu.counting(engines.start(kind, on_cpu.settings(folders[index], options=options)))

    def start_shared(group):
        return engines.start(kind, on_cpu.settings(folders[0], tp_size=2, group=group, options=options))

    def native(params):
        if kind == "vllm":
            return params.to_vllm(importlib.import_module("vllm").SamplingParams)
        cls = importlib.import_module("sglang.srt.sampling.sampling_params").SamplingParams
        return cls(**params.to_sglang(cls))

    with faces(mode), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTRFT_POISON_BUCKETS", "1")  # as in a world: then the fake engine reads weights late
        made = on_cpu.subject(
            request.param,
            start,
            models,
            native=native,
            world=lambda size: SimWorld(size, engines=mode, stall_limit=30),
            start_shared=start_shared,
        )
        yield made
        made.close()


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_the_fake_engine_keeps_the_contract(subject, check):
    check(subject)
