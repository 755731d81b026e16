"""The tree of errors: its shape, the builtins it joins, and its way through pickle."""

import inspect
import pickle

import pytest

from lightrft import errors

TREE = {
    "ConfigError": ("LightRFTError", ValueError),
    "SimulationError": ("LightRFTError", RuntimeError),
    "DeadlockError": ("SimulationError", RuntimeError),
    "CollectiveMismatchError": ("SimulationError", RuntimeError),
    "CollectiveTimeoutError": ("SimulationError", TimeoutError),
    "RankFailedError": ("SimulationError", RuntimeError),
    "NondeterminismError": ("SimulationError", RuntimeError),
    "RefusedError": ("SimulationError", RuntimeError),
    "UnfinishedError": ("SimulationError", RuntimeError),
    "BlockedOutsideError": ("SimulationError", RuntimeError),
    "EngineStateError": ("LightRFTError", RuntimeError),
    "LostRanksError": ("EngineStateError", RuntimeError),
    "StaleWeightsError": ("EngineStateError", RuntimeError),
    "WeightSyncError": ("LightRFTError", RuntimeError),
    "OffloadStateError": ("LightRFTError", RuntimeError),
    "CheckpointError": ("LightRFTError", OSError),
    "RewardError": ("LightRFTError", RuntimeError),
    "ContractError": ("LightRFTError", AssertionError),
}
OF_THE_SIMULATOR = [name for name in TREE if issubclass(getattr(errors, name), errors.SimulationError)]


def test_the_tree_names_every_class_of_the_module():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == {*TREE, "LightRFTError", "SimWarning"}
    assert sorted(defined) == sorted(errors.__all__)


def test_the_drawing_names_every_error():
    assert [name for name in TREE if f" {name} " not in (errors.__doc__ or "")] == []


@pytest.mark.parametrize("name", TREE)
def test_an_error_has_its_place_in_the_tree_and_its_builtin(name):
    parent, builtin = TREE[name]
    cls = getattr(errors, name)
    assert cls.__bases__[0] is getattr(errors, parent)
    assert issubclass(cls, builtin)
    assert cls.__doc__


@pytest.mark.parametrize("name", TREE)
def test_an_error_survives_pickling(name):
    error = getattr(errors, name)("rank 3 left, expected 8 ranks")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "rank 3 left, expected 8 ranks"
    assert copy.args == error.args


@pytest.mark.parametrize("name", OF_THE_SIMULATOR)
def test_a_report_and_notes_survive_pickling(name):
    error = getattr(errors, name)("deadlock", report={"rank": 3})
    error.add_note("seed 7")
    copy = pickle.loads(pickle.dumps(error))
    assert copy.report == {"rank": 3}
    assert copy.__notes__ == ["seed 7"]


@pytest.mark.parametrize("name", OF_THE_SIMULATOR)
def test_an_error_without_a_report_has_none(name):
    assert getattr(errors, name)("deadlock").report is None


def test_a_report_is_given_by_keyword_only():
    with pytest.raises(TypeError):
        errors.DeadlockError("deadlock", {"rank": 3})


def test_the_warning_of_the_simulator_is_a_user_warning():
    assert issubclass(errors.SimWarning, UserWarning)
