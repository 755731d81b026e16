"""What a process owns, each rank owns: ranks that would disturb each other do not."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightrft.errors import SimWarning
from lightrft.sim import SimWorld, random_state


def interleaved(*steps, ranks=3, **options):
    """Run the steps on every rank, all ranks doing one step before any does the next; results of the last step."""

    def run():
        dist.init_process_group("gloo")
        for step in steps:
            result = step(dist.get_rank())
            dist.barrier()
        dist.destroy_process_group()
        return result

    return SimWorld(ranks, **options).run(run)


def test_torch_random_state_belongs_to_the_rank():
    def alone(rank):
        generator = torch.Generator().manual_seed(rank)
        return [torch.rand(3, generator=generator).tolist() for _ in range(2)]

    drawn = interleaved(
        torch.manual_seed,
        lambda rank: setattr(random, f"_first{rank}", torch.rand(3).tolist()),
        lambda rank: [random.__dict__.pop(f"_first{rank}"), torch.rand(3).tolist()],
    )
    assert drawn == [alone(rank) for rank in range(3)]


@pytest.mark.parametrize(
    ("seed", "draw"),
    [
        (torch.manual_seed, lambda: torch.rand(1).item()),
        (random.seed, random.random),
        (np.random.seed, lambda: float(np.random.rand())),
        (lambda seed: np.random.seed([seed]), lambda: float(np.random.rand())),
    ],
    ids=["torch", "python", "numpy", "numpy by an array"],
)
def test_a_seed_is_kept_although_nothing_was_drawn_before_the_switch(seed, draw):
    def alone(rank):
        seed(100 + rank)
        return draw()

    drawn = interleaved(lambda rank: seed(100 + rank), lambda rank: None, lambda rank: draw())
    with contextlib.ExitStack() as stack:
        python, numpy = random.getstate(), np.random.get_state()
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numpy)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        assert drawn == [alone(rank) for rank in range(3)]


def test_python_random_state_belongs_to_the_rank():
    drawn = interleaved(random.seed, lambda _: random.random(), lambda _: random.random())
    expected = []
    for rank in range(3):
        generator = random.Random(rank)
        generator.random()
        expected.append(generator.random())
    assert drawn == expected


def test_the_spare_gaussian_of_python_belongs_to_the_rank():
    drawn = interleaved(random.seed, lambda _: random.gauss(0, 1), lambda _: random.gauss(0, 1))
    expected = []
    for rank in range(3):
        generator = random.Random(rank)
        generator.gauss(0, 1)
        expected.append(generator.gauss(0, 1))
    assert drawn == expected


def test_numpy_random_state_belongs_to_the_rank():
    drawn = interleaved(np.random.seed, lambda _: np.random.rand(), lambda _: np.random.rand())
    expected = []
    for rank in range(3):
        generator = np.random.RandomState(rank)
        generator.rand()
        expected.append(generator.rand())
    assert drawn == expected


def test_the_spare_gaussian_of_numpy_belongs_to_the_rank():
    drawn = interleaved(
        np.random.seed,
        lambda rank: np.random.randn() if rank != 1 else None,
        lambda _: np.random.randn(),
        lambda _: np.random.randn(),
    )
    expected = []
    for rank in range(3):
        generator = np.random.RandomState(rank)
        values = [generator.randn() for _ in range(3)]
        expected.append(values[2] if rank != 1 else values[1])
    assert drawn == expected


@pytest.mark.parametrize("by_calls", [False, True])
def test_the_spare_gaussian_of_torch_belongs_to_the_rank(by_calls, monkeypatch):
    if by_calls:  # as for a release whose generator is laid out in another way
        monkeypatch.setattr(random_state, "torch_random", random_state.TorchRandomByCalls)
        random_state._fresh_torch.cache_clear()
    drawn = interleaved(
        torch.manual_seed,
        lambda rank: torch.randn(1) if rank != 1 else None,
        lambda _: torch.randn(1),
        lambda _: torch.randn(1).item(),
    )
    random_state._fresh_torch.cache_clear()
    expected = []
    for rank in range(3):
        generator = torch.Generator().manual_seed(rank)
        values = [torch.randn(1, generator=generator).item() for _ in range(3)]
        expected.append(values[2] if rank != 1 else values[1])
    assert drawn == expected


def test_ranks_that_seed_nothing_draw_differently_and_the_same_again():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    first, again, other = SimWorld(2).run(draw), SimWorld(2).run(draw), SimWorld(2, seed=1).run(draw)
    assert first == again
    assert len({*first, *other}) == 4


def test_the_environment_belongs_to_the_rank():
    seen = interleaved(
        lambda rank: os.environ.__setitem__("SHARD", str(rank)),
        lambda rank: os.environ.pop("HOME") if rank == 1 else None,
        lambda rank: (os.environ["SHARD"], "HOME" in os.environ, os.getenv("RANK")),
    )
    assert seen == [("0", True, "0"), ("1", False, "1"), ("2", True, "2")]


def test_a_child_process_inherits_the_environment_of_its_rank():
    seen = interleaved(
        lambda rank: os.environ.__setitem__("SHARD", str(rank)),
        lambda _: subprocess.run(["printenv", "SHARD"], capture_output=True, text=True, check=True).stdout.strip(),
    )
    assert seen == ["0", "1", "2"]


def test_the_working_directory_belongs_to_the_rank(tmp_path):
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    seen = interleaved(lambda rank: os.chdir(tmp_path / str(rank)) if rank else None, lambda _: os.getcwd())
    assert seen == [os.getcwd(), str(tmp_path / "1"), str(tmp_path / "2")]


def test_argv_belongs_to_the_rank():
    seen = interleaved(lambda rank: sys.argv.append(f"--rank={rank}"), lambda _: sys.argv[-1])
    assert seen == ["--rank=0", "--rank=1", "--rank=2"]


def test_the_default_dtype_belongs_to_the_rank():
    def choose(rank):
        if rank == 1:
            torch.set_default_dtype(torch.float64)

    assert interleaved(choose, lambda _: torch.zeros(1).dtype) == [torch.float32, torch.float64, torch.float32]


def test_deterministic_flags_belong_to_the_rank():
    def choose(rank):
        torch.use_deterministic_algorithms(rank == 1, warn_only=rank == 1)
        torch.backends.cudnn.benchmark = rank == 2
        torch.set_float32_matmul_precision("medium" if rank == 0 else "high")

    def read(_):
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
        )

    assert interleaved(choose, read) == [
        (False, False, False, "medium"),
        (True, True, False, "high"),
        (False, False, True, "high"),
    ]


def test_thread_local_state_of_torch_belongs_to_the_rank():
    def choose(rank):
        torch.set_grad_enabled(rank != 1)

    assert interleaved(choose, lambda _: torch.is_grad_enabled()) == [True, False, True]


def test_warning_filters_belong_to_the_rank():
    def choose(rank):
        warnings.simplefilter("ignore" if rank == 1 else "error")

    def warn(_):
        try:
            warnings.warn("look", UserWarning, stacklevel=1)
        except UserWarning:
            return "raised"
        return "ignored"

    assert interleaved(choose, warn) == ["raised", "ignored", "raised"]


def test_catching_warnings_across_a_collective_catches_the_own_ones():
    def run():
        dist.init_process_group("gloo")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dist.barrier()
            warnings.warn(f"from {dist.get_rank()}", UserWarning, stacklevel=1)
            dist.barrier()
        dist.destroy_process_group()
        return [str(w.message) for w in caught]

    assert SimWorld(3).run(run) == [["from 0"], ["from 1"], ["from 2"]]


def test_redirected_output_belongs_to_the_rank():
    def run():
        dist.init_process_group("gloo")
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            dist.barrier()
            sys.stdout.write(f"I am {dist.get_rank()}\n")
            dist.barrier()
        dist.destroy_process_group()
        return text.getvalue()

    assert SimWorld(2).run(run) == ["I am 0\n", "I am 1\n"]


def test_groups_names_and_tags_belong_to_the_rank():
    def run():
        dist.init_process_group("gloo")
        mine = dist.new_group([0, 1])
        everyone = dist.new_group([2, 0, 1])
        result = (
            dist.get_rank(everyone),
            dist.get_process_group_ranks(everyone),
            mine is dist.GroupMember.NON_GROUP_MEMBER,
            len(dist.distributed_c10d._world.pg_names),
        )
        dist.destroy_process_group()
        return (*result, dist.is_initialized())

    assert SimWorld(3).run(run) == [
        (0, [0, 1, 2], False, 3, False),
        (1, [0, 1, 2], False, 3, False),
        (2, [0, 1, 2], True, 2, False),
    ]


def test_a_rank_that_destroys_its_group_leaves_the_others_theirs():
    def run():
        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 0:
            dist.destroy_process_group()
            return dist.is_initialized()
        dist.barrier(dist.new_group([1, 2], use_local_synchronization=True))
        found = dist.is_initialized()
        dist.destroy_process_group()
        return found

    assert SimWorld(3).run(run) == [False, True, True]


# -- modules of the user's ---------------------------------------------------------------------------------------------

from .helpers_rank_local import parallel_state as state  # noqa: E402

PACKAGE = state.__name__.rpartition(".")[0]


def write_everywhere(rank):
    state.set_group(rank)
    state.SIZES["tensor"] = rank
    state.SIZES[f"only {rank}"] = rank
    state.NAMES.append(rank)
    state.SEEN.add(rank)
    state.Registry.count = rank
    state.Registry.table[rank] = rank
    state.Registry.extra = rank
    state.REGISTRY.entries[rank] = rank
    state.REGISTRY.label = rank
    state.remember(rank)
    state.tick()
    state.cached_group()


def read_everywhere(rank):
    return (
        state.GROUP,
        state.SIZES,
        state.NAMES,
        state.SEEN,
        state.Registry.count,
        state.Registry.table,
        state.Registry.extra,
        state.REGISTRY.entries,
        state.REGISTRY.label,
        state.remember("again"),
        state.tick(),
        state.cached_group(),
    ) == (
        rank,
        {"tensor": rank, f"only {rank}": rank},
        ["first", rank],
        {rank},
        rank,
        {rank: rank},
        rank,
        {rank: rank},
        rank,
        [rank, "again"],
        2,
        rank,
    )


def test_a_rank_local_module_gives_each_rank_its_own_globals():
    assert interleaved(write_everywhere, read_everywhere, rank_local=[PACKAGE]) == [True, True, True]


def test_a_rank_local_module_is_afterwards_as_it_was():
    interleaved(write_everywhere, read_everywhere, rank_local=[PACKAGE])
    assert (None, {"tensor": 1}, ["first"], set()) == (state.GROUP, state.SIZES, state.NAMES, state.SEEN)
    assert (state.Registry.count, state.Registry.table, state.REGISTRY.entries) == (0, {}, {})
    assert not hasattr(state.Registry, "extra")
    assert not hasattr(state.REGISTRY, "label")
    assert not hasattr(state.tick, "calls")
    assert state.remember("x") == ["x"]
    state.remember.__defaults__[0].clear()


def test_references_held_by_other_modules_stay_right():
    sizes = state.SIZES
    seen = interleaved(
        lambda rank: state.SIZES.__setitem__("tensor", rank), lambda _: sizes["tensor"], rank_local=[PACKAGE]
    )
    assert seen == [0, 1, 2]


def test_a_rank_local_module_may_be_imported_during_the_run():
    def load(rank):
        from .helpers_rank_local import late

        late.VALUES.append(rank)

    def read(_):
        from .helpers_rank_local import late

        return list(late.VALUES)

    sys.modules.pop(f"{PACKAGE}.late", None)
    assert interleaved(load, read, rank_local=[PACKAGE]) == [[0], [1], [2]]


def test_tensors_and_locks_of_a_rank_local_module_are_the_rank_s_own():
    def read(rank):
        state.guarded(dist.barrier)
        return state.LOSSES.tolist()

    assert interleaved(state.add_loss, read, rank_local=[PACKAGE]) == [[float(r)] * 2 for r in range(3)]
    assert state.LOSSES.tolist() == [0.0, 0.0]
    assert not state.LOCK.locked()


def test_a_rank_local_module_sleeps_in_virtual_time_too():
    original = state.sleep
    assert interleaved(lambda _: state.nap(), lambda _: time.time() > 1000, rank_local=[PACKAGE]) == [True] * 3
    assert state.sleep is original


def test_a_rank_local_module_that_reads_its_rank_when_imported_reads_the_right_one():
    def load(_):
        from .helpers_rank_local import configured

        assert configured.rank() == int(os.environ["RANK"])

    def read(_):
        from .helpers_rank_local import configured

        return configured.RANK, configured.rank(), dict(configured.PATHS), configured.Config.local_rank

    sys.modules.pop(f"{PACKAGE}.configured", None)
    seen = interleaved(load, read, rank_local=[f"{PACKAGE}.configured"], gpus_per_node=2)
    assert seen == [(r, r, {"shard": f"shard-{r}"}, r % 2) for r in range(3)]


def test_logging_of_the_root_belongs_to_the_rank():
    def choose(rank):
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, force=True)
        logging.getLogger("trainer")

    def read(_):
        return logging.getLogger("trainer").isEnabledFor(logging.INFO), len(logging.root.handlers)

    before = list(logging.root.handlers), logging.root.level
    assert interleaved(choose, read) == [(True, 1), (False, 1), (False, 1)]
    assert (logging.root.handlers, logging.root.level) == before


def test_without_rank_local_the_shared_globals_are_named():
    with pytest.warns(SimWarning) as caught:
        interleaved(write_everywhere)
    text = "\n".join(str(w.message) for w in caught)
    assert f"{state.__name__}.GROUP is one global for all simulated ranks" in text
    assert f"SimWorld(rank_local=[{state.__name__!r}])" in text
    assert f"--rank-local {state.__name__}" in text
    for name in ("SIZES", "NAMES", "SEEN"):
        assert f"{state.__name__}.{name} is one global" in text
    interleaved(lambda _: None)
    state.set_group(None)
    state.SIZES.clear()
    state.SIZES["tensor"] = 1
    state.NAMES[1:] = []
    state.SEEN.clear()
    state.cached_group.cache_clear()
    for container in (state.Registry.table, state.REGISTRY.entries, state.remember.__defaults__[0]):
        container.clear()
    state.Registry.count = 0
    del state.Registry.extra, state.REGISTRY.label, state.tick.calls


def test_a_global_that_one_rank_writes_is_nobody_s_business():
    interleaved(lambda rank: state.set_group("only") if rank == 0 else None)
    state.set_group(None)
