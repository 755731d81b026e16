"""Which parameters an optimizer gets, and which of them decay."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.optimizers import parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.LayerNorm(3)
        self.up = nn.Linear(3, 5)
        self.gain = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def names(model, groups):
    """The names of the parameters by weight decay, in order."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {group["weight_decay"]: [name_of[id(p)] for p in group["params"]] for group in groups}


def test_matrices_decay_and_biases_and_norms_do_not_and_frozen_parameters_are_left_out():
    model = Model()
    assert names(model, parameter_groups(model, 0.1)) == {
        0.1: ["embed.weight", "up.weight"],
        0.0: ["gain", "bias", "norm.weight", "norm.bias", "up.bias"],
    }


def test_named_parameters_do_not_decay_either_by_any_of_their_names():
    model = Model()
    for part in ("embed", "head.weight"):  # two names of one parameter
        assert names(model, parameter_groups(model, 0.1, [part]))[0.1] == ["up.weight"]


def test_k18_tied_parameters_come_once():
    model = Model()
    parameters = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == 7


def test_torch_takes_the_groups_and_decays_only_the_matrices():
    model = Model()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5), lr=1.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"embed.weight", "up.weight"}
    torch.testing.assert_close(model.up.weight, 0.5 * before["up.weight"])


def test_a_group_that_would_be_empty_is_left_out():
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(2), 0.1)] == [0.0]


def test_the_shape_of_the_whole_parameter_counts_under_fsdp_and_zero_3():
    def main():
        dist.init_process_group("gloo")
        model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1))
        fully_shard(model)
        found = names(model, parameter_groups(model, 0.1))
        dist.destroy_process_group()
        return found

    expected = {0.1: ["0.weight"], 0.0: ["0.bias", "1.weight", "1.bias"]}
    assert SimWorld(2, stall_limit=15).run(main) == [expected] * 2

    partitioned = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1))
    for parameter in partitioned.parameters():  # as deepspeed leaves it between uses
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert names(partitioned, parameter_groups(partitioned, 0.1)) == expected


def test_a_model_without_trainable_parameters_is_an_error():
    for model in (nn.Linear(2, 2).requires_grad_(False), nn.ReLU()):
        with pytest.raises(ConfigError, match=f"{type(model).__name__} has no trainable parameter"):
            parameter_groups(model, 0.1)


def test_arguments_that_cannot_work_are_errors():
    with pytest.raises(ConfigError, match="weight_decay=-0.1: expected 0 or a positive number"):
        parameter_groups(Model(), -0.1)
    with pytest.raises(ConfigError, match=r"no_decay=\['nrom'\]: expected parts of the names"):
        parameter_groups(Model(), 0.1, ["norm", "nrom"])
