"""The adapter for SGLang, on the real one, where an engine does not start, or dies. Run in a process of its own."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightrft.errors import ConfigError, EngineStateError, WeightSyncError
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.sglang_utils import start

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of the engine too

import on_cpu

pytestmark = pytest.mark.filterwarnings("default")  # those of SGLang, and what its processes leave open


@pytest.fixture(scope="module")
def models():
    return on_cpu.pair(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    return on_cpu.save(models[0], tmp_path_factory.mktemp("model"))


@pytest.fixture
def bystander():
    """A process that has nothing to do with engines."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def engine(folder, bystander):
    started = start(on_cpu.settings(folder))
    yield started
    started.shutdown()
    assert multiprocessing.active_children() == []
    assert bystander.poll() is None
    assert signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL


def of(engine, models):
    return on_cpu.subject("SGLang, on a CPU", lambda index: engine, models)


def test_a_failed_start_is_an_error(folder, bystander):
    with pytest.raises(ConfigError, match="SGLang was not started: "):
        start(on_cpu.settings(folder, options={"max_total_tokens": 1}))  # its scheduler raises as it starts
    assert multiprocessing.active_children() == []
    assert bystander.poll() is None
    with pytest.raises(ConfigError, match="SGLang refuses its settings: .*deterministic"):
        start(on_cpu.settings(folder, options={"enable_deterministic_inference": True}))
    with pytest.raises(ConfigError, match="SGLang refuses its settings: .*made for 256 tokens: lower one of them"):
        start(on_cpu.settings(folder, max_model_len=300))


def test_f17_a_scheduler_that_raises_is_an_error_and_no_end_of_the_process(engine, models):
    subject = of(engine, models)
    subject.holds(0)
    head = {"lm_head.weight": models[1].model.embed_tokens.weight}
    for with_head in (head, {"lm_head.weight": None}):  # a tied output layer may be sent or not
        subject.send({**subject.weights(1), **with_head})
        subject.holds(1)
        subject.send({**subject.weights(0), **with_head})
        subject.holds(0)
    with pytest.raises(WeightSyncError, match="missing: model.embed_tokens.weight"):
        subject.send({**subject.weights(1), "model.embed_tokens.weight": None})
    subject.send(0)
    with pytest.raises(EngineStateError, match="of SGLang.* has .*: its output says why"):
        engine._ask("generate", input_ids=[[]], sampling_params={})  # what the adapter would have refused
    with pytest.raises(EngineStateError, match="of SGLang.* has "):
        subject.generate()
    assert engine.status is EngineStatus.DEAD
    with pytest.raises(EngineStateError, match="lost one of its processes at "):
        subject.generate()


def test_f17_a_process_that_is_killed_is_an_error_at_the_next_call(engine, models):
    subject = of(engine, models)
    assert subject.generate(subject.prompts[:1])  # an engine after another one that has died
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(EngineStateError, match="has ended by signal 9"):
        subject.send(1)
    assert engine.status is EngineStatus.DEAD
