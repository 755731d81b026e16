"""The contracts of engines and of sending weights, checked of real vLLM on a CPU."""

import pytest
import torch.distributed as dist
from engines import on_cpu

from lightrft.models import tiny
from lightrft.sim import ProcessWorld
from lightrft.sim.contracts import engine as engine_contract
from lightrft.sim.contracts import weight_sync as weight_sync_contract
from lightrft.strategy import vllm_utils

# What vLLM and what it imports warn of is not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::lightrft")]

CHECKS = [*engine_contract.CHECKS, *weight_sync_contract.CHECKS]
OPTIONS = {"kv_cache_memory_bytes": 32 << 20, "block_size": 32}


class World:
    """Two processes, which end with the run."""

    def __init__(self, size):
        self.size = size

    def run(self, program, *args):
        with ProcessWorld(self.size, backend="gloo", limit=240) as world:
            return world.run(program, *args)


def start_shared(folder):
    def start(group):
        size = dist.get_world_size(group)
        return vllm_utils.start(on_cpu.settings(folder, tp_size=size, group=group, options=OPTIONS))

    return start


def native(params):
    import vllm

    return params.to_vllm(vllm.SamplingParams)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def subject(request, tmp_path_factory):
    models = on_cpu.pair(tie_word_embeddings=request.param)
    folders = [on_cpu.save(model, tmp_path_factory.mktemp("model"), tiny.tokenizer()) for model in models]

    def start(index):
        return on_cpu.counting(vllm_utils.start(on_cpu.settings(folders[index], options=OPTIONS)))

    made = on_cpu.subject("vLLM", start, models, native=native, world=World, start_shared=start_shared(folders[0]))
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_vllm_keeps_the_contract(subject, check):
    check(subject)
