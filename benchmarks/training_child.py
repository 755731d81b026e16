"""The simulator's own share of FSDP2 training: ``python -m benchmarks.training_child`` prints JSON.

Exactly one rank runs at a time, so the processor time of all ranks together is that of the run. The simulator's part of
it is what a rank's thread uses inside the process group and the handles it gives: checks, results, and switches, in
which the state of ranks is saved and loaded.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.groups import ROOT
from lightrft.sim import SimWorld
from lightrft.sim.process_group import SimProcessGroup
from lightrft.sim.works import SimWork

RANKS = 8
WARM_UP = 2
STEPS = 10


def _cpu() -> float:
    return time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)


class Meter:
    """Processor time that ranks use inside the simulator, while it is on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._inside = threading.local()

    def measure(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, measured unless it is called from inside another one that is."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return function(*args, **kwargs)
            self._inside.yes = True
            begin = _cpu()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += _cpu() - begin
                self.calls += 1
                self._inside.yes = False

        return measured


def main() -> dict[str, float]:
    """Train, and tell the milliseconds of a step of all ranks and the simulator's share of it."""
    meter = Meter()
    for cls in (SimProcessGroup, SimWork, *SimWork.__subclasses__()):
        for name, value in list(vars(cls).items()):
            if callable(value) and not name.startswith("_") and not isinstance(value, (type, staticmethod)):
                setattr(cls, name, meter.measure(value))
    times = SimWorld(RANKS).run(_train, meter)
    used = sum(seconds for seconds, _ in times)
    simulator = max(inside for _, inside in times)
    return {"step": used / STEPS * 1e3, "share": simulator / used, "calls": meter.calls / (STEPS + WARM_UP) / RANKS}


def _train(meter: Meter) -> tuple[float, float]:
    sys.path.insert(0, str(ROOT / "examples" / "sim"))
    from fsdp2 import Transformer

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(128, (4, 32))
    begin = inside = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            dist.barrier()
            begin, inside = _cpu(), meter.seconds
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    result = _cpu() - begin, meter.seconds - inside
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(main()))
