"""The contract of process groups, checked of simulated ranks under every profile."""

from contextlib import suppress
from unittest import SkipTest

import pytest

from lightrft.sim import SimWorld, contracts
from lightrft.sim.contracts.process_group import LACKS, Subject

SUBJECTS = {
    "simulated gloo": ("gloo", "gloo"),
    "simulated nccl": ("nccl", "nccl"),
    "strict, on gloo": ("strict", "gloo"),
    "strict, on nccl": ("strict", "nccl"),
    "strict, on any backend": ("strict", "cpu:gloo,cuda:nccl"),
}


def subject(name, most_ranks=None, **options):
    profile, backend = SUBJECTS[name]
    return Subject(
        world=lambda size: SimWorld(size, profile=profile, **options),
        backend=backend,
        name=name,
        lacks=LACKS[name],
        device="cuda" if profile == "nccl" else "cpu",
        most_ranks=most_ranks,
    )


# What the strict profile takes, it takes on every backend: the usual tests take the one of both.
SLOW = ("strict, on gloo", "strict, on nccl")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SUBJECTS]
)
@contracts.process_group.parametrize()
def test_simulated_ranks_keep_the_contract(check, name):
    check(subject(name))


@pytest.mark.slow
@contracts.process_group.parametrize()
def test_they_keep_it_in_a_random_order(check):
    check(subject("simulated gloo", schedule="random", seed=1))


def test_most_of_it_makes_sense_on_one_rank():
    """As on a machine with one GPU."""
    checked = []
    for check in contracts.process_group.CHECKS:
        with suppress(SkipTest):
            check(subject("simulated nccl", most_ranks=1))
            checked.append(check.number)
    assert len(checked) > 120
