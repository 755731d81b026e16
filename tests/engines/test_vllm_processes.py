"""vLLM shared by two real processes: tensor parallel over the ranks of the trainer."""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import on_cpu

from lightrft.errors import ConfigError, LostRanksError, RankFailedError, WeightSyncError
from lightrft.models import tiny
from lightrft.sim import ProcessWorld
from lightrft.strategy import FakeStrategy, vllm_utils, weight_sync
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.vllm_utils import lockstep

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::lightrft"),
]

PROMPTS = [random.Random(length).choices(range(6, tiny.VOCABULARY), k=length) for length in (3, 9, 40)]
GREEDY = {"temperature": 0, "max_tokens": 12, "logprobs": True, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "max_tokens": 12, "n": 2, "seed": 5, "ignore_eos": True}


def start(folder, tp_size):
    """On this rank; consecutive ranks share an engine, as a strategy makes them."""
    group = None
    if dist.is_initialized():
        engines = [
            dist.new_group(list(range(first, first + tp_size))) for first in range(0, dist.get_world_size(), tp_size)
        ]
        group = engines[dist.get_rank() // tp_size]
    return vllm_utils.start(
        on_cpu.settings(
            folder,
            tp_size=tp_size,
            group=group,
            max_model_len=96,
            max_tokens=7,
            seed=3,
            options={"kv_cache_memory_bytes": 32 << 20, "block_size": 32},
        )
    )


def generated(engine):
    found = []
    for params in (GREEDY, SAMPLED, {**SAMPLED, "seed": None}):
        completions = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
        found.append([(one.output_token_ids, one.log_probs) for one in completions])
    return found


def send(engine, model, last=None):
    items = list(model.named_parameters())
    return weight_sync.send(engine, items[:last], bucket_bytes=20_000, poison=True)


def refused(error, call):
    try:
        call()
    except error as raised:
        return str(raised)
    return "not refused"


def life_of_an_engine(folder, tp_size):
    dist.init_process_group("gloo")
    engine = start(folder, tp_size)
    found = {"A": generated(engine)}
    found["differ"] = refused(
        ConfigError, lambda: engine.generate([{"prompt_token_ids": [10 + dist.get_rank()]}], GREEDY)
    )
    part = 3 if dist.get_rank() == 0 else None
    found["part"] = refused(WeightSyncError, lambda: send(engine, tiny.text_model(1), part))
    found["status"] = engine.status is EngineStatus.STALE
    send(engine, tiny.text_model(1))
    found["B"] = generated(engine)
    engine.sleep(level=2)
    engine.wake_up(["weights"])
    send(engine, tiny.text_model(0))
    engine.wake_up(["kv_cache"])
    found["A again"] = generated(engine)
    engine.shutdown()
    ones = torch.ones(1)
    dist.all_reduce(ones)  # the group of the trainer outlives the engine
    found["world"] = ones.item()
    return found


def leave_shared_memory():
    """As a run that died while it started."""
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")
    left.touch()
    return left


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return on_cpu.save(tiny.text_model(0), tmp_path_factory.mktemp("model"))


def tokens(batch):
    return [one for one, _ in batch]


def log_probs(batch):
    return torch.tensor([one for _, one in batch])


@pytest.fixture(scope="module")
def two_lives(folder):
    """Of each rank: what an engine of its own has generated, and then one that it shares."""
    with ProcessWorld(2, backend="gloo", limit=180) as world:
        return world.run(lambda: (life_of_an_engine_alone(folder), rollout(folder)))


def test_two_ranks_that_share_an_engine_generate_the_same_as_one(folder, two_lives):
    (alone, _), (second, _) = two_lives
    left = leave_shared_memory()
    with ProcessWorld(2, backend="gloo", limit=180) as world:
        shared, other = world.run(life_of_an_engine, folder, 2)
    assert not left.exists(), "names are left to nobody"
    for name in ("A", "B", "A again"):
        assert shared[name] == other[name], "to the last bit"
        for mine, theirs in zip(shared[name][:2], alone[name][:2], strict=True):
            assert tokens(mine) == tokens(theirs)
        torch.testing.assert_close(log_probs(shared[name][0]), log_probs(alone[name][0]), atol=1e-4, rtol=0)
    assert tokens(shared["A"][0]) != tokens(shared["B"][0])
    assert "the digest of prompts is" in shared["differ"]
    assert "rank 0: the weights that were sent are not those of the engine's model: missing:" in other["part"]
    assert (shared["status"], other["status"]) == (True, True), "an update that fails on one rank fails on all"
    assert shared["world"] == other["world"] == 2
    assert alone["A"][:2] == second["A"][:2]
    assert tokens(alone["A"][2]) != tokens(second["A"][2]), "engines draw for themselves where no seed is given"


def life_of_an_engine_alone(folder):
    """One of two engines in a world of two ranks, each on its own."""
    dist.init_process_group("gloo")
    engine = start(folder, 1)
    found = {"A": generated(engine)}
    for name, seed in (("B", 1), ("A again", 0)):
        send(engine, tiny.text_model(seed))
        found[name] = generated(engine)
    engine.shutdown()
    return found


def test_ranks_and_engine_tp_size_have_to_agree(folder):
    with (
        ProcessWorld(1, backend="gloo") as world,
        pytest.raises(RankFailedError, match="engine_tp_size=2, but 1 ranks"),
    ):
        world.run(lambda: start(folder, 2))


def fails_alone(folder):
    """The second rank fails in its second pass through the model; the first one waits for it in that pass."""
    dist.init_process_group("gloo")
    lockstep._PATIENCE = 2
    engine = start(folder, 2)
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("the device is lost")

    if dist.get_rank():
        engine._llm.apply_model(lambda model: model.register_forward_pre_hook(fail))
    try:
        engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY)
    except LostRanksError:
        assert engine.status is EngineStatus.DEAD
        raise


def test_f17_a_rank_that_fails_alone_ends_and_does_not_wait_for_those_that_wait_for_it(folder):
    told = r"failed on rank 1 of its group \(RuntimeError: the device is lost\), and rank 0 waits for it"
    with ProcessWorld(2, backend="gloo", limit=120) as world, pytest.raises(RankFailedError, match=told):
        world.run(fails_alone, folder)


def rollout(folder):
    """An iteration, as a trainer calls it: rank 1 has no prompts of its own at first, and weights that sleep drops."""
    strategy = FakeStrategy(
        engines=False,
        args={
            "pretrain": folder,
            "engine_type": "vllm",
            "engine_tp_size": 2,
            "engine_sleep_level": 2,
            "prompt_max_len": 64,
            "generate_max_len": 32,
            "engine_options": {"kv_cache_memory_bytes": 32 << 20, "block_size": 32},
        },
    )
    rank = strategy.get_rank()
    engine = strategy.setup_inference_engine()
    assert "lightrft" not in engine.vllm.__file__, "it is the real one"
    first = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=PROMPTS if rank == 0 else [])
    asleep = strategy.inference_engine_status
    actor = strategy.prepare(tiny.text_model(1))
    strategy.update_engine_weights(actor)
    mine = PROMPTS[:1] if rank == 0 else PROMPTS[1:]
    second = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=mine)
    third = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=mine)
    strategy.inference_engine.shutdown()
    return first, second, third, str(asleep)


def test_k05_f01_a_strategy_generates_and_updates_with_its_ranks(two_lives):
    (_, (first, second, third, asleep)), (_, (nothing, other, another, also)) = two_lives
    assert [one.prompt_token_ids for one in first] == [tuple(prompt) for prompt in PROMPTS]
    assert nothing == []
    assert asleep == also == "asleep"
    assert [one.prompt_token_ids for one in second + other] == [tuple(prompt) for prompt in PROMPTS]
    for found, version, seed in ((first, 0, 0), (second + other, 1, 1), (third + another, 2, 1)):
        assert {one.weight_version for one in found} == {version}
        for one in found:
            ids = torch.tensor([one.prompt_token_ids + one.output_token_ids])
            with torch.no_grad():
                logits = tiny.text_model(seed)(ids).logits[0, len(one.prompt_token_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(one.output_token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=0)
