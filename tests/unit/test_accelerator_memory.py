"""The memory of a simulated device."""

import pytest
import torch
from ranks_with_devices import accelerator_of_rank, in_rank

from lightrft.sim.accelerator import DeviceState


def test_memory_is_empty_until_somebody_charges_it():
    def ask():
        torch.cuda.init()
        torch.ones(1000, device="cuda")
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0
        return torch.cuda.mem_get_info()

    assert in_rank(ask) == (80 * 2**30, 80 * 2**30)


def test_a_ledger_counts_like_a_caching_allocator():
    def ask():
        torch.cuda.set_device(1)
        ledger = accelerator_of_rank().memory()
        ledger.charge(300)
        ledger.release(100)
        assert torch.cuda.memory_allocated() == torch.cuda.memory_allocated(1) == 200
        assert torch.cuda.memory_allocated(0) == 0
        assert torch.cuda.max_memory_allocated() == 300
        assert torch.cuda.memory_reserved() == torch.cuda.max_memory_reserved() == 300
        assert torch.cuda.mem_get_info(1) == (80 * 2**30 - 300, 80 * 2**30)
        assert torch.accelerator.get_memory_info() == torch.cuda.mem_get_info()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.memory_reserved() == torch.cuda.max_memory_allocated() == 200
        assert torch.accelerator.memory_stats()["allocated_bytes.all.allocated"] == 300
        torch.cuda.reset_accumulated_memory_stats()
        assert torch.cuda.memory_stats()["allocated_bytes.all.freed"] == 0
        with pytest.raises(ValueError, match="only 200 are charged"):
            ledger.release(201)

    in_rank(ask)


def test_more_than_the_device_has_is_out_of_memory():
    def ask():
        torch.cuda.set_per_process_memory_fraction(0.5)
        assert torch.cuda.get_per_process_memory_fraction() == 0.5
        ledger = accelerator_of_rank().memory()
        ledger.charge(40 * 2**30)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            ledger.charge(1)
        assert torch.cuda.memory_stats()["num_ooms"] == 1

    in_rank(ask)


def test_the_summary_and_the_snapshot_can_be_printed():
    def ask():
        torch.cuda.init()
        assert "CUDA memory summary" in torch.cuda.memory_summary()
        assert torch.cuda.memory_snapshot() == []
        torch.cuda.memory._record_memory_history()
        assert torch.cuda.memory._snapshot()["segments"] == []
        assert "no processes" in torch.cuda.list_gpu_processes()
        with pytest.warns(FutureWarning, match="reset_peak_memory_stats"):
            torch.cuda.reset_max_memory_allocated()

    in_rank(ask)


def test_total_memory_is_an_argument():
    state = DeviceState(0, 1, total_memory=1000, cuda_available=False)
    assert state.memory(0).free == 1000
