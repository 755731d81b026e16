"""Sequence parallelism: what it computes is what one rank computes."""

import pytest
import torch
import torch.distributed as dist

from lightrft.sim import SimWorld
from programs import sequence_parallel as programs

SHAPES = [(2, 2), (4, 4), (4, 2)]
"""Ranks, and ranks that share a sequence."""

shapes = pytest.mark.parametrize(("ranks", "sp"), SHAPES)


def check(ranks, sp, architecture, kind, **options):
    found = SimWorld(ranks, stall_limit=60).run(programs.step, architecture, kind, sp, **options)
    programs.check_equal(found, architecture, kind, sp)


@shapes
@pytest.mark.parametrize("kind", ["plain", "odd", "short", "left_padded", "right_padded", "packed", "packed_odd"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_gqa"])
def test_f14_every_kind_of_batch_gives_the_same_loss_log_probs_and_gradients(architecture, kind, ranks, sp):
    check(ranks, sp, architecture, kind)


@shapes
@pytest.mark.parametrize("kind", ["odd", "left_padded", "packed"])
@pytest.mark.parametrize("architecture", sorted(programs.CONFIGS.keys() - {"qwen2", "qwen2_gqa"}))
def test_f14_every_architecture_gives_the_same_loss_log_probs_and_gradients(architecture, kind, ranks, sp):
    check(ranks, sp, architecture, kind)
