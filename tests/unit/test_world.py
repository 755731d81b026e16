"""``SimWorld.run``: what a rank finds, what comes back, and what is left behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightrft.errors import ConfigError, DeadlockError, RankFailedError, SimulationError, SimWarning, UnfinishedError
from lightrft.sim import SimWorld


def session(body, backend="nccl"):
    """A rank's life around ``body``: make the default group, run, destroy it."""

    def run():
        dist.init_process_group(backend)
        result = body()
        dist.destroy_process_group()
        return result

    return run


def rank():
    return dist.get_rank()


def test_results_come_back_by_rank():
    assert SimWorld(4).run(session(rank)) == [0, 1, 2, 3]


def test_arguments_reach_the_function():
    assert SimWorld(2).run(lambda a, *, b: (a, b), 1, b=2) == [(1, 2), (1, 2)]


def test_a_rank_finds_the_environment_that_torchrun_gives():
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"]
    found = SimWorld(6, gpus_per_node=4).run(lambda: [os.environ[name] for name in names])
    assert found[1] == ["1", "1", "6", "4", "0", "127.0.0.1"]
    assert found[5] == ["5", "1", "6", "2", "1", "127.0.0.1"]
    (port,) = SimWorld(1).run(lambda: os.environ["MASTER_PORT"])
    assert port.isdigit()


def test_there_is_no_process_group_at_first():
    assert SimWorld(2).run(dist.is_initialized) == [False, False]


@pytest.mark.parametrize("backend", ["nccl", "gloo", "cpu:gloo,cuda:nccl", None])
def test_every_backend_name_gives_the_simulated_group(backend):
    def total():
        tensor = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(tensor)
        return tensor.item(), dist.get_world_size()

    assert SimWorld(3).run(session(total, backend)) == [(3.0, 3)] * 3


@pytest.mark.parametrize("method", ["env://", "tcp://127.0.0.1:23456", "file:///nowhere/rendezvous"])
def test_every_way_to_meet_works(method):
    def run():
        environ = os.environ
        dist.init_process_group(
            "gloo", init_method=method, rank=int(environ["RANK"]), world_size=int(environ["WORLD_SIZE"])
        )
        dist.barrier()
        dist.destroy_process_group()
        return True

    assert SimWorld(2).run(run) == [True, True]


def test_a_rank_that_never_joins_is_named():
    def run():
        if os.environ["RANK"] != "2":
            dist.init_process_group("nccl")

    with pytest.raises(DeadlockError, match="4 workers to join") as caught:
        SimWorld(4).run(run)
    assert [culprit.rank for culprit in caught.value.report.culprits] == [2]


def test_one_world_runs_several_functions():
    world = SimWorld(2)
    assert world.run(session(rank)) == [0, 1]
    assert world.run(session(dist.get_world_size)) == [2, 2]


def test_a_world_inside_a_world_is_refused():
    with pytest.raises(RankFailedError, match="cannot be nested") as caught:
        SimWorld(2).run(lambda: SimWorld(2).run(lambda: None))
    assert isinstance(caught.value.__cause__, SimulationError)


def test_a_world_runs_after_one_that_failed():
    def fail():
        raise ValueError("broken")

    world = SimWorld(3)
    with pytest.raises(RankFailedError, match="broken"):
        world.run(fail)
    assert world.run(session(rank)) == [0, 1, 2]
    assert SimWorld(2).run(session(rank)) == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "at least 1"),
        ({"size": 2.0}, "number of ranks"),
        ({"size": 2, "gpus_per_node": 0}, "gpus_per_node=0"),
        ({"size": 2, "schedule": "lifo"}, "expected 'fifo' or 'random'"),
        ({"size": 2, "numerics": "exact"}, "rank, ring, tree, permuted"),
        ({"size": 2, "profile": "mpi"}, "strict, gloo, nccl"),
        ({"size": 2, "rank_local": "package"}, r"expected a list of module names, e.g. \['package'\]"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(settings, message):
    size = settings.pop("size")
    with pytest.raises(ConfigError, match=message):
        SimWorld(size, **settings)


def test_a_rank_local_module_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match="'no_such_module_at_all', but nothing imported"):
        SimWorld(2, rank_local=["no_such_module_at_all"]).run(lambda: None)


def test_an_exception_is_the_cause_and_comes_first():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() == 1:
            raise KeyError("reward")
        dist.barrier()

    with pytest.raises(RankFailedError) as caught:
        SimWorld(3).run(run)
    error = caught.value
    assert isinstance(error.__cause__, KeyError)
    text = str(error)
    assert text.startswith("rank 1 failed: KeyError")
    assert text.index("raise KeyError") < text.index("ranks 0, 2")
    assert "waits in barrier()" in text


def test_exit_zero_ends_a_rank_well_and_another_code_fails_the_run():
    assert SimWorld(2).run(lambda: sys.exit(0)) == [None, None]
    with pytest.raises(RankFailedError, match="SystemExit: 3"):
        SimWorld(2).run(lambda: sys.exit(3))


def test_work_nobody_waited_for_is_a_warning_and_an_error_when_strict():
    def run():
        dist.init_process_group("nccl")
        dist.all_reduce(torch.ones(2), async_op=True)
        dist.destroy_process_group()

    with pytest.warns(SimWarning, match="never waited for"):
        SimWorld(2).run(run)
    with pytest.raises(UnfinishedError, match="never waited for"):
        SimWorld(2, strict=True).run(run)


def test_a_group_nobody_destroyed_is_a_leftover():
    with pytest.raises(UnfinishedError, match="never destroyed it"):
        SimWorld(2, strict=True).run(lambda: dist.init_process_group("nccl"))


def snapshot():
    """Everything process-global that a run could disturb."""
    return {
        "threads": threading.active_count(),
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "argv": list(sys.argv),
        "path": list(sys.path),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": list(warnings.filters),
        "affinity": os.sched_getaffinity(0),
        "stack": threading.stack_size(),
        "frozen": gc.get_freeze_count(),
        "stdout": sys.stdout,
        "hook": (sys.excepthook, threading.excepthook),
        "world": dist.distributed_c10d._world,
        "main": sys.modules["__main__"],
        "handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "time": {k: v for k, v in vars(time).items() if callable(v)},
        "threading": {k: v for k, v in vars(threading).items() if callable(v)},
        "c10d": {k: v for k, v in vars(dist.distributed_c10d).items() if callable(v)},
        "dist": {k: v for k, v in vars(dist).items() if callable(v)},
        "torch functions": {k: v for k, v in vars(torch).items() if callable(v)},
        "tensor": dict(vars(torch.Tensor)),
        "cuda": {k: v for k, v in vars(torch.cuda).items() if callable(v)},
        "meta path": list(sys.meta_path),
    }


def disturb():
    dist.init_process_group("nccl")
    index = dist.get_rank()
    os.environ["DISTURBED"] = str(index)
    os.environ.pop("HOME", None)
    os.chdir("/")
    sys.argv.append("more")
    sys.path.insert(0, "elsewhere")
    torch.manual_seed(index)
    random.seed(index)
    np.random.seed(index)
    np.random.randn(1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=time.sleep, args=(1e9,), daemon=True).start()
    dist.barrier()


def c_environ(name):
    """What a child process sees, which inherits the environment of C."""
    return subprocess.run(["printenv", name], capture_output=True, text=True, check=False).stdout.strip()


def end_well():
    disturb()
    dist.destroy_process_group()


def end_in_an_exception():
    disturb()
    if dist.get_rank() == 1:
        raise ValueError
    dist.barrier()


def end_in_a_deadlock():
    disturb()
    if dist.get_rank() == 1:
        dist.barrier()


def end_in_an_interrupt():
    disturb()
    if dist.get_rank() == 1:
        signal.raise_signal(signal.SIGINT)
        while True:
            pass
    dist.barrier()


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        (end_well, None),
        (end_in_an_exception, RankFailedError),
        (end_in_a_deadlock, DeadlockError),
        (end_in_an_interrupt, KeyboardInterrupt),
    ],
)
def test_the_process_is_afterwards_as_it_was(ending, error):
    torch.use_deterministic_algorithms(False)  # imports what is imported lazily
    SimWorld(2).run(lambda: None)
    before, home = snapshot(), c_environ("HOME")
    if error is None:
        SimWorld(3).run(ending)
    else:
        with pytest.raises(error):
            SimWorld(3).run(ending)
    after = snapshot()
    for name in before:
        assert before[name] == after[name], name
    assert c_environ("DISTURBED") == ""
    assert c_environ("HOME") == home


def test_garbage_is_collected_as_often_as_in_a_process_of_one_rank():
    before = gc.get_threshold()

    def threshold():
        found = gc.get_threshold()
        gc.set_threshold(*found[:2], found[2] + 1)
        return found

    assert SimWorld(4).run(threshold)[0] == (4 * before[0], *before[1:])
    assert gc.get_threshold() == before
    assert SimWorld(100).run(gc.get_threshold)[0] == (64 * before[0], *before[1:])


def wait_for_ctrl_c(handled):
    dist.init_process_group("gloo")
    rank, seen = dist.get_rank(), []
    if handled(rank):
        signal.signal(signal.SIGINT, lambda number, _: seen.append((number, dist.get_rank())))
    dist.barrier()
    if rank == 1:
        signal.raise_signal(signal.SIGINT)
    until = time.clock_gettime(time.CLOCK_MONOTONIC) + 5
    both = torch.zeros(1)
    while not both and time.clock_gettime(time.CLOCK_MONOTONIC) < until:
        both = torch.tensor([float(len(seen))])
        dist.all_reduce(both, dist.ReduceOp.MIN)
    dist.destroy_process_group()
    return seen


def test_ctrl_c_goes_to_each_rank_that_handles_it(capsys):
    world = SimWorld(3, stall_after=0.2, stall_limit=15)
    for _ in range(2):
        found = world.run(wait_for_ctrl_c, lambda rank: True)
        assert found == [[(signal.SIGINT, rank)] for rank in range(3)]
        assert capsys.readouterr().err == "Ctrl-C: the ranks handle it; another one ends the run at once\n"


def test_ctrl_c_that_a_rank_does_not_handle_ends_the_run():
    with pytest.raises(KeyboardInterrupt):
        SimWorld(3, stall_after=0.2, stall_limit=15).run(wait_for_ctrl_c, lambda rank: rank < 2)


@pytest.mark.slow
def test_a_thousand_small_worlds_leave_no_thread_and_no_object():
    body = session(dist.barrier)
    for _ in range(20):
        SimWorld(4).run(body)
    gc.collect()
    threads, objects = threading.active_count(), len(gc.get_objects())
    for _ in range(100):
        SimWorld(4).run(body)
    assert threading.active_count() == threads
    assert len(gc.get_objects()) - objects < 200
