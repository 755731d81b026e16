"""The contracts of engines and of sending weights, checked of the engines that are installed, on one GPU."""

import importlib.util
import os

import pytest
import torch
from engines import on_cpu

from lightrft.models import tiny
from lightrft.sim.contracts import engine as engine_contract
from lightrft.sim.contracts import weight_sync as weight_sync_contract
from lightrft.sim.contracts.engine import LACKS
from lightrft.strategy import engine as engines

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::lightrft")]

CHECKS = [*engine_contract.CHECKS, *weight_sync_contract.CHECKS]
OPTIONS = {"vllm": {}, "sglang": {"enable_deterministic_inference": True}}
NAMES = {"vllm": "vLLM", "sglang": "SGLang, on a CPU"}
ALONE = {"shared": "one GPU serves one rank"}


WANTED = [kind for kind in OPTIONS if kind in os.environ.get("LIGHTRFT_ENGINES", ",".join(OPTIONS)).split(",")]
"""The engines of this environment: the two need one each."""


@pytest.fixture(scope="module", params=WANTED)
def subject(request, gpus, needed, tmp_path_factory):
    kind = request.param
    if importlib.util.find_spec(kind) is None:
        needed(f"{kind} is not installed: install it, or name the engines that are in LIGHTRFT_ENGINES")
    models = [model.bfloat16() for model in on_cpu.pair(tie_word_embeddings=True)]
    folders = [on_cpu.save(model, tmp_path_factory.mktemp("model"), tiny.tokenizer()) for model in models]

    def start(index):
        settings = on_cpu.settings(
            folders[index], dtype="bfloat16", memory_share=0.3, device=torch.device("cuda:0"), options=OPTIONS[kind]
        )
        return on_cpu.counting(engines.start(kind, settings))

    lacks = {name: why for name, why in LACKS[NAMES[kind]].items() if name != "seeds"} | ALONE
    made = on_cpu.subject(NAMES[kind], start, models, lacks=lacks, within=0.05)
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_an_engine_keeps_the_contract_on_a_gpu(subject, check):
    check(subject)
