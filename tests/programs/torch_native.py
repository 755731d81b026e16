"""DDP, FSDP2, tensor parallelism and data loading, as torch offers them."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from programs import tiny


def plain(steps=3, ranks=4, clip=None):
    """One process that sees the batches of all ranks: what data parallelism has to equal."""
    model = tiny.transformer()
    optimizer = tiny.sgd(model.parameters())
    norms = []
    for step in range(steps):
        for rank in range(ranks):
            ids = tiny.batch(step, rank)
            (tiny.loss_of(model(ids), ids) / ranks).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
    return tiny.told([], model, norms)


def _shard(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _train(model, optimizer, steps=3, clip=None, first=0):
    losses, norms = [], []
    for step in range(first, first + steps):
        ids = tiny.batch(step)
        loss = tiny.loss_of(model(ids), ids)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, norms


def _train_on_batches_of(model, rank):
    """Some steps on the batches of one rank of the data dimension; losses of each."""
    optimizer = tiny.sgd(model.parameters())
    losses = []
    for step in range(3):
        ids = tiny.batch(step, rank=rank)
        loss = tiny.loss_of(model(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def ddp(find_unused_parameters=False):
    tiny.start()
    model = tiny.transformer()
    if find_unused_parameters:
        model.unused = nn.Linear(4, 4)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    losses, norms = _train(wrapped, tiny.sgd(model.parameters()))
    result = tiny.told(losses, model, norms)
    del wrapped  # a wrapper that outlives its group may hang a gloo process for ever
    tiny.end()
    return result


def ddp_unused():
    return ddp(find_unused_parameters=True)


def ddp_accumulates():
    tiny.start()
    model = tiny.transformer()
    wrapped = DistributedDataParallel(model)
    optimizer = tiny.sgd(model.parameters())
    losses = []
    for step in range(2):
        with wrapped.no_sync():
            ids = tiny.batch(2 * step)
            (tiny.loss_of(wrapped(ids), ids) / 2).backward()
        ids = tiny.batch(2 * step + 1)
        loss = tiny.loss_of(wrapped(ids), ids)
        (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    result = tiny.told(losses, model)
    del wrapped
    tiny.end()
    return result


def fsdp2():
    tiny.start()
    model = _shard(tiny.transformer())
    losses, norms = _train(model, tiny.sgd(model.parameters()))
    result = tiny.told(losses, model, norms)
    tiny.end()
    return result


def fsdp2_clips():
    tiny.start()
    model = _shard(tiny.transformer())
    losses, norms = _train(model, tiny.sgd(model.parameters()), clip=0.5)
    result = tiny.told(losses, model, norms)
    tiny.end()
    return result


def hsdp():
    tiny.start()
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = _shard(tiny.transformer(), mesh=mesh)
    losses, norms = _train(model, tiny.sgd(model.parameters()))
    result = tiny.told(losses, model, norms)
    tiny.end()
    return result


def fsdp2_bfloat16():
    tiny.start()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _shard(tiny.transformer(), mp_policy=policy)
    losses, _ = _train(model, tiny.sgd(model.parameters()))
    result = tiny.told(losses)
    tiny.end()
    return result


def fsdp2_offloads():
    tiny.start()
    model = _shard(tiny.transformer(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    losses, norms = _train(model, tiny.sgd(model.parameters()))
    result = tiny.told(losses, model, norms)
    tiny.end()
    return result


def fsdp2_accumulates():
    """Gradients are kept unreduced over two micro-batches, then reduced once."""
    tiny.start()
    model = _shard(tiny.transformer())
    optimizer = tiny.sgd(model.parameters())
    losses = []
    for step in range(2):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            ids = tiny.batch(2 * step + micro)
            loss = tiny.loss_of(model(ids), ids)
            (loss / 2).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    result = tiny.told(losses, model)
    tiny.end()
    return result


class _Recomputed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def fsdp2_recomputes():
    tiny.start()
    model = tiny.transformer()
    model.blocks = nn.ModuleList(_Recomputed(block) for block in model.blocks)
    model = _shard(model)
    losses, norms = _train(model, tiny.sgd(model.parameters()))
    weights = {name.replace(".block.", "."): value for name, value in tiny.weights(model).items()}
    result = tiny.told(losses, weights, norms)
    tiny.end()
    return result


def fsdp2_prefetches():
    tiny.start()
    model = _shard(tiny.transformer(4), reshard_after_forward=False)
    model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1], model.blocks[2]])
    model.blocks[3].set_modules_to_backward_prefetch([model.blocks[2], model.blocks[1]])
    losses, norms = _train(model, tiny.sgd(model.parameters()))
    result = tiny.told(losses, model, norms)
    tiny.end()
    return result


def fsdp2_on_meta():
    """Built without memory, sharded, then filled: every rank fills its own shards from rank 0's weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    tiny.start()
    full = tiny.transformer().state_dict() if dist.get_rank() == 0 else {}
    with torch.device("meta"):
        model = tiny.Transformer()
    model = _shard(model)
    model.to_empty(device="cpu")
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    losses, norms = _train(model, tiny.sgd(model.parameters()))
    result = tiny.told(losses, model, norms)
    tiny.end()
    return result


def dcp_saves(folder):
    """Trains, saves with the momentum, and goes on: what a resumed run has to equal."""
    tiny.start()
    model = _shard(tiny.transformer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, steps=2)
    state, states = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": states}, checkpoint_id=folder)
    saved = tiny.weights(model)
    losses, _ = _train(model, optimizer, steps=2, first=2)
    result = tiny.told(losses, model, saved=saved)
    tiny.end()
    return result


def dcp_loads(folder):
    """Loads what any number of ranks saved."""
    tiny.start()
    model = _shard(tiny.transformer(seed=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state, states = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=states)
    saved = tiny.weights(model)
    losses, _ = _train(model, optimizer, steps=2, first=2)
    result = tiny.told(losses, model, saved=saved)
    tiny.end()
    return result


def dcp_saves_in_background(folder):
    """Saves while training goes on; the checkpoint is of the moment of the call."""
    tiny.start()
    group = dist.new_group(backend="gloo")
    model = _shard(tiny.transformer())
    optimizer = tiny.sgd(model.parameters())
    losses, _ = _train(model, optimizer, steps=1)
    saved = tiny.weights(model)
    future = dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder, process_group=group)
    more, _ = _train(model, optimizer, steps=2, first=1)
    future.result()
    dist.barrier()
    state = {"model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    dcp.load(state, checkpoint_id=folder)
    loaded = {name: tiny.whole(value) for name, value in state["model"].items()}
    equal = all(torch.equal(saved[name], loaded[name]) for name in saved)
    result = tiny.told([*losses, *more], model, equal=equal)
    tiny.end()
    return result


def tensor_parallel():
    """Blocks split by columns and rows; attention's heads stay whole. Every rank sees the same batch."""
    tiny.start()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny.transformer()
    for block in model.blocks:
        parallelize_module(block, mesh, {"widen": ColwiseParallel(), "narrow": RowwiseParallel()})
    losses = _train_on_batches_of(model, rank=0)
    result = tiny.told(losses, model)
    tiny.end()
    return result


def tensor_parallel_loss():
    """The vocabulary is split too, and the loss is computed from split logits."""
    from torch.distributed.tensor import Shard

    tiny.start()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny.transformer()
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    optimizer = tiny.sgd(model.parameters())
    losses = []
    for step in range(2):
        ids = tiny.batch(step, rank=0)
        with loss_parallel():
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(tiny.whole(loss))
    result = tiny.told(losses, model)
    tiny.end()
    return result


def two_dimensional():
    """Tensor parallelism inside, FSDP2 outside."""
    tiny.start()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))
    model = tiny.transformer()
    for block in model.blocks:
        parallelize_module(block, mesh["model"], {"widen": ColwiseParallel(), "narrow": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    losses = _train_on_batches_of(model, rank=mesh["data"].get_local_rank())
    result = tiny.told(losses, model)
    tiny.end()
    return result


def loads_data():
    """A sampler deals the examples out; two worker processes each collate them; dropout draws from the rank's seed."""
    tiny.start()
    data = TensorDataset(torch.arange(26))
    sampler = DistributedSampler(data, shuffle=True, seed=7)
    loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=2, worker_init_fn=_seeded)
    torch.manual_seed(dist.get_rank())
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen.append([item.tolist() for (item,) in loader])
    noise = torch.nn.functional.dropout(torch.ones(8)).tolist()
    tiny.end()
    return tiny.told([], seen=seen, noise=noise)


def _seeded(worker):
    assert torch.utils.data.get_worker_info().id == worker
