"""Which devices a simulated rank has, and which one it selects."""

import threading

import pytest
import torch
from ranks_with_devices import in_rank, local_rank, on_two_ranks
from torch import nn

from lightrft.sim import SimWorld


def test_a_rank_starts_on_device_0_whatever_its_local_rank():
    def ask():
        return torch.cuda.current_device()

    assert on_two_ranks(ask) == [0, 0]


def test_a_rank_selects_a_device_for_itself_alone():
    def select():
        torch.cuda.set_device(local_rank())
        with torch.cuda.device(0):
            inner = torch.cuda.current_device()
        with torch.cuda.device("cuda:1"), torch.accelerator.device_index(0):
            innermost = torch.accelerator.current_device_index()
        return inner, innermost, torch.cuda.current_device()

    assert on_two_ranks(select) == [(0, 0, 0), (0, 0, 1)]


def test_a_thread_of_a_rank_starts_on_device_0_as_in_cuda():
    def select():
        torch.cuda.set_device(1)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        return seen[0], torch.cuda.current_device()

    assert in_rank(select) == (0, 1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.cuda.set_device(2),
        lambda: torch.cuda.set_device("cuda:2"),
        lambda: torch.accelerator.set_device_index(2),
        lambda: torch.cuda.device(2).__enter__(),
        lambda: torch.cuda.synchronize(2),
        lambda: torch.cuda.Stream(device=2),
        lambda: torch.cuda.memory_allocated(2) if torch.cuda.init() is None else None,
        lambda: torch.ones(1).to("cuda:2"),
        lambda: torch.ones(1).to(2),
        lambda: torch.ones(1).to(device=torch.device("cuda", 2)),
        lambda: torch.ones(1).cuda(2),
        lambda: torch.ones(1, device=2),
        lambda: torch.ones_like(torch.ones(1), device="cuda:2"),
        lambda: torch.ones(1).new_zeros(1, device="cuda:2"),
        lambda: nn.Linear(1, 1).cuda(2),
        lambda: nn.Linear(1, 1).to(2),
        lambda: nn.Linear(1, 1, device="cuda:2"),
        lambda: torch.set_default_device("cuda:2"),
        lambda: torch.Generator("cuda:2"),
    ],
)
def test_a_device_that_the_node_lacks_is_an_error_that_names_the_count(ask):
    def fail():
        with pytest.raises(torch.AcceleratorError, match=r"invalid device ordinal: got 2, .* sees 2 device\(s\)"):
            ask()

    in_rank(fail)


def test_set_device_ignores_a_negative_index_and_wants_one():
    def select():
        torch.cuda.set_device(1)
        torch.cuda.set_device(-1)
        with pytest.raises(ValueError, match="specified index"):
            torch.cuda.set_device("cuda")
        with pytest.raises(ValueError, match="Expected a cuda device"):
            torch.cuda.set_device("cpu")
        return torch.cuda.current_device()

    assert in_rank(select) == 1


def test_the_node_has_as_many_devices_as_the_world_says():
    def count():
        return torch.cuda.device_count(), torch.accelerator.device_count()

    assert SimWorld(2, gpus_per_node=4).run(count) == [(4, 4)] * 2


@pytest.mark.parametrize("cuda", [False, True])
def test_cuda_is_available_only_if_the_world_says_so(cuda):
    def ask():
        return (
            torch.cuda.is_available(),
            torch.accelerator.is_available(),
            torch.backends.cuda.is_built() or not cuda,
            torch.accelerator.current_accelerator(check_available=True) is not None,
        )

    assert in_rank(ask, cuda=cuda) == (cuda, cuda, True, cuda)


def test_properties_are_those_of_one_kind_of_device():
    def ask():
        properties = torch.cuda.get_device_properties("cuda:1")
        assert torch.cuda.get_device_name(0) == properties.name == torch.cuda.get_device_name()
        assert torch.cuda.get_device_capability() == (properties.major, properties.minor) == (9, 0)
        assert torch.cuda.is_bf16_supported()
        assert torch.cuda.is_tf32_supported()
        assert torch.cuda.can_device_access_peer(0, 1)
        return properties.total_memory

    assert in_rank(ask) == 80 * 2**30


def test_what_needs_a_context_makes_one_and_what_does_not_leaves_it():
    def ask():
        torch.manual_seed(1)
        torch.cuda.manual_seed_all(1)
        torch.cuda.empty_cache()
        torch.cuda.device_count()
        before = torch.cuda.is_initialized()
        torch.ones(1, device="cuda")
        return before, torch.cuda.is_initialized()

    assert in_rank(ask) == (False, True)


def test_calls_without_effect_are_answered():
    def ask():
        torch.cuda.init()
        torch.cuda.ipc_collect()
        torch.cuda.synchronize()
        torch.cuda.synchronize("cuda:1")
        torch.accelerator.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        torch.cuda.profiler.start()
        torch.cuda.profiler.stop()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(0, 8, 0))
        assert torch.cuda.get_sync_debug_mode() == 1
        assert torch.cuda.utilization() == torch.cuda.temperature() == 0
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.cuda.nccl.version() >= (2, 10)
        assert torch.get_device_module("cuda") is torch.get_device_module() is torch.cuda
        with pytest.raises(RuntimeError, match="invalid value of debug_mode"):
            torch.cuda.set_sync_debug_mode("loud")

    in_rank(ask)


def test_nvtx_ranges_report_their_depth():
    def ask():
        assert torch.cuda.nvtx.range_push("step") == 0
        with torch.cuda.nvtx.range("layer {}", 1):
            assert torch.cuda.nvtx.range_push("inner") == 2
            assert torch.cuda.nvtx.range_pop() == 2
        torch.cuda.nvtx.mark("here")
        torch.cuda.nvtx.range_end(torch.cuda.nvtx.range_start("long"))
        assert torch.cuda.nvtx.range_pop() == 0
        assert torch.cuda.nvtx.range_pop() < 0

    in_rank(ask)
