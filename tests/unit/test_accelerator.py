"""The torch.cuda calls that a trainer makes, answered inside a world and nowhere else."""

import copy
import io
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightrft.sim import SimWorld
from lightrft.sim.accelerator import DeviceState, patches
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patcher

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a build without CUDA answers")


def in_rank(fn, **options):
    """What ``fn`` returns on the only rank of a world with two devices."""
    return SimWorld(1, gpus_per_node=2, **options).run(fn)[0]


def on_two_ranks(fn, **options):
    return SimWorld(2, gpus_per_node=2, **options).run(fn)


def local_rank():
    return int(os.environ["LOCAL_RANK"])


def accelerator_of_rank():
    return current_task().rank.accelerator


def start_group():
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)


# -- devices ----------------------------------------------------------------------------------------------------------


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


# -- memory -----------------------------------------------------------------------------------------------------------


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


# -- streams and events -----------------------------------------------------------------------------------------------


def test_streams_are_selected_per_device_and_put_back():
    def ask():
        default = torch.cuda.current_stream()
        assert default == torch.cuda.default_stream() == torch.accelerator.current_stream()
        side = torch.cuda.Stream(priority=-1)
        other = torch.cuda.Stream(device="cuda:1")
        assert isinstance(side, torch.cuda.Stream)
        assert isinstance(side, torch.Stream)
        assert (side.device, side.priority, other.device.index) == (torch.device("cuda:0"), -1, 1)
        with torch.cuda.stream(side):
            assert torch.cuda.current_stream() == side != default
            with other:
                assert torch.cuda.current_device() == 1
                assert torch.cuda.current_stream() is other
                assert torch.cuda.current_stream(0) is side
            assert torch.cuda.current_device() == 0
            with torch.cuda.stream(other):
                assert torch.cuda.current_stream("cuda:1") is other
            assert torch.cuda.current_stream() == side
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() == default
        assert torch.cuda.current_stream(1) == torch.cuda.default_stream(1)
        torch.cuda.set_stream(side)
        assert len({side, torch.cuda.current_stream(), default}) == 2
        side.wait_stream(default)
        side.wait_event(default.record_event())
        side.synchronize()
        torch.ones(2).record_stream(side)
        assert side.query()

    in_rank(ask)


def test_two_ranks_do_not_disturb_each_other():
    def ask():
        rank = local_rank()
        start_group()
        stream = torch.cuda.Stream()
        torch.cuda.set_stream(stream)
        torch.cuda.manual_seed(rank)
        accelerator_of_rank().memory().charge(rank + 1)
        torch.distributed.barrier()
        assert torch.cuda.current_device() == rank
        assert torch.cuda.current_stream() is stream
        assert stream.device.index == rank
        assert torch.cuda.initial_seed() == rank
        assert torch.cuda.max_memory_allocated() == rank + 1
        torch.distributed.barrier()
        drawn = torch.randn(4, device="cuda")
        torch.distributed.destroy_process_group()
        return drawn

    first, second = on_two_ranks(ask)
    assert not torch.equal(first, second)
    assert torch.equal(first, on_two_ranks(ask)[0])


def test_events_time_what_passes_on_the_clock_of_the_world():
    def ask():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with pytest.raises(ValueError, match="must be recorded"):
            start.elapsed_time(end)
        start.record()
        time.sleep(2.0)
        end.record(torch.cuda.current_stream())
        end.synchronize()
        end.wait()
        assert end.query()
        with pytest.raises(ValueError, match="enable_timing=True"):
            start.elapsed_time(torch.cuda.Event())
        with pytest.raises(RuntimeError, match="does not match"):
            end.record(torch.cuda.Stream(device=1))
        return start.elapsed_time(end)

    assert in_rank(ask) == pytest.approx(2000, abs=1)


# -- random state -----------------------------------------------------------------------------------------------------

DRAWS = [
    lambda: torch.rand(5, device="cuda"),
    lambda: torch.randn(5, device=torch.device("cuda")),
    lambda: torch.randint(0, 1000, (5,), device="cuda"),
    lambda: torch.randperm(50, device="cuda:0"),
    lambda: torch.normal(0.0, 1.0, (5,), device=0),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_on_a_device_follow_its_seed_and_nothing_else(draw):
    def ask():
        torch.cuda.manual_seed(5)
        first = draw()
        second = draw()
        torch.cuda.manual_seed_all(5)
        cpu = torch.get_rng_state()
        assert torch.equal(draw(), first)
        assert torch.equal(torch.get_rng_state(), cpu)
        torch.rand(3)
        assert torch.equal(draw(), second)
        assert not torch.equal(first, second)

    in_rank(ask)


def test_the_cpu_generator_does_not_follow_the_device_seed():
    def ask():
        torch.manual_seed(3)
        torch.cuda.manual_seed(99)
        return torch.rand(3)

    assert torch.equal(in_rank(ask), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_manual_seed_seeds_the_devices_too():
    def ask():
        torch.manual_seed(3)
        first = torch.rand(3, device="cuda:1")
        torch.manual_seed(3)
        assert torch.equal(torch.rand(3, device="cuda:1"), first)
        assert torch.cuda.initial_seed() == 3

    in_rank(ask)


def test_a_seed_set_before_there_is_a_context_goes_to_device_0():
    def ask():
        torch.cuda.manual_seed(5)
        torch.cuda.set_device(1)
        return [generator.initial_seed() for generator in torch.cuda.default_generators]

    assert in_rank(ask) == [5, torch.Generator().initial_seed()]


def test_random_state_is_16_bytes_that_can_be_put_back():
    def ask():
        states = torch.cuda.get_rng_state_all()
        assert [tuple(state.shape) for state in states] == [(16,), (16,)]
        first = torch.rand(3, device="cuda")
        assert torch.cuda.default_generators[0].get_offset() == 4
        torch.cuda.set_rng_state_all(states)
        assert torch.equal(torch.rand(3, device="cuda"), first)
        state = torch.cuda.get_rng_state("cuda:0")
        after = torch.rand(3, device="cuda")
        torch.cuda.set_rng_state(state, 0)
        with torch.random.fork_rng(devices=[0]):
            assert torch.equal(torch.rand(3, device="cuda"), after)
        assert torch.equal(torch.rand(3, device="cuda", generator=torch.cuda.default_generators[0]), after)
        with pytest.raises(RuntimeError, match="expected the 16 bytes"):
            torch.cuda.set_rng_state(torch.get_rng_state())

    in_rank(ask)


def test_a_random_seed_is_the_same_in_every_run_and_another_on_every_rank():
    def ask():
        torch.cuda.init()
        torch.cuda.seed()
        first = torch.cuda.initial_seed()
        torch.cuda.seed()
        return first, torch.cuda.initial_seed()

    seeds = on_two_ranks(ask)
    assert len({*seeds[0], *seeds[1]}) == 4
    assert on_two_ranks(ask) == seeds


def test_a_generator_for_a_device_draws_for_it():
    def ask():
        generator = torch.Generator(device="cuda").manual_seed(1)
        assert isinstance(generator, torch.Generator)
        assert isinstance(torch.default_generator, torch.Generator)
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3, device="cuda", generator=generator)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        return drawn

    assert torch.equal(in_rank(ask), torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_draws_on_a_device(reentrant):
    def ask():
        factors = []

        def layer(x):
            factors.append(torch.rand(4, device="cuda"))
            return x * factors[-1]

        x = torch.ones(4, device="cuda", requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert len(factors) == 2
        assert torch.equal(x.grad, factors[0])
        assert torch.equal(*factors)

    in_rank(ask)


# -- tensors ----------------------------------------------------------------------------------------------------------

X = torch.arange(6.0).reshape(2, 3)

FACTORIES = {
    "arange": lambda **k: torch.arange(4, **k),
    "as_tensor": lambda **k: torch.as_tensor([1.0], **k),
    "asarray": lambda **k: torch.asarray([1.0], **k),
    "bartlett_window": lambda **k: torch.bartlett_window(4, **k),
    "blackman_window": lambda **k: torch.blackman_window(4, **k),
    "empty": lambda **k: torch.empty(2, **k),
    "empty_like": lambda **k: torch.empty_like(X, **k),
    "empty_permuted": lambda **k: torch.empty_permuted((2, 3), (1, 0), **k),
    "empty_strided": lambda **k: torch.empty_strided((2, 3), (3, 1), **k),
    "eye": lambda **k: torch.eye(2, **k),
    "fftfreq": lambda **k: torch.fft.fftfreq(4, **k),
    "full": lambda **k: torch.full((2,), 1.0, **k),
    "full_like": lambda **k: torch.full_like(X, 1.0, **k),
    "hamming_window": lambda **k: torch.hamming_window(4, **k),
    "hann_window": lambda **k: torch.hann_window(4, **k),
    "kaiser_window": lambda **k: torch.kaiser_window(4, **k),
    "linspace": lambda **k: torch.linspace(0, 1, 3, **k),
    "logspace": lambda **k: torch.logspace(0, 1, 3, **k),
    "nested_tensor": lambda **k: torch.nested.nested_tensor([X], layout=torch.jagged, **k),
    "new_empty": lambda **k: X.new_empty(2, **k),
    "new_empty_strided": lambda **k: X.new_empty_strided((2,), (1,), **k),
    "new_full": lambda **k: X.new_full((2,), 1.0, **k),
    "new_ones": lambda **k: X.new_ones(2, **k),
    "new_tensor": lambda **k: X.new_tensor([1.0], **k),
    "new_zeros": lambda **k: X.new_zeros(2, **k),
    "normal": lambda **k: torch.normal(0.0, 1.0, (2,), **k),
    "ones": lambda **k: torch.ones(2, **k),
    "ones_like": lambda **k: torch.ones_like(X, **k),
    "rand": lambda **k: torch.rand(2, **k),
    "rand_like": lambda **k: torch.rand_like(X, **k),
    "randint": lambda **k: torch.randint(0, 2, (2,), **k),
    "randint_like": lambda **k: torch.randint_like(X, 2, **k),
    "randn": lambda **k: torch.randn(2, **k),
    "randn_like": lambda **k: torch.randn_like(X, **k),
    "randperm": lambda **k: torch.randperm(2, **k),
    "rfftfreq": lambda **k: torch.fft.rfftfreq(4, **k),
    "scalar_tensor": lambda **k: torch.scalar_tensor(1.0, **k),
    "signal.windows": lambda **k: torch.signal.windows.hann(4, **k),
    "sparse_coo_tensor": lambda **k: torch.sparse_coo_tensor([[0]], [1.0], (2,), **k),
    "sparse_csr_tensor": lambda **k: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), **k),
    "tensor": lambda **k: torch.tensor([1.0], **k),
    "tril_indices": lambda **k: torch.tril_indices(2, 2, **k),
    "triu_indices": lambda **k: torch.triu_indices(2, 2, **k),
    "zeros": lambda **k: torch.zeros(2, **k),
    "zeros_like": lambda **k: torch.zeros_like(X, **k),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", FACTORIES)
def test_factories_take_every_spelling_of_a_cuda_device(name):
    make = FACTORIES[name]

    def ask():
        devices = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1), 1]
        return [make(device=device).device.type for device in devices]

    assert in_rank(ask) == ["cpu"] * 5


def test_every_constructor_that_torch_knows_is_among_them():
    from torch.utils._device import _device_constructors

    missing = {function.__name__.removeprefix("fft_") for function in _device_constructors()} - FACTORIES.keys()
    assert missing == {
        "empty_quantized",  # quantised tensors
        "range",  # deprecated
        "sparse_bsc_tensor",
        "sparse_bsr_tensor",
        "sparse_compressed_tensor",
        "sparse_csc_tensor",
    }


def test_other_devices_are_left_alone():
    def ask():
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.empty(2).to("meta").is_meta
        assert torch.empty(2, device="cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="Invalid device string"):
            torch.empty(2, device="cuda:x")
        with pytest.raises(RuntimeError):
            torch.empty(2, device=-1)
        with pytest.raises(TypeError):
            torch.zeros(2, device=True)

    in_rank(ask)


@pytest.mark.parametrize(
    "target",
    ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1), 0, 1],
    ids=str,
)
def test_moving_to_a_device_returns_what_moving_to_the_cpu_returns(target):
    def ask():
        x = torch.arange(6.0).reshape(2, 3)
        assert x.to(target) is x
        assert x.to(device=target) is x
        assert x.to(target, torch.float32, non_blocking=True) is x
        assert x.to(target, dtype=torch.float32) is x
        assert x.to(x.to(target)) is x
        copied = x.to(target, copy=True)
        assert copied is not x
        assert copied.data_ptr() != x.data_ptr()
        assert x.to(target, torch.bfloat16).dtype is torch.bfloat16
        assert x.to(device=target, dtype=torch.int32).dtype is torch.int32
        image = torch.ones(1, 2, 3, 3)
        assert image.to(target, memory_format=torch.channels_last).stride() == (18, 1, 6, 2)
        if not isinstance(target, int):
            assert x.cuda(target) is x
        assert x.cuda(non_blocking=True) is x
        assert x.cuda(memory_format=torch.preserve_format) is x
        assert not x.is_cuda
        assert x.get_device() == -1
        with pytest.raises(ValueError, match="Expected a cuda device"):
            x.cuda("cpu")

    in_rank(ask)


def test_modules_move_and_keep_their_parameters():
    def ask():
        module = nn.BatchNorm1d(3)
        weight, mean = module.weight, module.running_mean
        for target in ("cuda", 1, torch.device("cuda:1")):
            assert module.to(target) is module
        module.to(device=0)
        assert module.cuda().cuda(1) is module
        assert module.weight is weight
        assert module.running_mean is mean
        assert module.to("cuda", torch.float64).weight.dtype is torch.float64
        with torch.device("meta"):
            module = nn.Linear(2, 2)
        assert module.to_empty(device="cuda").weight.device.type == "cpu"
        assert nn.utils.rnn.pack_sequence([torch.ones(2)]).cuda().data.device.type == "cpu"

    in_rank(ask)


def test_storages_move():
    def ask():
        storage = torch.ones(2).untyped_storage()
        assert storage.cuda() is storage
        assert storage.cuda(1) is storage
        assert storage.to(device="cuda") is storage

    in_rank(ask)


def test_types_of_cuda_make_cpu_tensors():
    def ask():
        made = torch.cuda.FloatTensor([1.5])
        assert made.type() == "torch.FloatTensor"
        assert not isinstance(made, torch.cuda.FloatTensor)
        assert torch.ones(1).type("torch.cuda.HalfTensor").dtype is torch.half
        assert torch.ones(1).type(torch.cuda.LongTensor).dtype is torch.long
        assert torch.ones(1).type(torch.int32).dtype is torch.int32

    in_rank(ask)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_pinning_copies_and_is_seen_through_views():
    def ask():
        x = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
        assert not x.is_pinned()
        pinned = x.pin_memory()
        assert pinned.is_pinned()
        assert pinned[1:].is_pinned()
        assert pinned.untyped_storage().is_pinned()
        assert pinned.stride() == x.stride()
        assert pinned.data_ptr() != x.data_ptr()
        assert pinned.pin_memory() is pinned
        assert pinned.requires_grad
        assert not x.is_pinned()
        assert not pinned.clone().is_pinned()
        assert torch.zeros(2, pin_memory=True).is_pinned()
        assert not torch.zeros(2, pin_memory=False).is_pinned()
        assert torch.empty_like(pinned, pin_memory=True).is_pinned()
        assert not torch.sparse_coo_tensor([[0]], [1.0], (2,)).is_pinned()
        with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
            torch.zeros(2, device="cuda", pin_memory=True)

    in_rank(ask)


def test_the_default_device_may_be_a_cuda_device():
    def ask():
        with torch.device("cuda:1"):
            assert torch.ones(2).device.type == "cpu"
            assert nn.Linear(2, 2).weight.device.type == "cpu"
        torch.set_default_device("cuda")
        assert torch.ones(2).device == torch.get_default_device() == torch.device("cpu")
        torch.set_default_device(None)

    in_rank(ask)


def test_subclasses_of_tensor_still_see_the_call():
    class Loud(torch.Tensor):
        seen = ()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen = (*cls.seen, func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    def ask():
        x = torch.ones(2).as_subclass(Loud)
        assert type(x.to("cuda")) is Loud
        assert type(x.cuda()) is Loud
        assert type(x.new_zeros(2, device="cuda")) is Loud

    in_rank(ask)
    assert Loud.seen == ("to", "to", "new_zeros")


# -- parts of torch that look at the device ---------------------------------------------------------------------------


def test_autocast_casts_on_the_cpu_with_the_types_of_cuda():
    def ask():
        x = torch.ones(2, 2, device="cuda")
        with torch.autocast("cuda"):
            assert torch.is_autocast_enabled()
            assert (x @ x).dtype is torch.float16
            with torch.autocast("cuda", dtype=torch.bfloat16):
                assert (x @ x).dtype is torch.bfloat16
            with torch.autocast(device_type="cuda", enabled=False):
                assert (x @ x).dtype is torch.float32
            assert (x @ x).dtype is torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cuda"):
                pass
            assert (x @ x).dtype is torch.bfloat16
        with pytest.warns(FutureWarning), torch.cuda.amp.autocast():
            assert (x @ x).dtype is torch.float16
        assert (x @ x).dtype is torch.float32
        assert not torch.is_autocast_enabled()

    in_rank(ask)


def test_a_custom_function_casts_its_inputs():
    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, grad):
            return grad * 2

    def ask():
        with torch.autocast("cuda"):
            return Product.apply(torch.ones(2, dtype=torch.float16)).dtype

    assert in_rank(ask) is torch.float32


def test_a_grad_scaler_scales_and_skips_a_step_that_overflowed():
    def ask():
        weight = nn.Parameter(torch.ones(2, device="cuda"))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        assert scaler.is_enabled()
        for factor in (1.0, float("inf")):
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert weight.tolist() == [0.0, 0.0]
        assert scaler.get_scale() == 4.0
        with pytest.warns(FutureWarning):
            assert torch.cuda.amp.GradScaler().is_enabled()

    in_rank(ask)


def test_saved_tensors_are_loaded_to_any_device(monkeypatch):
    saved, tagged = io.BytesIO(), io.BytesIO()
    torch.save({"x": X}, saved)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:1")
        torch.save({"x": X}, tagged)

    def ask():
        locations = ["cuda", "cuda:1", torch.device("cuda", 1), {"cpu": "cuda:1"}, lambda storage, _: storage.cuda(1)]
        for where in locations:
            saved.seek(0)
            assert torch.equal(torch.load(saved, map_location=where)["x"], X)
        tagged.seek(0)
        assert torch.equal(torch.load(tagged)["x"], X)
        tagged.seek(0)
        with pytest.raises(RuntimeError, match=r"device_count\(\) is 2"):
            torch.load(tagged, map_location="cuda:2")

    in_rank(ask)
    tagged.seek(0)
    with pytest.raises(RuntimeError):
        torch.load(tagged)


def test_a_data_loader_pins():
    def ask():
        loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, pin_memory=True)
        batches = [batch for (batch,) in loader]
        assert loader.pin_memory
        return [batch.is_pinned() for batch in batches]

    assert in_rank(ask) == [True, True]


def test_ddp_takes_the_device_of_its_rank():
    def ask():
        start_group()
        torch.manual_seed(0)
        model = nn.Linear(2, 1).cuda()
        model = nn.parallel.DistributedDataParallel(model, device_ids=[local_rank()], output_device=local_rank())
        model(torch.full((1, 2), float(local_rank()), device="cuda")).sum().backward()
        gradient = model.module.weight.grad.tolist()
        with pytest.raises(torch.AcceleratorError, match="invalid device ordinal"):
            nn.parallel.DistributedDataParallel(nn.Linear(1, 1), device_ids=[2])
        torch.distributed.destroy_process_group()
        return gradient

    assert on_two_ranks(ask) == [[[0.5, 0.5]]] * 2


def test_a_mesh_of_cuda_devices_selects_the_device_of_the_rank():
    def ask():
        torch.distributed.init_process_group("nccl")
        mesh = torch.distributed.init_device_mesh("cuda", (2,))
        torch.distributed.destroy_process_group()
        return mesh.device_type, torch.cuda.current_device()

    assert on_two_ranks(ask) == [("cuda", 0), ("cuda", 1)]


@pytest.mark.parametrize("given", [True, False])
def test_fsdp2_shards_over_a_mesh_of_cuda_devices(given):
    def train():
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        start_group()
        torch.manual_seed(0)
        mesh = torch.distributed.init_device_mesh("cuda", (2,)) if given else None
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        model.to_empty(device="cuda")
        for layer in model:
            layer.reset_parameters()
        first = model[0].weight.full_tensor().tolist()
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 4, device="cuda")).float().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert model[0].weight.full_tensor().tolist() != first
        assert model[0].weight.device_mesh.device_type == "cuda"
        offloaded = nn.Linear(4, 4)
        fully_shard(offloaded, mesh=mesh, offload_policy=CPUOffloadPolicy())
        offloaded(torch.ones(2, 4)).sum().backward()
        assert offloaded.weight.to_local().is_pinned()
        torch.distributed.destroy_process_group()
        return first

    first, second = on_two_ranks(train)
    assert first == second
    assert first[0] != first[2], "the two shards were drawn differently"


def test_dtensors_draw_the_same_on_replicas_and_not_on_shards():
    def ask():
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, randn

        start_group()
        mesh = torch.distributed.init_device_mesh("cuda", (2,))
        torch.manual_seed(3)
        replica = randn(8, device_mesh=mesh, placements=[Replicate()]).to_local()
        shard = randn(8, device_mesh=mesh, placements=[Shard(0)]).to_local()
        again = randn(8, device_mesh=mesh, placements=[Shard(0)]).to_local()
        dropped = nn.functional.dropout(distribute_tensor(torch.ones(64), mesh, [Shard(0)]), 0.5).to_local()
        generator = torch.Generator("cuda").manual_seed(5)
        seeded = distribute_tensor(torch.zeros(8), mesh, [Shard(0)]).normal_(generator=generator).to_local()
        assert not torch.equal(shard, again)
        torch.distributed.destroy_process_group()
        return [x.tolist() for x in (replica, shard, dropped, seeded)]

    first, second = on_two_ranks(ask)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False, False]
    assert on_two_ranks(ask) == [first, second]


# -- leaving no trace -------------------------------------------------------------------------------------------------


def owners():
    from torch.distributed.fsdp import _fully_shard
    from torch.distributed.tensor import _api, _dispatch, _random
    from torch.utils import checkpoint as checkpoint_module

    modules = [module for name, module in sys.modules.items() if name.startswith(("torch.cuda", "torch.accelerator"))]
    return [
        *modules,
        *{id(patch.owner): patch.owner for patch in patches()}.values(),
        torch,
        torch.Tensor,
        torch.nn.Module,
        checkpoint_module.DefaultDeviceType,
        _fully_shard._fsdp_init,
        _fully_shard._fully_shard,
        _api,
        _dispatch,
        _random,
        _random.OffsetBasedRNGTracker,
        _random._RNGStateTracker,
    ]


def test_every_patch_is_undone():
    found = owners()
    before = [dict(vars(owner)) for owner in found]
    finders = list(sys.meta_path)
    patcher = Patcher()
    patcher.apply(patches())
    during = [dict(vars(owner)) for owner in found]
    patcher.restore()
    assert during != before
    for owner, names in zip(found, before, strict=True):
        now = vars(owner)
        assert now.keys() == names.keys()
        assert all(now[name] is value for name, value in names.items() if name != "_filled"), owner
    assert sys.meta_path == finders


def test_patches_are_built_once_and_installed_fast():
    owners()  # so that late modules are among what is installed
    assert patches() is patches()
    fastest = 1.0
    for _ in range(20):
        started = time.perf_counter()
        patcher = Patcher()
        patcher.apply(patches())
        patcher.restore()
        fastest = min(fastest, time.perf_counter() - started)
    assert fastest < 1e-3


@WITHOUT_CUDA
def test_other_threads_find_torch_as_it_is_while_a_world_runs():
    from_rank, to_rank = os.pipe(), os.pipe()
    found = []

    def outside():
        os.read(from_rank[0], 1)
        found.append((torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.is_initialized()))
        found.append(len(torch.cuda.default_generators))
        calls = [
            lambda: torch.ones(1, device="cuda"),
            lambda: torch.ones(1).cuda(),
            lambda: torch.ones(1).to("cuda"),
            lambda: torch.randn(1, device=0),
            lambda: torch.ones(1).pin_memory(),
            lambda: nn.Linear(1, 1).to(0),
            lambda: torch.cuda.current_device(),  # noqa: PLW0108
            lambda: torch.cuda.Stream(),  # noqa: PLW0108
            lambda: torch.cuda.Event(),  # noqa: PLW0108
            lambda: torch.cuda.FloatTensor([1.0]),
            lambda: torch.Generator("cuda"),
            lambda: torch.cuda.nvtx.range_push("x"),
            lambda: torch.accelerator.synchronize(),  # noqa: PLW0108
        ]
        for call in calls:
            try:
                found.append(call())
            except (RuntimeError, AssertionError, TypeError):
                found.append("error")
        found.append(type(torch.Generator()))
        os.write(to_rank[1], b".")

    def inside():
        torch.cuda.set_device(1)
        os.write(from_rank[1], b".")
        os.read(to_rank[0], 1)
        return torch.cuda.current_device()

    thread = threading.Thread(target=outside)
    thread.start()
    assert in_rank(inside) == 1
    thread.join()
    for end in (*from_rank, *to_rank):
        os.close(end)
    assert found == [(False, 0, False), 0, *["error"] * 13, torch.Generator]


def test_names_imported_before_the_run_are_answered_too():
    source = "from torch import Generator, zeros\nfrom torch.cuda import Stream, current_device\n"
    module = type(sys)("imported_before")
    module.__file__ = __file__
    exec(source, vars(module))
    sys.modules["imported_before"] = module
    try:

        def ask():
            assert module.zeros(1, device="cuda").device.type == "cpu"
            assert module.Generator("cuda").device.type == "cpu"
            assert module.Stream().device.index == module.current_device() == 0

        in_rank(ask)
    finally:
        del sys.modules["imported_before"]


def test_a_copy_of_a_tensor_from_a_world_can_be_used_outside():
    x = in_rank(lambda: torch.ones(2, device="cuda", pin_memory=False).pin_memory())
    assert torch.equal(copy.deepcopy(x).to("cpu") + 1, torch.full((2,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("outside_first", [False, True])
def test_torch_compile_works_in_a_world_and_after_it(outside_first):
    script = f"""
    import torch
    from lightrft.sim import SimWorld

    @torch.compile(backend="eager", fullgraph=True)
    def outside(x):
        return torch.zeros(3) + x.to("cpu") + torch.ones_like(x) + torch.rand(3) * 0

    @torch.compile(backend="eager", fullgraph=True)
    def inside(x):
        y = torch.zeros(3, device="cuda") + torch.ones_like(x, device="cuda:0")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = torch.ones(2, 2) @ torch.ones(2, 2)
        return x.to("cuda") + y.cuda(), z

    if {outside_first}:
        outside(torch.ones(3))
    x, z = SimWorld(1).run(lambda: inside(torch.ones(3)))[0]
    assert x.tolist() == [2.0, 2.0, 2.0] and z.dtype is torch.bfloat16
    torch._dynamo.reset()
    assert outside(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_fsdp2_imported_in_a_run_is_itself_after_it():
    script = """
    import sys
    from lightrft.sim import SimWorld

    def ask():
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.fsdp._fully_shard import _fsdp_init
        return hasattr(_fsdp_init._get_device_from_mesh, "__wrapped__")

    assert "torch.distributed.fsdp" not in sys.modules
    assert SimWorld(2).run(ask) == [True, True]
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard
    for module in (_fsdp_init, _fully_shard):
        assert not hasattr(module._get_device_from_mesh, "__wrapped__")
    assert SimWorld(2).run(ask) == [True, True]
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=120)
