"""Sequence parallelism on real gloo processes: the programs of the unit tests."""

import pytest
from programs import sequence_parallel as programs

from lightrft.sim import ProcessWorld

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]

CASES = [
    ("qwen2", "plain", 4, {}),
    ("qwen2_gqa", "odd", 2, {}),
    ("qwen2_gqa", "packed_odd", 4, {}),
    ("mistral_sliding", "left_padded", 2, {}),
    ("llama", "right_padded", 2, {"checkpointing": True}),
    ("qwen2_gqa", "packed_odd", 2, {"backend": "fsdp2"}),
    ("qwen2_gqa", "left_padded", 4, {"backend": "fsdp2", "checkpointing": True}),
    ("qwen2_gqa", "packed_odd", 2, {"backend": "zero2"}),
    ("qwen2_gqa", "left_padded", 2, {"backend": "zero3", "checkpointing": True}),
]


@pytest.fixture(scope="module")
def world():
    with ProcessWorld(4, limit=120) as four:
        yield four


@pytest.mark.parametrize(("architecture", "kind", "sp", "options"), CASES)
def test_f14_real_processes_find_the_same_loss_log_probs_and_gradients(world, architecture, kind, sp, options):
    programs.check_equal(world.run(programs.step, architecture, kind, sp, **options), architecture, kind, sp)
