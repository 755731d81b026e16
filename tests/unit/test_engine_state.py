"""The states of an engine: every move from every state, and what a wrong one says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError
from lightrft.strategy.engine_state import TAGS, EngineState, EngineStatus

HERE = re.escape(__file__)


def fails():
    raise OSError("the library fails")


def update_that_fails(made):
    with pytest.raises(OSError, match="the library fails"):
        made.update(made.weight_version + 1, fails)


def state(*moves):
    made = EngineState("the test engine")
    for move in moves:
        MOVES[move](made)
    return made


MOVES = {
    "generate": lambda made: made.generate(lambda: "text"),
    "sleep 1": lambda made: made.sleep(1, lambda: None),
    "sleep 2": lambda made: made.sleep(2, lambda: None),
    "wake": lambda made: made.wake_up(None, lambda tags: None),
    "wake weights": lambda made: made.wake_up(["weights"], lambda tags: None),
    "wake kv_cache": lambda made: made.wake_up(["kv_cache"], lambda tags: None),
    "update": lambda made: made.update(made.weight_version + 1, lambda: None),
    "update fails": update_that_fails,
    "end": lambda made: made.end("was shut down"),
}


def model(moves):
    """The states again, as slow as they can be written: what each move does, or the error it should raise."""
    asleep, level, stale, version, dead = set(), 0, False, 0, False
    for move in moves:
        error = None
        if move != "end" and dead:
            error = EngineStateError
        elif move == "generate":
            error = EngineStateError if asleep else StaleWeightsError if stale else None
        elif move.startswith("sleep"):
            wanted = int(move[-1])
            if asleep and (len(asleep) < 2 or level != wanted):
                error = EngineStateError
            elif not asleep:
                asleep, level, stale = set(TAGS), wanted, stale or wanted == 2
        elif move.startswith("wake"):
            asleep -= set(TAGS) if move == "wake" else {move.split()[1]}
        elif move.startswith("update"):
            if "weights" in asleep:
                error = EngineStateError
            else:
                stale = move == "update fails"
                version += not stale
        else:
            dead = True
        status = "dead" if dead else "asleep" if asleep else "stale" if stale else "awake"
        yield error, status, version


@given(st.lists(st.sampled_from(sorted(MOVES)), max_size=12))
def test_f01_f02_every_move_from_every_state_is_carried_out_or_refused(moves):
    made = EngineState()
    for move, (error, status, version) in zip(moves, model(moves), strict=True):
        if error is None:
            MOVES[move](made)
        else:
            with pytest.raises(error) as caught:
                MOVES[move](made)
            assert type(caught.value) is error
        assert (made.status, made.weight_version) == (status, version)


@pytest.mark.parametrize(
    ("moves", "wrong", "message"),
    [
        (["sleep 1"], "generate", "generate at HERE: the test engine is asleep, at level 1 since HERE; call wake_up"),
        (["sleep 2", "wake weights"], "generate", r"is asleep \(kv_cache still\), at level 2 since HERE"),
        (["sleep 2", "wake"], "generate", "has dropped its weights, by a sleep at level 2 at HERE; send the weights"),
        (["update fails"], "generate", "holds a part of new weights, since an update at HERE failed"),
        (["sleep 1"], "update", "update_weights at HERE: .* since HERE; wake its weights up first"),
        (["sleep 1"], "sleep 2", "sleep at HERE: the test engine is asleep, at level 1 since HERE"),
        (["sleep 1", "wake weights"], "sleep 1", "kv_cache still"),
        (["end"], "wake", "wake_up at HERE: the test engine was shut down at HERE; call setup_inference_engine"),
    ],
)
def test_a_wrong_move_names_both_lines(moves, wrong, message):
    with pytest.raises(EngineStateError, match=message.replace("HERE", f"{HERE}:\\d+")):
        MOVES[wrong](state(*moves))


def test_f02_nothing_is_carried_out_that_is_refused_or_needless():
    made = state("sleep 1")
    for move in (made.generate, lambda do: made.update(1, do), lambda do: made.sleep(2, do)):
        with pytest.raises(EngineStateError):
            move(fails)
    made.sleep(1, fails)
    MOVES["wake"](made)
    made.wake_up(None, fails)
    assert made.status is EngineStatus.AWAKE


def test_waking_in_parts_takes_each_once():
    made, woken = state("sleep 1"), []
    made.wake_up(["kv_cache"], woken.append)
    made.wake_up(["kv_cache", "weights"], woken.append)
    assert woken == [["kv_cache"], ["weights"]]
    MOVES["sleep 1"](made)
    made.wake_up(None, woken.append)
    assert woken[2:] == [list(TAGS)]


def test_f17_a_move_that_fails_leaves_the_state():
    made = state()
    for move in (made.generate, lambda do: made.sleep(2, do)):
        with pytest.raises(OSError, match="the library fails"):
            move(fails)
        assert made.status is EngineStatus.AWAKE
    MOVES["sleep 1"](made)
    with pytest.raises(OSError, match="the library fails"):
        made.wake_up(None, lambda tags: fails())
    assert made.status is EngineStatus.ASLEEP


def test_nothing_is_allowed_in_the_middle_of_an_update():
    made = state()

    def meanwhile():
        assert made.status is EngineStatus.UPDATING
        for move in ("generate", "sleep 1", "wake", "update"):
            with pytest.raises(EngineStateError, match=f"the test engine is being updated, since {HERE}:"):
                MOVES[move](made)

    made.update(1, meanwhile)
    assert made.status is EngineStatus.AWAKE


def test_versions_count_up():
    made = state("update", "update")
    with pytest.raises(EngineStateError, match="version 2 does not follow version 2"):
        made.update(2, lambda: None)
    made.update(7, lambda: None)
    assert made.weight_version == 7


@pytest.mark.parametrize("tags", [["cuda_graph"], "weights"])
def test_k08_unknown_tags_and_levels_name_what_there_is(tags):
    with pytest.raises(ConfigError, match="expected a list of some of weights, kv_cache"):
        state().wake_up(tags, lambda tags: None)
    with pytest.raises(ConfigError, match=r"expected 1 .* or 2"):
        state().sleep(3, lambda: None)
