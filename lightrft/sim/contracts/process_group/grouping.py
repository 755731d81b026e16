"""PG701 and on: which ranks a group has, and how groups begin and end."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import Again, Subject, members, mine


@contract.check(701)
def check_the_default_group(subject: Subject) -> None:
    """The default group has all ranks, in order, and knows its rank and size."""

    def body() -> object:
        world = dist.group.WORLD
        return dist.get_rank(), dist.get_world_size(), members(world), dist.get_process_group_ranks(world)

    subject.expect(body, lambda rank, size: (rank, size, list(range(size)), list(range(size))), ranks=5)


@contract.check(702)
def check_a_world_of_one(subject: Subject) -> None:
    """A group of one rank is a group: every collective returns what it was given."""

    def body() -> object:
        tensor, outputs, output = mine(), [torch.empty(2)], torch.empty(2)
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        dist.all_gather(outputs, tensor)
        dist.reduce_scatter(output, outputs)
        dist.all_to_all_single(tensor, output)
        dist.barrier()
        return tensor.tolist()

    subject.expect(body, lambda _rank, _size: [0.0, 1.0], ranks=1)


@contract.check(703)
def check_groups_of_any_ranks(subject: Subject) -> None:
    """`new_group` makes groups of any ranks, which know their members."""
    wanted = [[0], [3], [1, 4], [0, 2, 3], [0, 1, 2, 3, 4]]

    def body() -> object:
        groups = [dist.new_group(ranks) for ranks in wanted]
        return [members(group) for group in groups]

    subject.expect(body, lambda rank, _size: [ranks if rank in ranks else None for ranks in wanted], ranks=5, least=5)


@contract.check(704)
def check_ranks_are_sorted(subject: Subject) -> None:
    """`new_group` sorts its ranks."""

    def body() -> object:
        group = dist.new_group([3, 0, 2])
        return members(group), dist.get_rank(group)

    subject.expect(
        body,
        lambda rank, _size: ([0, 2, 3], [0, 2, 3].index(rank)) if rank != 1 else (None, -1),
        ranks=4,
        least=4,
    )


@contract.check(705, "rank_order")
def check_ranks_in_an_order_of_their_own(subject: Subject) -> None:
    """With `sort_ranks=False`, `new_group` keeps the order of its ranks, and collectives follow it."""

    def body() -> object:
        group = dist.new_group([3, 0, 2], sort_ranks=False)
        if dist.get_rank() == 1:
            return None
        tensor, output = mine(1), torch.empty(1)
        dist.broadcast(tensor, 3, group=group)
        parts = [torch.tensor([float(value)]) for value in (10, 11, 12)] if dist.get_rank() == 0 else None
        dist.scatter(output, parts, 0, group=group)
        return members(group), dist.get_rank(group), tensor.item(), output.item()

    def expected(rank: int, _size: int) -> object:
        ranks = [3, 0, 2]
        return None if rank == 1 else (ranks, ranks.index(rank), 30.0, 10.0 + ranks.index(rank))

    subject.expect(body, expected, ranks=4, least=4)


@contract.check(706)
def check_ranks_outside_a_group(subject: Subject) -> None:
    """A rank outside of a group has rank and size -1 there, and its calls do nothing."""

    def body() -> object:
        group, tensor = dist.new_group([0, 2]), torch.ones(1)
        dist.all_reduce(tensor, group=group)
        dist.barrier(group)
        return dist.get_rank(group), dist.get_world_size(group), tensor.item()

    subject.expect(body, lambda rank, _size: {0: (0, 2, 2.0), 1: (-1, -1, 1.0), 2: (1, 2, 2.0)}[rank], least=3)


@contract.check(707)
def check_a_rank_in_no_group(subject: Subject) -> None:
    """A rank may be in none of the groups that all make, and goes on."""

    def body() -> object:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        found = [members(group) for group in groups]
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        return found, tensor.item()

    def expected(rank: int, size: int) -> object:
        pairs = [[0, 1] if rank in (0, 1) else None, [2, 3] if rank in (2, 3) else None]
        return pairs, float(size)

    subject.expect(body, expected, ranks=5, least=5)


@contract.check(708)
def check_groups_of_the_same_ranks(subject: Subject) -> None:
    """Groups of the same ranks are different groups."""

    def body() -> object:
        groups = [dist.new_group([0, 1]) for _ in range(3)]
        tensors = [torch.full((1,), 10.0**position) for position in range(3)]
        works = [dist.all_reduce(t, group=g, async_op=True) for t, g in zip(tensors, groups, strict=True)]
        for work in reversed(works):
            work.wait()
        return [tensor.item() for tensor in tensors], len({group.group_name for group in groups})

    subject.expect(body, lambda _rank, _size: ([2.0, 20.0, 200.0], 3), ranks=2, least=2)


@contract.check(709)
def check_rows_and_columns(subject: Subject) -> None:
    """Reducing along the rows and then along the columns of a grid is reducing over all."""

    def body() -> object:
        rank, tensor = dist.get_rank(), mine(1)
        rows = [dist.new_group([0, 1, 2]), dist.new_group([3, 4, 5])]
        columns = [dist.new_group([column, column + 3]) for column in range(3)]
        dist.all_reduce(tensor, group=rows[rank // 3])
        dist.all_reduce(tensor, group=columns[rank % 3])
        return tensor.item()

    subject.expect(body, lambda _rank, _size: 150.0, ranks=6, least=6)


@contract.check(710)
def check_nested_groups(subject: Subject) -> None:
    """Groups may contain and overlap one another."""
    wanted = [[0, 1, 2, 3], [0, 1, 2], [1, 2, 3], [1, 2], [2]]

    def body() -> object:
        found = []
        for group in [dist.new_group(ranks) for ranks in wanted]:
            tensor = mine(1)
            dist.all_reduce(tensor, group=group)
            found.append(tensor.item())
        return found

    subject.expect(
        body,
        lambda rank, _size: [10.0 * (sum(ranks) if rank in ranks else rank) for ranks in wanted],
        ranks=4,
        least=4,
    )


@contract.check(711)
def check_roots_are_ranks_of_the_world(subject: Subject) -> None:
    """The root of a collective in a sub-group is a rank of the world."""

    def body() -> object:
        rank, group = dist.get_rank(), dist.new_group([1, 3])
        if rank not in (1, 3):
            return None
        shared, reduced, output, gathered = mine(1), mine(1), torch.empty(1), [torch.empty(1), torch.empty(1)]
        dist.broadcast(shared, 3, group=group)
        dist.reduce(reduced, 3, group=group)
        dist.scatter(output, [mine(1), mine(1) + 1] if rank == 3 else None, 3, group=group)
        dist.gather(mine(1), gathered if rank == 3 else None, 3, group=group)
        at_root = [reduced.item(), *(tensor.item() for tensor in gathered)] if rank == 3 else None
        return shared.item(), output.item(), at_root

    subject.expect(
        body,
        lambda rank, _size: {1: (30.0, 30.0, None), 3: (30.0, 31.0, [40.0, 10.0, 30.0])}.get(rank),
        ranks=4,
        least=4,
    )


@contract.check(712)
def check_roots_may_be_ranks_of_the_group(subject: Subject) -> None:
    """`group_src` and `group_dst` are ranks of the group."""

    def body() -> object:
        rank, group = dist.get_rank(), dist.new_group([1, 3])
        if rank not in (1, 3):
            return None
        shared, reduced = mine(1), mine(1)
        dist.broadcast(shared, group=group, group_src=1)
        dist.reduce(reduced, group=group, group_dst=0)
        return shared.item(), reduced.item() if rank == 1 else None

    subject.expect(body, lambda rank, _size: {1: (30.0, 40.0), 3: (30.0, None)}.get(rank), ranks=4, least=4)


@contract.check(713)
def check_ranks_are_translated(subject: Subject) -> None:
    """`get_global_rank` and `get_group_rank` translate between the ranks of the world and of a group."""

    def body() -> object:
        group = dist.new_group([1, 2, 4])
        if dist.get_rank() in (0, 3):
            return None
        there = [dist.get_global_rank(group, position) for position in range(3)]
        return there, [dist.get_group_rank(group, rank) for rank in there]

    subject.expect(body, lambda rank, _size: ([1, 2, 4], [0, 1, 2]) if rank in (1, 2, 4) else None, ranks=5, least=5)


@contract.check(714)
def check_new_subgroups(subject: Subject) -> None:
    """`new_subgroups` cuts the world into equal parts."""

    def body() -> object:
        own, groups = dist.new_subgroups(group_size=2)
        return members(own), len(groups)

    subject.expect(body, lambda rank, _size: ([rank // 2 * 2, rank // 2 * 2 + 1], 3), ranks=6, least=6)


@contract.check(715)
def check_new_subgroups_by_enumeration(subject: Subject) -> None:
    """`new_subgroups_by_enumeration` takes any disjoint lists of ranks."""

    def body() -> object:
        own, _groups = dist.new_subgroups_by_enumeration([[0, 4], [1, 2]])
        return members(own)

    subject.expect(body, lambda rank, _size: {0: [0, 4], 4: [0, 4], 1: [1, 2], 2: [1, 2]}.get(rank), ranks=5, least=5)


@contract.check(716)
def check_members_alone_may_make_a_group(subject: Subject) -> None:
    """With `use_local_synchronization` only the members of a group make it."""

    def body() -> object:
        pair = [0, 1] if dist.get_rank() < 2 else [2, 3]
        return members(dist.new_group(pair, use_local_synchronization=True))

    subject.expect(body, lambda rank, _size: [0, 1] if rank < 2 else [2, 3], ranks=4, least=4)


@contract.check(717, "split_group")
def check_split_group(subject: Subject) -> None:
    """`split_group` gives every rank its part of the parent."""

    def body() -> object:
        half = dist.split_group(split_ranks=[[0, 1], [2, 3]])
        alone = dist.split_group(half, [[0], [1]])
        return members(half), members(alone)

    found = subject.run(body, ranks=4, least=4, bound=True)
    assert found == [([0, 1], [0]), ([0, 1], [1]), ([2, 3], [2]), ([2, 3], [3])], found


@contract.check(718)
def check_a_group_may_be_made_again(subject: Subject) -> None:
    """After `destroy_process_group` there is no group, and `init_process_group` makes another one."""
    backend = subject.backend

    def body() -> object:
        found: list[object] = []
        for _ in range(2):
            again = Again(backend)
            dist.destroy_process_group()
            found.append(dist.is_initialized())
            again.init()
            found.append(members(dist.group.WORLD))
        return found

    subject.expect(body, lambda _rank, size: [False, list(range(size))] * 2)


@contract.check(719)
def check_one_group_may_end_while_others_stay(subject: Subject) -> None:
    """A sub-group may be destroyed while others stay, and made again."""

    def body() -> object:
        one, two = dist.new_group([0, 1]), dist.new_group([1, 2])
        if dist.get_rank() in (0, 1):
            dist.destroy_process_group(one)
        again = dist.new_group([0, 1])
        return members(two), members(again), members(dist.group.WORLD)

    def expected(rank: int, _size: int) -> object:
        return [1, 2] if rank else None, [0, 1] if rank < 2 else None, [0, 1, 2]

    subject.expect(body, expected, least=3)


@contract.check(720)
def check_sequences_of_groups_are_apart(subject: Subject) -> None:
    """How often a rank used one group does not matter to another."""

    def body() -> object:
        pair, tensor = dist.new_group([0, 1]), mine(1)
        if dist.get_rank() < 2:
            for _ in range(3):
                dist.all_reduce(tensor, group=pair)
        dist.all_reduce(tensor)
        return tensor.item()

    subject.expect(body, lambda _rank, _size: 100.0, least=3)
