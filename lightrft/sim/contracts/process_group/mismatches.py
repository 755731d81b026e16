"""PG951 and on: what ranks disagree about.

Real ranks hang, crash, or reinterpret the bytes; simulated ranks say who disagrees about what, and where.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError, DeadlockError, SimulationError
from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import Body, Subject, mine


def _mismatch(subject: Subject, body: Body, *words: str, ranks: int = 3) -> None:
    """The run of ``body``, in which rank 2, or the last one, does another thing than the others, names that rank."""
    _names(subject, body, CollectiveMismatchError, f"rank {ranks - 1}", *words, ranks=ranks)


def _names(subject: Subject, body: Body, kind: type[SimulationError], *words: str, ranks: int = 3) -> None:
    error = subject.fails(body, ranks)
    assert type(error) is kind, repr(error)
    missing = [word for word in (*words, "mismatches.py") if word not in str(error)]
    assert not missing, f"expected {missing} in\n{error}"


def _odd() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


@contract.check(951, "names_mismatches", probed=False)
def check_another_operation(subject: Subject) -> None:
    """A rank that calls another collective than the others is named."""
    _mismatch(
        subject, lambda: dist.broadcast(mine(), 0) if _odd() else dist.all_reduce(mine()), "broadcast", "all_reduce"
    )


@contract.check(952, "names_mismatches", probed=False)
def check_another_size(subject: Subject) -> None:
    """A rank whose tensor has another size is named."""
    _mismatch(subject, lambda: dist.all_reduce(mine(3 if _odd() else 2)), "[3]", "[2]")


@contract.check(953, "names_mismatches", probed=False)
def check_another_dtype(subject: Subject) -> None:
    """A rank whose tensor has another dtype is named."""
    _mismatch(
        subject,
        lambda: dist.all_reduce(mine(dtype=torch.float16 if _odd() else torch.float32)),
        "float16",
        "float32",
    )


@contract.check(954, "names_mismatches", probed=False)
def check_another_reduction(subject: Subject) -> None:
    """A rank that asks for another reduction is named."""
    _mismatch(
        subject, lambda: dist.all_reduce(mine(), dist.ReduceOp.MAX if _odd() else dist.ReduceOp.SUM), "MAX", "SUM"
    )


@contract.check(955, "names_mismatches", probed=False)
def check_another_root(subject: Subject) -> None:
    """A rank that believes in another root is named."""
    _mismatch(subject, lambda: dist.broadcast(mine(), 1 if _odd() else 0), "root 1", "root 0")


@contract.check(956, "names_mismatches", probed=False)
def check_splits_that_do_not_fit(subject: Subject) -> None:
    """A pair of ranks whose splits do not fit together is named."""

    def body() -> None:
        output = [2, 1, 1] if _odd() else [1, 1, 1]
        dist.all_to_all_single(torch.empty(sum(output)), mine(3), output, [1, 1, 1])

    _mismatch(subject, body, "split sizes differ")


@contract.check(957, "names_mismatches", probed=False)
def check_messages_that_do_not_fit(subject: Subject) -> None:
    """A message whose sender and receiver disagree about its dtype is named."""

    def body() -> None:
        if dist.get_rank() == 0:
            dist.send(mine(), 1)
        else:
            dist.recv(mine(dtype=torch.float64), 0)

    _mismatch(subject, body, "dtypes differ", ranks=2)


@contract.check(958, "names_mismatches", probed=False)
def check_groups_made_in_another_order(subject: Subject) -> None:
    """Ranks that make different groups are named."""

    def body() -> None:
        for ranks in ([1, 2], [0, 1]) if _odd() else ([0, 1], [1, 2]):
            dist.new_group(ranks)

    _mismatch(subject, body, "different groups")


@contract.check(959, "names_mismatches", probed=False)
def check_a_rank_that_does_not_come(subject: Subject) -> None:
    """A rank that leaves a collective out while others wait in it is named."""

    def body() -> None:
        if not _odd():
            dist.all_reduce(mine())

    _names(subject, body, DeadlockError, "rank 2", "all_reduce")


@contract.check(960, "names_mismatches", probed=False)
def check_groups_crossed_synchronously(subject: Subject) -> None:
    """Two groups entered in another order, waiting in each, are a deadlock."""

    def body() -> None:
        groups = [dist.new_group(), dist.new_group()]
        for group in groups[::-1] if _odd() else groups:
            dist.all_reduce(mine(), group=group)

    _names(subject, body, DeadlockError, "all_reduce")


@contract.check(961, "names_mismatches", probed=False)
def check_a_message_that_is_never_sent(subject: Subject) -> None:
    """A `recv` whose message is never sent is a deadlock."""

    def body() -> None:
        if _odd():
            dist.recv(mine(), 0)

    _names(subject, body, DeadlockError, "recv", "rank 2")


@contract.check(962, "names_mismatches", probed=False)
def check_one_call_too_many(subject: Subject) -> None:
    """A rank that makes one call more than the others is named."""

    def body() -> None:
        for _ in range(3 if _odd() else 2):
            dist.all_reduce(mine())
        dist.barrier()

    _mismatch(subject, body, "all_reduce", "barrier")
