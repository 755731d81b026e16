"""Two dimensions: layers split over pairs of ranks by columns and rows, data over the pairs.

lightrft sim -n 8 examples/sim/tensor_parallel.py
torchrun --nproc-per-node 2 examples/sim/tensor_parallel.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen = nn.Linear(32, 128)
        self.narrow = nn.Linear(128, 32)

    def forward(self, x):
        return self.narrow(torch.relu(self.widen(x)))


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(0)
    model = Network()
    parallelize_module(model, mesh["model"], {"widen": ColwiseParallel(), "narrow": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(mesh["data"].get_local_rank())
    x = torch.randn(8, 32, generator=generator)
    for step in range(5):
        loss = nn.functional.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {mean.item():.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
