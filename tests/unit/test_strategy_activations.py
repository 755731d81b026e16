"""Recomputing activations, the same on every backend."""

import os

import pytest
import torch
from torch import nn

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import SETTINGS, workload
from lightrft.strategy import get_strategy
from lightrft.strategy.utils import activations

pytestmark = pytest.mark.filterwarnings("ignore")  # of deepspeed, and of torch about what it calls


class Able(workload.Transformer):
    """Notes how it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.asked.append(gradient_checkpointing_kwargs)


def test_the_module_that_can_is_found_inside_another():
    able = Able()
    activations.recompute(nn.Sequential(nn.Linear(2, 2), able))
    assert able.asked == [{"use_reentrant": False}]


def test_a_model_that_cannot_is_named():
    with pytest.raises(ConfigError, match="Sequential has no gradient_checkpointing_enable"):
        activations.recompute(nn.Sequential(nn.Linear(2, 2)))


def _prepares(settings):
    size = int(os.environ["WORLD_SIZE"])
    strategy = get_strategy({**settings, "gradient_checkpointing": True, "train_batch_size": size})
    able, frozen = Able(), workload.transformer().requires_grad_(False)
    strategy.prepare(frozen)
    strategy.prepare((nn.Sequential(able), torch.optim.SGD(able.parameters(), lr=0.1), None))
    with pytest.raises(ConfigError, match="Transformer has no gradient_checkpointing_enable"):
        strategy.prepare(workload.transformer())
    asked = able.asked
    torch.distributed.destroy_process_group()
    return asked


@pytest.mark.parametrize("name", SETTINGS)
def test_every_backend_asks_a_trained_model_and_refuses_one_that_cannot(name):
    assert SimWorld(2, stall_limit=15).run(_prepares, SETTINGS[name]) == [[{"use_reentrant": False}]] * 2
