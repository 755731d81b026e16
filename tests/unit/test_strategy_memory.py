"""What a rank reports of its memory, and printing from one rank."""

import gc
import re
import weakref

import pytest
import torch

from lightrft.sim import SimWorld
from lightrft.sim.accelerator.state import device_state
from lightrft.strategy.utils.memory import memory_report, sync_and_clear_cache
from lightrft.strategy.utils.printing import print_from_first


def test_on_the_host_it_is_the_memory_of_the_process():
    line = memory_report("after generate")
    used, peak = map(float, re.fullmatch(r"after generate: host memory (.+) GiB, peak (.+) GiB", line).groups())
    assert 0.05 < used <= peak + 0.01
    kept = torch.ones(64 << 20)  # 256 MiB
    assert float(memory_report().split()[2]) == pytest.approx(used + kept.nbytes / (1 << 30), abs=0.1)


def test_on_cuda_it_is_what_the_device_of_the_rank_has_in_use():
    def main():
        device = torch.device("cuda", 1)
        torch.cuda.set_device(device)
        ledger = device_state().memory(1)
        ledger.charge(3 << 30)
        ledger.release(1 << 30)
        before = memory_report("step 3", device)
        sync_and_clear_cache(device)
        return before, memory_report(device=device), memory_report(device="cuda:0")

    assert SimWorld(1, gpus_per_node=2, cuda=True, stall_limit=15).run(main) == [
        (
            "step 3: cuda:1 allocated 2.00 GiB, reserved 3.00 GiB, peak 3.00 GiB",
            "cuda:1 allocated 2.00 GiB, reserved 2.00 GiB, peak 3.00 GiB",
            "cuda:0 allocated 0.00 GiB, reserved 0.00 GiB, peak 0.00 GiB",
        )
    ]


class Node:
    """Part of a cycle."""


def test_clearing_collects_garbage():
    gc.disable()
    try:
        node = Node()
        node.itself = node
        gone = weakref.ref(node)
        del node
        assert gone() is not None
        sync_and_clear_cache()
        assert gone() is None
    finally:
        gc.enable()


def test_rank_0_prints_and_the_others_do_not(capsys):
    for rank in range(3):
        print_from_first(rank, "loss", 0.5, sep="=")
    assert capsys.readouterr().out == "loss=0.5\n"
