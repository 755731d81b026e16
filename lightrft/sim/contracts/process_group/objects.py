"""PG301 and on: collectives of Python objects."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import Subject, last_rank


@contract.check(301)
def check_all_gather_object(subject: Subject) -> None:
    """`all_gather_object` gives every rank everybody's object, in rank order, whatever their sizes."""

    def body() -> object:
        found: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(found, {"rank": dist.get_rank(), "text": "x" * 1000 * dist.get_rank()})
        return found

    subject.expect(body, lambda _rank, size: [{"rank": owner, "text": "x" * 1000 * owner} for owner in range(size)])


@contract.check(302)
def check_gather_object(subject: Subject) -> None:
    """`gather_object` gives its root everybody's object."""

    def body() -> object:
        found: list[object] | None = [None] * dist.get_world_size() if dist.get_rank() == last_rank() else None
        dist.gather_object((dist.get_rank(), "x"), found, last_rank())
        return found

    subject.expect(body, lambda rank, size: [(owner, "x") for owner in range(size)] if rank == size - 1 else None)


@contract.check(303)
def check_broadcast_object_list(subject: Subject) -> None:
    """`broadcast_object_list` replaces everybody's objects by those of its root."""

    def body() -> object:
        objects: list[object] = [dist.get_rank(), "x" * dist.get_rank(), None]
        dist.broadcast_object_list(objects, last_rank())
        return objects

    subject.expect(body, lambda _rank, size: [size - 1, "x" * (size - 1), None])


@contract.check(304)
def check_scatter_object_list(subject: Subject) -> None:
    """`scatter_object_list` gives rank `r` the `r`-th object of its root."""

    def body() -> object:
        found: list[object] = [None]
        at_root = dist.get_rank() == last_rank()
        given = ["x" * owner for owner in range(dist.get_world_size())] if at_root else None
        dist.scatter_object_list(found, given, last_rank())
        return found

    subject.expect(body, lambda rank, _size: ["x" * rank])


@contract.check(305)
def check_send_object_list(subject: Subject) -> None:
    """`send_object_list` and `recv_object_list` carry objects from one rank to another."""

    def body() -> object:
        objects: list[object] = [None, None]
        if dist.get_rank() == 0:
            dist.send_object_list([{"a": 1}, "b"], 1)
        if dist.get_rank() == 1:
            dist.recv_object_list(objects, 0)
        return objects

    subject.expect(body, lambda rank, _size: [{"a": 1}, "b"] if rank == 1 else [None, None], least=2)


@contract.check(306)
def check_objects_are_copies(subject: Subject) -> None:
    """An object that arrives is a copy, on the rank that gave it too."""

    def body() -> object:
        given: list[int] = []
        found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, given)
        for objects in found:
            objects.append(1)
        return given, found

    subject.expect(body, lambda _rank, size: ([], [[1]] * size))


@contract.check(307)
def check_objects_in_groups(subject: Subject) -> None:
    """Objects travel in sub-groups, where a root is a rank of the whole world."""

    def body() -> object:
        rank, group = dist.get_rank(), dist.new_group([1, 3])
        if rank not in (1, 3):
            return None
        gathered: list[object] = [None, None]
        shared: list[object] = [rank]
        dist.all_gather_object(gathered, rank, group=group)
        dist.broadcast_object_list(shared, 3, group=group)
        return gathered, shared

    subject.expect(body, lambda rank, _size: ([1, 3], [3]) if rank in (1, 3) else None, ranks=4, least=4)


@contract.check(308)
def check_tensors_in_objects(subject: Subject) -> None:
    """Objects may hold tensors."""

    def body() -> object:
        found: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, {"tensor": torch.full((2,), dist.get_rank(), device="cpu")})
        return [entry["tensor"].tolist() for entry in found]

    subject.expect(body, lambda _rank, size: [[owner, owner] for owner in range(size)])


@contract.check(309)
def check_objects_that_cannot_be_pickled(subject: Subject) -> None:
    """An object that cannot be pickled is an error on the rank that gives it."""

    def body() -> None:
        try:
            dist.all_gather_object([None] * dist.get_world_size(), lambda: None)
        except Exception as error:
            raise ValueError(str(error)) from error  # which class pickle raises depends on its version

    subject.refuses(body)
