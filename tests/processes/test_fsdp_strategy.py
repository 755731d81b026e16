"""FSDPV2Strategy on real gloo processes: what simulated ranks do, they do."""

from __future__ import annotations

import pytest
import torch
from programs import fsdp

from lightrft.sim import ProcessWorld, SimWorld
from lightrft.sim.contracts.strategy.workload import same

pytestmark = pytest.mark.processes

MASTERS = {"bf16": True, "use_mp_opt": True, "fsdp_cpu_offload": True}


def on(world, ranks, program, *args):
    return world(ranks).run(fsdp.ending, program, *args)


def test_f13_training_equals_one_plain_process():
    expected = fsdp.plain("qwen2")
    for found in on(ProcessWorld, 2, fsdp.trains, "qwen2", 2, {}):
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
        same(found["weights"], expected["weights"], what="processes", within=2e-6)


@pytest.mark.parametrize("settings", [{}, MASTERS])
def test_f19_processes_read_what_simulated_ranks_wrote_and_the_other_way_round(settings, tmp_path):
    written = {
        world: on(world, 2, fsdp.saves, str(tmp_path / world.__name__), settings) for world in (SimWorld, ProcessWorld)
    }
    for writer, reader, ranks in ((SimWorld, ProcessWorld, 2), (ProcessWorld, SimWorld, 4)):
        expected = written[writer][0]
        for found in on(reader, ranks, fsdp.loads, str(tmp_path / writer.__name__), settings):
            same(found["saved"], expected["saved"], what=f"from {writer.__name__}", within=0.0)


def test_a_model_built_on_rank_0_alone_is_the_one_that_all_would_have_built():
    expected = on(ProcessWorld, 2, fsdp.built, False, "config", "", {})
    found = on(ProcessWorld, 2, fsdp.built, True, "config", "", {})
    assert [one["bare"] > 0 for one in found] == [False, True]
    for ours, theirs in zip(found, expected, strict=True):
        same(ours["weights"], theirs["weights"], what="weights", within=0.0)
        assert ours["step"] == theirs["step"]
