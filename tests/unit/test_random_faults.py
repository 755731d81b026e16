"""Training steps drawn at random, with one fault on one rank: exactly that rank is to blame.

The ranks form a mesh; every call runs over the tensor-parallel group, the data-parallel group or the world. In groups
of two a majority says nothing, so the ranks outside the group have to be heard.
"""

import linecache
from random import Random

import pytest

from lightrft.errors import CollectiveMismatchError, DeadlockError
from lightrft.sim import SimWorld

MESHES = [(2, 2), (2, 3), (3, 2), (2, 4), (4, 2)]
GROUPS = ("tensor", "data", "None")
FAULTS = ("skip", "return", "extra call", "wrong group", "fewer rounds", "more rounds")
SETUP = """
import torch
import torch.distributed as dist

def step():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    tensor_groups = [dist.new_group([row * {width} + column for column in range({width})]) for row in range({height})]
    data_groups = [dist.new_group([row * {width} + column for row in range({height})]) for column in range({width})]
    tensor, data = tensor_groups[rank // {width}], data_groups[rank % {width}]
"""


def draw_call(random: Random, group: str) -> str:
    size = random.choice((4, 4, 8))
    return random.choice(
        (
            f"dist.all_reduce(torch.ones({size}), group={group})",
            f"dist.barrier(group={group})",
            f"dist.broadcast(torch.ones({size}), group_src=0, group={group})",
        )
    )


def faulty(random: Random, fault: str, rank: int, call: str, group: str) -> list[str]:
    match fault:
        case "skip":
            return [f"if rank != {rank}:", f"    {call}"]
        case "return":
            return [f"if rank == {rank}:", "    return", call]
        case "extra call":
            return [f"if rank == {rank}:", f"    dist.all_reduce(torch.ones(3), group={random.choice(GROUPS)})", call]
        case "wrong group":
            other = random.choice([name for name in GROUPS if name != group])
            wrong = call.replace(f"group={group}", f"group={other}")
            return [f"if rank == {rank}:", f"    {wrong}", "else:", f"    {call}"]
        case "fewer rounds":
            return [f"for _ in range(2 if rank == {rank} else 3):", f"    {call}"]
    return [f"for _ in range(3 if rank == {rank} else 2):", f"    {call}"]


def draw_program(random: Random, fault: str) -> tuple[str, int, int]:
    """Source of a program, its number of ranks, and the rank with the fault."""
    height, width = random.choice(MESHES)
    culprit, calls = random.randrange(height * width), random.randint(2, 6)
    lines, position = [], random.randrange(calls)
    for index in range(calls):
        group = random.choice(GROUPS)
        call = draw_call(random, group)
        lines += faulty(random, fault, culprit, call, group) if index == position else [call]
    body = "".join(f"    {line}\n" for line in [*lines, "dist.destroy_process_group()"])
    return SETUP.format(width=width, height=height) + body, height * width, culprit


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_fault_is_blamed_on_its_rank_alone(fault, seed):
    random = Random(f"{fault} {seed}")
    for attempt in range(3):
        source, size, culprit = draw_program(random, fault)
        name = f"/fault/{fault}-{seed}-{attempt}.py"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        namespace: dict = {}
        exec(compile(source, name, "exec"), namespace)
        with pytest.raises((DeadlockError, CollectiveMismatchError)) as caught:
            SimWorld(size, schedule="random", seed=seed).run(namespace["step"])
        blamed = {culprit.rank for culprit in caught.value.report.culprits}
        assert blamed == {culprit}, f"{source}\n{caught.value}"
