"""Values that collectives are tested with, and what they make of them."""

import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, reduce_scatter_single

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NUMBERS = [*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8]


def values(owner, shape, dtype):
    """Small values that tell owners and positions apart."""
    count = torch.Size(shape).numel()
    numbers = (torch.arange(count) * 3 + owner * 2) % 7
    if dtype == torch.bool:
        return (numbers % 2 == 0).reshape(shape)
    if dtype.is_complex:
        return torch.complex(numbers.double(), (numbers + owner).double()).to(dtype).reshape(shape)
    return numbers.float().to(dtype).reshape(shape)


def same(left, right):
    """The same dtype, shape and bits."""
    bits = [t.detach().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def broadcast(rank, size, make):
    for root in range(size):
        tensor = make(rank)
        dist.broadcast(tensor, root)
        assert same(tensor, make(root))


def all_gather(rank, size, make):
    outputs = [make(size) for _ in range(size)]
    dist.all_gather(outputs, make(rank))
    assert all(same(output, make(owner)) for owner, output in enumerate(outputs))


def all_gather_into_one(rank, size, make):
    mine = make(rank)
    if mine.dim():
        output = torch.cat([make(size)] * size)
        all_gather_single(output, mine)
        assert same(output, torch.cat([make(owner) for owner in range(size)]))


def gather(rank, size, make):
    if make(0).is_complex():
        return  # neither gloo nor nccl gathers complex numbers
    for root in range(size):
        outputs = [make(size) for _ in range(size)] if rank == root else None
        dist.gather(make(rank), outputs, dst=root)
        assert rank != root or all(same(output, make(owner)) for owner, output in enumerate(outputs))


def scatter(rank, size, make):
    for root in range(size):
        output = make(size)
        dist.scatter(output, [make(root + 10 * owner) for owner in range(size)] if rank == root else None, src=root)
        assert same(output, make(root + 10 * rank))


def all_to_all(rank, size, make):
    outputs = [make(size) for _ in range(size)]
    dist.all_to_all(outputs, [make(10 * rank + receiver) for receiver in range(size)])
    assert all(same(output, make(10 * sender + rank)) for sender, output in enumerate(outputs))


def all_to_all_in_one(rank, size, make):
    if make(0).dim():
        output = torch.cat([make(size)] * size)
        dist.all_to_all_single(output, torch.cat([make(10 * rank + receiver) for receiver in range(size)]))
        assert same(output, torch.cat([make(10 * sender + rank) for sender in range(size)]))


def send_and_receive(rank, size, make):
    tensor = make(size)
    sending = dist.isend(make(rank), (rank + 1) % size)
    assert dist.recv(tensor, (rank - 1) % size) == (rank - 1) % size
    sending.wait()
    assert same(tensor, make((rank - 1) % size))


MOVES = [broadcast, all_gather, all_gather_into_one, gather, scatter, all_to_all, all_to_all_in_one, send_and_receive]


REDUCTIONS = {
    "SUM": lambda stack: stack.sum(0),
    "PRODUCT": lambda stack: stack.prod(0),
    "MIN": lambda stack: stack.amin(0),
    "MAX": lambda stack: stack.amax(0),
    "AVG": lambda stack: stack.sum(0) / len(stack),
}


BITWISE = {
    "BAND": lambda stack: stack[0] & stack[1] & stack[2],
    "BOR": lambda stack: stack[0] | stack[1] | stack[2],
    "BXOR": lambda stack: stack[0] ^ stack[1] ^ stack[2],
}


def expected(name, size, shape, dtype):
    """What one process makes of the values of all; exact in every dtype, as they are small whole numbers."""
    stack = torch.stack([values(owner, shape, dtype) for owner in range(size)])
    if name in BITWISE:
        return BITWISE[name](stack)
    return REDUCTIONS[name](stack.to(torch.int64 if dtype == torch.bool else torch.float64)).to(dtype)


def check_reductions(rank, size, names, dtype):
    for name in names:
        op, total = getattr(dist.ReduceOp, name), expected(name, size, (6,), dtype)
        tensor = values(rank, (6,), dtype)
        dist.all_reduce(tensor, op)
        assert same(tensor, total), (name, dtype)
        for root in range(size):
            tensor = values(rank, (6,), dtype)
            dist.reduce(tensor, root, op)
            assert rank != root or same(tensor, total), (name, dtype)
        part = torch.empty(2, dtype=dtype)
        dist.reduce_scatter(part, list(values(rank, (6,), dtype).chunk(size)), op)
        assert same(part, total.chunk(size)[rank]), (name, dtype)
        part = torch.empty(2, dtype=dtype)
        reduce_scatter_single(part, values(rank, (6,), dtype), op)
        assert same(part, total.chunk(size)[rank]), (name, dtype)
