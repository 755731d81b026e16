"""What gathering prompts and scattering completions costs, beside generating, on two real processes."""

import random
import statistics
import time

import pytest
import torch.distributed as dist
from engines import on_cpu

from lightrft.models import tiny
from lightrft.sim import ProcessWorld
from lightrft.strategy import FakeStrategy

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::lightrft"),
]

PROMPTS = 64
TOKENS = 128
REPETITIONS = 5
MOST = 0.02


def shares(folder, tp_size):
    """Of each call, the time outside of ``generate`` as a fraction of that in it, and the seconds of ``generate``."""
    dist.init_process_group("gloo")
    settings = {
        "pretrain": folder,
        "engine_type": "vllm",
        "engine_tp_size": tp_size,
        "prompt_max_len": 256,
        "generate_max_len": TOKENS,
    }
    strategy = FakeStrategy(engines=False, args=settings)
    engine = strategy.setup_inference_engine()
    generate, inside, found = engine.generate, [], []

    def timed(requests, sampling_params):
        begin = time.perf_counter()
        completions = generate(requests, sampling_params)
        inside.append(time.perf_counter() - begin)
        return completions

    engine.generate = timed
    chance = random.Random(strategy.get_rank())
    params = {"temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 0}
    for _ in range(1 + REPETITIONS):
        lengths = [chance.randint(64, 256) for _ in range(PROMPTS)]
        prompts = [chance.choices(range(6, tiny.VOCABULARY), k=length) for length in lengths]
        dist.barrier()
        begin = time.perf_counter()
        completions = strategy.gather_and_generate(params, all_prompt_token_ids=prompts, sleep_engine=False)
        whole = time.perf_counter() - begin
        assert [len(one.output_token_ids) for one in completions] == [TOKENS] * PROMPTS
        found.append((whole / inside[-1] - 1, inside[-1]))
    engine.shutdown()
    return found[1:]  # the first one warms up


@pytest.mark.parametrize("tp_size", [1, 2])
def test_gathering_and_scattering_take_a_fiftieth_of_generating_at_most(tmp_path, tp_size, record_property):
    model = tiny.text_model(0, max_position_embeddings=512)
    folder = on_cpu.save(model, tmp_path)
    with ProcessWorld(2, backend="gloo", limit=240) as world:
        ranks = world.run(shares, folder, tp_size)
    worst = [max(each) for each in zip(*([share for share, _ in one] for one in ranks), strict=True)]
    seconds = statistics.median(second for one in ranks for _, second in one)
    median = statistics.median(worst)
    record_property(
        f"gathering and scattering {PROMPTS} prompts a rank on 2 ranks, tp={tp_size}, beside generating {TOKENS} "
        "tokens each",
        f"{median:.2%} of {seconds:.2f} s",
    )
    assert median < MOST, worst
