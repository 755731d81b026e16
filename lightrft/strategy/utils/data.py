"""Which samples each data parallel rank sees, in which order, and where a run goes on after it was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightrft.errors import ConfigError

__all__ = ["DistributedSampler", "setup_dataloader"]


class DistributedSampler(Sampler[int]):
    """Deals the samples of a data set out to data parallel ranks.

    The permutations of all epochs, one after the other, are a single endless sequence that only ``seed`` and the
    length of the data set determine. The ranks take turns along it, so after a number of samples the ranks have
    together seen exactly that many first ones of the sequence, however many ranks there are. A run that goes on at
    ``consumed_samples``, with any number of ranks, therefore repeats nothing and leaves out nothing.

    An epoch ends where every rank has the same number of samples and of full batches. Where that does not come out
    even with the length of the data set, it begins the next permutation early (``drop_last=False``), or leaves the
    rest of its own to the next epoch (``drop_last=True``).

    Args:
        dataset: a data set, or its length.
        num_replicas: number of data parallel ranks. The ranks of a sequence parallel group count as one.
        rank: this one among them; equal for the ranks of a sequence parallel group, which get the same samples.
        shuffle: whether each epoch has a permutation of its own; otherwise all go through the data set in order.
        seed: the same on every rank.
        drop_last: whether an epoch holds whole batches only.
        consumed_samples: how many samples all ranks together have seen since the run first began. It sets
            :attr:`epoch` to the epoch in which the run goes on.
        batch_size: samples in a batch of one rank.

    Raises:
        ConfigError: an argument is out of range, or the data set holds less than one batch for all ranks.
    """

    def __init__(
        self,
        dataset: Sized | int,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        consumed_samples: int = 0,
        *,
        batch_size: int = 1,
    ) -> None:
        self.length = dataset if isinstance(dataset, int) else len(dataset)
        self.num_replicas = _at_least("num_replicas", num_replicas, 1)
        self.rank = _at_least("rank", rank, 0)
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.consumed_samples = _at_least("consumed_samples", consumed_samples, 0)
        self._unit = num_replicas * _at_least("batch_size", batch_size, 1) if drop_last else num_replicas
        if rank >= num_replicas:
            raise ConfigError(f"rank={rank} with num_replicas={num_replicas}: expected 0 to num_replicas - 1")
        if not self.length:
            raise ConfigError("the data set is empty: expected at least one sample")
        if drop_last and self.length < self._unit:
            raise ConfigError(
                f"the data set holds {self.length} samples, less than one batch of {batch_size} for {num_replicas} "
                "data parallel ranks: take a smaller batch or drop_last=False"
            )
        self.epoch = consumed_samples // self.length
        while self._ends(self.epoch) <= consumed_samples:
            self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next iteration goes through; the same epoch on every rank.

        Of the epoch in which the run goes on, only the rest is left, and of those before it nothing.
        """
        self.epoch = _at_least("epoch", epoch, 0)

    def __len__(self) -> int:
        return (self._ends(self.epoch) - self._begins(self.epoch)) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        begin, end = self._begins(self.epoch), self._ends(self.epoch)
        epochs = range(begin // self.length, -(-end // self.length)) if begin < end else ()
        for epoch in epochs:
            first = epoch * self.length
            low, high = max(begin - first, 0), min(end - first, self.length)
            behind = (self.rank - (first + low - begin)) % self.num_replicas
            yield from self._permutation(epoch)[low + behind : high : self.num_replicas].tolist()

    def _begins(self, epoch: int) -> int:
        """Where an epoch begins in the sequence of all samples."""
        return self._ends(epoch - 1) if epoch else self.consumed_samples

    def _ends(self, epoch: int) -> int:
        """Where it ends: a whole number of units after ``consumed_samples``, as near as can be to its last sample."""
        left = max((epoch + 1) * self.length - self.consumed_samples, 0)
        units = left // self._unit if self.drop_last else -(-left // self._unit)
        return self.consumed_samples + units * self._unit

    def _permutation(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(_mixed(self.seed, epoch)))


def _at_least(name: str, value: int, least: int) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{name}={value!r}: expected a number of at least {least}")
    return value


def _mixed(*numbers: int) -> int:
    """A seed that numbers give together, unlike that of any other numbers: 63 bits."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


@dataclasses.dataclass(frozen=True, slots=True)
class _SeedWorker:
    """Seeds a worker of a loader from the run's seed, the data parallel rank, the epoch and the worker's number."""

    sampler: Any
    seed: int
    dp_rank: int

    def __call__(self, worker: int) -> None:
        seed = _mixed(self.seed, self.dp_rank, getattr(self.sampler, "epoch", 0), worker)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))  # noqa: NPY002 - data sets draw from the global generator
        torch.manual_seed(seed)


def setup_dataloader(
    dataset: Any,
    batch_size: int,
    pin_memory: bool = False,
    shuffle: bool = True,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = True,
    sampler: Any = None,
    consumed_samples: int = 0,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """A loader of this rank's share of ``dataset``.

    Call ``loader.sampler.set_epoch(epoch)`` before each epoch; after a resumption ``loader.sampler.epoch`` is the one
    in which the run goes on. The loader takes no number from the global random generators.

    Args:
        dataset: anything with a length and items.
        batch_size: samples in a batch of this rank.
        pin_memory: whether batches are put into pinned memory; without effect where there is no CUDA.
        shuffle: see :class:`DistributedSampler`.
        collate_fn: makes a batch of a list of samples.
        drop_last: whether all batches are full.
        sampler: used in place of a :class:`DistributedSampler`, if given.
        consumed_samples: see :class:`DistributedSampler`.
        dp_rank: number of this data parallel rank; the ranks of a sequence parallel group have one number.
        dp_size: number of data parallel ranks.
        seed: of the permutations and of the workers.
        num_workers: processes that load; 0 loads in this process.

    Raises:
        ConfigError: an argument is out of range, the data set has no length, or both ``sampler`` and
            ``consumed_samples`` are given.
    """
    _at_least("batch_size", batch_size, 1)
    if sampler is not None and consumed_samples:
        raise ConfigError(
            f"consumed_samples={consumed_samples} with a sampler of your own: expected one of them; let your sampler "
            "begin where the run goes on"
        )
    if sampler is None:
        if not isinstance(dataset, Sized):
            raise ConfigError(f"{type(dataset).__name__} has no length: expected a data set with __len__, or a sampler")
        sampler = DistributedSampler(
            dataset, dp_size, dp_rank, shuffle, seed, drop_last, consumed_samples, batch_size=batch_size
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=collate_fn,
        pin_memory=pin_memory and torch.cuda.is_available(),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(_mixed(seed, dp_rank)),
        worker_init_fn=_SeedWorker(sampler, seed, dp_rank),
    )
