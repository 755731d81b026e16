"""The adapter for SGLang, on the real one, shared by two ranks: an engine of two processes on the first rank."""

import sys
from pathlib import Path

from lightrft.models import tiny
from lightrft.sim import ProcessWorld

sys.path.insert(0, str(Path(__file__).parent))

import on_cpu

SHARES = [[(10, 11, 12)], [(20,), tuple(range(30, 50)), (10, 11, 13)]]


def program(path, folder):
    """What each rank finds, by name."""
    import multiprocessing
    import os
    import signal
    import sys
    import warnings

    sys.path.insert(0, path)
    warnings.simplefilter("default")
    import on_cpu
    import torch
    import torch.distributed as dist

    from lightrft.errors import LightRFTError
    from lightrft.models import tiny
    from lightrft.sim.contracts.engine.reference import greedy
    from lightrft.strategy.requests import requests_of
    from lightrft.strategy.rollout import gather_and_generate
    from lightrft.strategy.sglang_utils import start
    from lightrft.strategy.weight_sync import in_buckets, send

    dist.init_process_group("gloo")
    rank, group, device = dist.get_rank(), dist.new_group([0, 1]), torch.device("cpu")
    engine = start(on_cpu.settings(folder, tp_size=2, group=group))
    models = tiny.text_model(seed=0), tiny.text_model(seed=1)
    found = {"status": [str(engine.status)]}

    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}

    def generated(prompts):
        return gather_and_generate(engine, lambda: requests_of(prompts), params, group=group, device=device)

    def right(model, prompts):
        return [list(one.output_token_ids) for one in generated(prompts)] == [
            greedy(model, each, 8) for each in prompts
        ]

    def said(call):
        try:
            call()
        except LightRFTError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def broken(on):
        yield from list(in_buckets(models[1].state_dict().items(), 1 << 14))[:2]
        if rank == on:
            raise OSError("the disk is gone")
        yield from ()

    found["own"] = right(models[0], SHARES[rank])
    found["none"] = right(models[0], SHARES[rank] if rank else [])
    send(engine, models[1].state_dict().items(), bucket_bytes=1 << 14, poison=True)
    found["updated"] = right(models[1], SHARES[rank])
    for level in (1, 2):
        engine.sleep(level)
        engine.wake_up(["weights"])
        send(engine, models[level - 1].state_dict().items(), bucket_bytes=1 << 20)
        engine.wake_up()
        found[f"level {level}"] = right(models[level - 1], SHARES[rank])
    weights = dict(models[0].state_dict())
    missing = weights.pop("model.norm.weight")
    found["missing"] = said(lambda: send(engine, weights.items(), bucket_bytes=1 << 20))
    found["status"].append(str(engine.status))
    found["source"] = said(lambda: engine.update_weights(broken(on=1), engine.weight_version + 1))
    send(engine, {**weights, "model.norm.weight": missing}.items(), bucket_bytes=1 << 20)
    found["again"] = right(models[0], SHARES[rank])
    found["prompt"] = said(lambda: generated([()] if rank else SHARES[0]))
    found["follower"] = said(lambda: engine.generate(requests_of(SHARES[0]), {})) if rank else ""
    if rank == 0:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    found["dead"] = said(lambda: engine.sleep(1))
    found["status"].append(str(engine.status))
    found["after"] = said(engine.wake_up)
    engine.shutdown()
    found["children"] = len(multiprocessing.active_children())
    dist.destroy_process_group()
    return found


def test_two_ranks_share_an_engine(tmp_path):
    folder = on_cpu.save(tiny.text_model(seed=0), tmp_path)
    with ProcessWorld(2, limit=250) as world:
        leader, other = world.run(program, str(Path(__file__).parent), folder)
    for name in ("own", "none", "updated", "level 1", "level 2", "again"):
        assert (leader[name], other[name]) == (True, True), name
    assert "missing: model.norm.weight" in leader["missing"] == other["missing"]
    assert "rank 1: OSError: the disk is gone" in leader["source"] == other["source"]
    assert "the prompt is empty" in leader["prompt"]
    assert "the prompt is empty" in other["prompt"]
    assert other["follower"].startswith("EngineStateError: SGLang runs on the first rank of its group")
    assert "has ended by signal 9" in leader["dead"]
    assert "has ended by signal 9" in other["dead"]
    assert leader["status"] == other["status"] == ["awake", "stale", "dead"]
    assert "lost one of its processes" in leader["after"]
    assert "lost one of its processes" in other["after"]
    assert leader["children"] == 0
