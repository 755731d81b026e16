"""The contract of process groups, checked of simulated ranks under every profile."""

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


def subject(name, **options):
    profile, backend = SUBJECTS[name]
    return Subject(
        world=lambda size: SimWorld(size, profile=profile, **options),
        backend=backend,
        name=name,
        lacks=LACKS[name],
    )


@pytest.mark.parametrize("name", SUBJECTS)
@contracts.process_group.parametrize()
def test_simulated_ranks_keep_the_contract(check, name):
    check(subject(name))


@pytest.mark.parametrize("seed", [1])
@contracts.process_group.parametrize()
def test_they_keep_it_in_any_order(check, seed):
    check(subject("simulated gloo", schedule="random", seed=seed))
