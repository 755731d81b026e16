"""The parts of the vLLM adapter that need no vLLM: arguments, what is refused, and the state of the process."""

import dataclasses
import gc
import multiprocessing
import os
import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError, WeightSyncError
from lightrft.strategy import vllm_utils
from lightrft.strategy.coverage import Coverage
from lightrft.strategy.engine_settings import EngineSettings
from lightrft.strategy.model_files import ModelFiles
from lightrft.strategy.requests import Request
from lightrft.strategy.vllm_utils.arguments import environment, llm_arguments, log_probs_mode
from lightrft.strategy.vllm_utils.exchange import check_tokens, completions_of, prompt_of
from lightrft.strategy.vllm_utils.process_state import ProcessState, keeping_the_default_group

KNOWN = {"logprobs_mode", "kv_cache_memory_bytes"}


def settings(device="cpu", **changes):
    given = {
        "model": "a/model",
        "dtype": "bfloat16",
        "tp_size": 2,
        "memory_share": 0.4,
        "max_model_len": 64,
        "max_tokens": 32,
        "seed": 7,
        "sleeps": True,
        "device": torch.device(device),
        "group": None,
    }
    return EngineSettings(**{**given, **changes})


def arguments(device="cpu", known=KNOWN, files=None, grouped=False, **changes):
    return llm_arguments(settings(device, **changes), files or ModelFiles(), known, grouped=grouped)


SAME = {
    "model": "a/model",
    "dtype": "bfloat16",
    "tensor_parallel_size": 2,
    "max_model_len": 64,
    "seed": 7,
}


def test_arguments_on_a_gpu():
    assert arguments("cuda:1", grouped=True) == SAME | {
        "distributed_executor_backend": "external_launcher",
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.4,
        "enable_sleep_mode": True,
    }
    assert arguments("cuda", sleeps=False)["enable_sleep_mode"] is False


def test_arguments_on_a_cpu():
    assert arguments() == SAME | {
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "kv_cache_memory_bytes": 256 << 20,
    }


def test_what_a_vllm_lacks_is_left_out_and_its_log_probs_are_raw():
    old = arguments(known=())
    assert old == SAME | {"enforce_eager": True, "enable_chunked_prefill": False}
    assert log_probs_mode(old) == "raw"
    assert log_probs_mode(arguments()) == "processed"


def test_options_win():
    given = arguments(options={"logprobs_mode": "raw_logprobs", "enforce_eager": False, "quantization": "fp8"})
    assert given["quantization"] == "fp8"
    assert given["enforce_eager"] is False
    assert log_probs_mode(given) == "raw"
    with pytest.raises(ConfigError, match="logprobs_mode='processed_logits': expected"):
        log_probs_mode({"logprobs_mode": "processed_logits"})


@pytest.mark.parametrize(("has", "skips"), [(False, True), (True, None), (None, None)])
def test_a_model_without_tokenizer_gets_an_engine_without(has, skips):
    assert arguments(files=ModelFiles(has_tokenizer=has)).get("skip_tokenizer_init") is skips


def test_the_engine_runs_in_this_process_at_the_rank_of_the_trainer():
    assert environment(settings(), None) == {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    assert environment(settings("cuda:3"), 11) == {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "RANK": "11",
        "LOCAL_RANK": "3",
    }


def test_k08_a_missing_package_names_the_extra():
    with pytest.raises(ConfigError, match=r'vllm, which is not installed: pip install "lightrft\[vllm\]"'):
        vllm_utils.start(settings(tp_size=1))


def test_prompts_for_vllm():
    assert prompt_of(Request(prompt="a")) == {"prompt": "a"}
    assert prompt_of(Request(prompt_token_ids=(1, 2))) == {"prompt_token_ids": [1, 2]}
    assert prompt_of(Request(prompt="a", images=("i", "j"))) == {
        "prompt": "a",
        "multi_modal_data": {"image": ["i", "j"]},
    }
    assert prompt_of(Request(prompt="a", images=("i",), videos=("v",)))["multi_modal_data"] == {
        "image": ["i"],
        "video": ["v"],
    }


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_outside_of_the_vocabulary_is_named(token):
    fine = Request(prompt_token_ids=(0, 9))
    check_tokens([fine, Request(prompt="text"), Request(prompt_token_ids=())], 10)
    with pytest.raises(ConfigError, match=f"prompt 1 has the token id {token}: expected ids of 0 to 9"):
        check_tokens([fine, Request(prompt_token_ids=(3, token))], 10)


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_a_completion_that_was_given_up_is_an_error(reason):
    sample = SimpleNamespace(token_ids=[1], logprobs=None, finish_reason=reason, text="")
    output = SimpleNamespace(prompt_token_ids=[1], outputs=[sample])
    with pytest.raises(EngineStateError, match=f"its finish reason is {reason!r}"):
        list(completions_of([output], version=0, mode="raw", has_tokenizer=False))


# -- Calls ------------------------------------------------------------------------------------------------------------


class Recorded:
    """As ``vllm.LLM``: notes what is called."""

    def __init__(self, **arguments):
        self.calls = []
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")),
            reset_encoder_cache=lambda: self.calls.append("reset encoder"),
        )

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self):
        self.calls.append("reset prefix")
        return self.calls.count("reset prefix") < 3

    def collective_rpc(self, method, kwargs=None):
        if callable(method):
            return [method(SimpleNamespace(reload_weights=lambda weights_iterator: None))]
        self.calls.append(f"{method} {[name for name, _ in kwargs['weights_iterator']]}")
        return [None]


@pytest.fixture
def recorded(monkeypatch):
    made = dataclasses.make_dataclass("EngineArgs", sorted(KNOWN))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Recorded, EngineArgs=made))
    return vllm_utils.start(settings(tp_size=1))


@pytest.mark.parametrize(
    ("worker", "takes"),
    [
        (lambda weights_iterator=None, weights_path=None: None, True),
        (lambda: None, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("handed_on", [False, True])
def test_a_vllm_that_cannot_be_sent_weights_is_refused_at_the_start(monkeypatch, worker, takes, handed_on):
    made = []
    monkeypatch.setattr(gc, "collect", lambda: 0)  # as each engine does at its end: long, among so many tests

    class Older(Recorded):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            made.append(self)

        def collective_rpc(self, method, kwargs=None):
            own = SimpleNamespace(**({} if worker is None else {"reload_weights": worker}))
            passing = SimpleNamespace(reload_weights=lambda *args, **kwargs: None, model_runner=own)
            return [method(passing if handed_on else own)]

    known = dataclasses.make_dataclass("EngineArgs", sorted(KNOWN))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Older, EngineArgs=known, __version__="0.9.1"))
    if takes:
        vllm_utils.start(settings(tp_size=1)).shutdown()
    else:
        with pytest.raises(ConfigError, match=r"vLLM 0\.9\.1 cannot be sent weights: its worker has no reload_weights"):
            vllm_utils.start(settings(tp_size=1))
    assert made[0].calls == ["shutdown"]


def test_caches_are_dropped_once_a_sleeper_is_awake_as_a_whole(recorded):
    recorded.sleep(level=2)
    recorded.reset_caches()
    recorded.wake_up(["weights"])
    recorded.update_weights([[("a", torch.zeros(1))], [("b", torch.zeros(1))]], 1)
    recorded.reset_caches()
    recorded.wake_up(["kv_cache"])
    assert recorded._llm.calls == [
        "sleep 2",
        "wake weights",
        "reload_weights ['a', 'b']",
        "wake kv_cache",
        "reset prefix",
        "reset encoder",
    ]


def test_caches_that_stay_are_an_error(recorded):
    recorded.reset_caches()
    recorded.reset_caches()
    with pytest.raises(EngineStateError, match="its prefix cache is in use"):
        recorded.reset_caches()


def test_an_engine_ends_once(recorded):
    calls = recorded._llm.calls
    recorded.shutdown()
    recorded.shutdown()
    assert calls == ["shutdown"]


# -- Coverage ---------------------------------------------------------------------------------------------------------

SHAPES = {"embed_tokens.weight": (4, 2), "norm.weight": (2,)}
HEAD = {"lm_head.weight": (4, 2)}


def covered(files, *weights):
    coverage = Coverage(files)
    fits = [coverage.fits(name, shape) for name, shape in weights]
    coverage.check()
    return fits


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES | HEAD])
def test_a_tied_output_layer_may_come_or_not(shapes):
    files = ModelFiles(shapes=shapes, tied=True)
    assert covered(files, *SHAPES.items()) == [True, True]
    assert covered(files, *SHAPES.items(), *HEAD.items()) == [True, True, True]
    with pytest.raises(WeightSyncError, match=r"of another shape: lm_head.weight \(2, 2\), expected \(4, 2\)"):
        covered(files, *SHAPES.items(), ("lm_head.weight", (2, 2)))


def test_an_output_layer_that_is_not_tied_is_needed():
    with pytest.raises(WeightSyncError, match="missing: lm_head.weight"):
        covered(ModelFiles(shapes=SHAPES | HEAD), *SHAPES.items())
    with pytest.raises(WeightSyncError, match="unexpected: lm_head.weight"):
        covered(ModelFiles(shapes=SHAPES), *SHAPES.items(), *HEAD.items())


def test_all_that_is_wrong_is_told_at_once():
    coverage = Coverage(ModelFiles(shapes={f"w{index}": (1,) for index in range(9)}))
    given = [("w0", (1,)), ("w0", (1,)), ("w1", (2,)), ("other", (1,))]
    assert [coverage.fits(*one) for one in given] == [True, False, False, False]
    with pytest.raises(WeightSyncError) as raised:
        coverage.check()
    for part in (
        "sent twice: w0",
        "of another shape: w1 (2,), expected (1,)",
        "unexpected: other",
        "missing: w2, w3, w4, w5, w6 and 2 more",
    ):
        assert part in str(raised.value)


def test_without_files_only_what_comes_twice_is_found():
    assert covered(ModelFiles(), ("a", (1,)), ("b", (2,))) == [True, True]
    with pytest.raises(WeightSyncError, match="sent twice: a"):
        covered(ModelFiles(), ("a", (1,)), ("a", (1,)))


# -- The state of the process -----------------------------------------------------------------------------------------


@pytest.fixture
def single_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def seen():
    return {
        "environ": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "set_num_threads": torch.set_num_threads,
        "threads": torch.get_num_threads(),
        "group": dist.group.WORLD,
        "start method": multiprocessing.get_start_method(allow_none=True),
        "excepthook": sys.excepthook,
        "frozen": gc.get_freeze_count(),
    }


def meddle(folder):
    """As vLLM does when it starts."""
    os.environ.update(ENGINE_SET="1", HOME="elsewhere")
    os.environ.pop("PATH")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_num_threads = lambda count: None
    multiprocessing.Lock()
    sys.excepthook = lambda *error: None
    gc.freeze()
    dist.init_process_group("gloo", init_method=f"file://{folder}/engine", rank=0, world_size=1)


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_engine_changes_is_seen_by_it_alone(tmp_path, fails):
    before = seen()
    state = ProcessState({"NEEDED": "yes"})
    with pytest.raises(OSError, match="no such file") if fails else nullcontext(), state.entered(starts=True):
        assert os.environ["NEEDED"] == "yes"
        meddle(tmp_path)
        theirs, disabled = dist.group.WORLD, torch.set_num_threads
        if fails:
            raise OSError("no such file")
    after = seen()
    assert {name: after[name] for name in before if after[name] != before[name]} == {}
    with state.entered():
        assert (os.environ["NEEDED"], os.environ["ENGINE_SET"], os.environ["HOME"]) == ("yes", "1", "elsewhere")
        assert torch.set_num_threads is disabled
        assert dist.group.WORLD is theirs
        dist.destroy_process_group()
    assert seen()["group"] is None


def test_a_group_that_the_trainer_makes_later_is_its_own(tmp_path, request):
    state = ProcessState({})
    with state.entered():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/engine", rank=0, world_size=1)
        theirs = dist.group.WORLD
    ours = request.getfixturevalue("single_group")
    with state.entered():
        assert dist.group.WORLD is theirs
    assert dist.group.WORLD is ours


def test_an_engine_that_ends_leaves_the_default_group_alone(single_group):
    other = dist.new_group([0])
    destroy = dist.destroy_process_group
    with keeping_the_default_group():
        dist.destroy_process_group()
        dist.destroy_process_group(dist.group.WORLD)
        dist.destroy_process_group(other)
    assert dist.destroy_process_group is destroy
    assert dist.group.WORLD is single_group
    with pytest.raises((KeyError, ValueError)):
        dist.get_process_group_ranks(other)
