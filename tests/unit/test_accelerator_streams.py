"""Streams and events of simulated devices."""

import time

import pytest
import torch
from ranks_with_devices import accelerator_of_rank, in_rank, local_rank, on_two_ranks, start_group


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
