"""What a user tries first: data-parallel training by the wrappers of torch, unmodified."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightrft.errors import DeadlockError, SimulationError
from lightrft.sim import SimWorld

RANKS = 4
STEPS = 3


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))


def batch(rank, step):
    return torch.full((2, 4), float(rank + step))


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for data in batches:
        model(data).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def reference():
    """One process that sees all batches at once: the mean over ranks is the mean over all rows."""
    model = train(make_model(), [torch.cat([batch(r, step) for r in range(RANKS)]) for step in range(STEPS)])
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_ddp_trains_as_one_process_would(backend):
    def run():
        dist.init_process_group(backend)
        model = DistributedDataParallel(make_model())
        train(model, [batch(dist.get_rank(), step) for step in range(STEPS)])
        dist.destroy_process_group()
        return [parameter.detach() for parameter in model.parameters()]

    for parameters in SimWorld(RANKS).run(run):
        torch.testing.assert_close(parameters, reference())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fsdp2_trains_as_one_process_would(device):
    def run():
        dist.init_process_group("nccl")
        mesh = dist.init_device_mesh(device, (RANKS,))
        model = make_model()
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, [batch(dist.get_rank(), step) for step in range(STEPS)])
        full = [parameter.full_tensor().detach() for parameter in model.parameters()]
        dist.destroy_process_group()
        return full

    for parameters in SimWorld(RANKS).run(run):
        torch.testing.assert_close(parameters, reference())


def test_synchronizing_the_device_completes_what_nccl_was_asked_for():
    def run(backend):
        dist.init_process_group(backend)
        total = torch.ones(2, device="cuda")
        dist.all_reduce(total, async_op=True)
        torch.cuda.synchronize()
        dist.destroy_process_group()
        return total.tolist()

    assert SimWorld(3, strict=True).run(run, "nccl") == [[3.0, 3.0]] * 3
    with pytest.raises(SimulationError, match="never waited for"):
        SimWorld(3, strict=True).run(run, "gloo")


def test_ddp_with_an_uneven_loader_is_named():
    def run():
        dist.init_process_group("gloo")
        model = DistributedDataParallel(make_model())
        steps = STEPS - 1 if dist.get_rank() == 2 else STEPS
        train(model, [batch(dist.get_rank(), step) for step in range(steps)])
        dist.destroy_process_group()

    with pytest.raises((DeadlockError, SimulationError)) as caught:
        SimWorld(RANKS).run(run)
    assert [culprit.rank for culprit in caught.value.report.culprits] == [2]
    assert "model(data).mean().backward()" in str(caught.value)
