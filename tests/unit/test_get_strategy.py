"""Which strategy ``get_strategy`` chooses, and classes that users register."""

import argparse
import subprocess
import sys

import pytest
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy import StrategyConfig, get_strategy, register_strategy
from lightrft.strategy.strategy_base import StrategyBase


def new_strategy(name="Recorder", **methods):
    """A class that implements every abstract method, and keeps what it is built with in ``given``."""

    def build(self, **given):
        self.given = given

    rest = dict.fromkeys(StrategyBase.__abstractmethods__, lambda self, *words, **more: None)
    return type(name, (StrategyBase,), {**rest, "__init__": build, "__module__": __name__, **methods})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A registry of the test's own."""
    own = {}
    monkeypatch.setattr("lightrft.strategy.strategy._registered", own)
    return own


@pytest.fixture
def recorders():
    """Stand-ins under the names of the built-in strategies."""
    found = {name: new_strategy(name.capitalize()) for name in ("deepspeed", "fsdp", "fake")}
    for name, cls in found.items():
        register_strategy(name, cls, override=True)
    return found


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "deepspeed"),
        ({"zero_stage": 3}, "deepspeed"),
        ({"fsdp": False}, "deepspeed"),
        ({"fsdp": True}, "fsdp"),
        ({"fsdp": True, "zero_stage": 2}, "fsdp"),
        ({"strategy": "fsdp"}, "fsdp"),
        ({"strategy": "deepspeed"}, "deepspeed"),
        ({"strategy": "fake"}, "fake"),
        ({"strategy": "fake", "fsdp": True}, "fake"),
    ],
)
def test_the_configuration_chooses(recorders, settings, name):
    for args in (settings, argparse.Namespace(**settings), StrategyConfig(**settings)):
        assert type(get_strategy(args)) is recorders[name]
    assert type(get_strategy({}, **settings)) is recorders[name]


def test_one_flag_switches_the_backend(recorders):
    args = argparse.Namespace(fsdp=False, zero_stage=2)
    assert type(get_strategy(args)) is recorders["deepspeed"]
    args.fsdp = True
    assert type(get_strategy(args)) is recorders["fsdp"]


def test_a_strategy_is_built_with_the_settings_and_the_original_arguments(recorders):
    args = argparse.Namespace(seed=7, max_norm=0.5, micro_train_batch_size=2, train_batch_size=8, kl=0.1)
    given = get_strategy(args).given
    assert given.pop("args") is args
    assert given == {"seed": 7, "max_norm": 0.5, "micro_train_batch_size": 2, "train_batch_size": 8}


def test_a_configuration_is_handed_on_as_it_is(recorders):
    config = StrategyConfig(seed=7)
    assert get_strategy(config).given["args"] is config
    assert get_strategy().given["args"] is None


@pytest.mark.parametrize("kind", [dict, argparse.Namespace, StrategyConfig])
def test_overrides_win_even_those_that_restore_a_default(recorders, kind):
    given = get_strategy(kind(seed=7, fsdp=True), seed=42, fsdp=False).given
    assert given["seed"] == 42
    assert given["args"] == StrategyConfig()


def test_an_override_may_change_an_entry_of_the_users_own(recorders):
    assert get_strategy(argparse.Namespace(kl=0.1), kl=0.2).given["args"].get_extra_arg("kl") == 0.2


def test_the_class_of_a_configuration_is_kept(recorders):
    class Mine(StrategyConfig):
        pass

    assert type(get_strategy(Mine(), seed=7).given["args"]) is Mine


def test_k08_an_unknown_strategy_names_those_that_are_known():
    register_strategy("mine", new_strategy())
    with pytest.raises(
        ConfigError, match="strategy='zero' is unknown: expected one of deepspeed, fake, fsdp, mine; reg"
    ):
        get_strategy({"strategy": "zero"})


def test_k08_an_unknown_override_is_refused(recorders):
    with pytest.raises(ConfigError, match="'zero_stge' is no setting: did you mean zero_stage"):
        get_strategy({}, zero_stge=3)


def test_nothing_is_printed(recorders, capsys):
    get_strategy(argparse.Namespace(kl=0.1), seed=7)
    assert capsys.readouterr() == ("", "")


def built_in(asked):
    names = [type(get_strategy(args)).__name__ for args in asked]
    dist.destroy_process_group()
    return names


def test_the_built_in_strategies():
    asked = [{"fsdp": True}, {}, {"strategy": "fake"}]
    assert (
        SimWorld(2, stall_limit=60).run(built_in, asked)
        == [["FSDPV2Strategy", "DeepspeedStrategy", "FakeStrategy"]] * 2
    )


# -- packages that are missing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "extra"), [("deepspeed", "deepspeed"), ("accelerate", "deepspeed"), ("transformers", "train")]
)
def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch, package, extra):
    def build(self, **given):
        __import__(package)

    monkeypatch.setitem(sys.modules, package, None)
    register_strategy("mine", new_strategy(__init__=build))
    with pytest.raises(ConfigError, match="the strategy 'mine' needs the package") as refused:
        get_strategy({"strategy": "mine"})
    assert f'{package}, which is not installed: pip install "lightrft[{extra}]"' in str(refused.value)
    assert isinstance(refused.value.__cause__, ImportError)


@pytest.mark.parametrize("name", ["my_own_package", "deepspeed.moved_elsewhere"])
def test_an_import_that_no_extra_would_mend_fails_as_it_is(name):
    def build(self, **given):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    register_strategy("mine", new_strategy(__init__=build))
    with pytest.raises(ModuleNotFoundError, match=name):
        get_strategy({"strategy": "mine"})


def test_k01_without_deepspeed_its_strategy_is_refused_with_the_extra():
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from lightrft.strategy import get_strategy\n"
        "from lightrft.errors import ConfigError\n"
        "try: get_strategy({})\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'pip install "lightrft[deepspeed]"' in done.stdout, done.stderr


# -- classes that users register --------------------------------------------------------------------------------------


def test_a_registered_class_is_built_by_its_name():
    mine = new_strategy()
    register_strategy("mine", mine)
    strategy = get_strategy(argparse.Namespace(strategy="mine", seed=7))
    assert type(strategy) is mine
    assert strategy.given["seed"] == 7


def test_a_name_is_taken_once():
    register_strategy("mine", new_strategy("First"))
    with pytest.raises(ConfigError, match=f"'mine' is {__name__}.First already: register .*Second by another"):
        register_strategy("mine", new_strategy("Second"))
    second = new_strategy("Second")
    register_strategy("mine", second, override=True)
    assert type(get_strategy({"strategy": "mine"})) is second


def test_the_same_class_may_be_registered_again_also_when_its_module_was_executed_again():
    first, again = new_strategy("Mine"), new_strategy("Mine")
    for cls in (first, first, again):
        register_strategy("mine", cls)
    assert type(get_strategy({"strategy": "mine"})) is again


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "fake"])
def test_a_built_in_strategy_is_not_replaced_silently(name):
    with pytest.raises(ConfigError, match=f"the strategy '{name}' is lightrft.strategy.*Strategy already: register"):
        register_strategy(name, new_strategy())
    mine = new_strategy()
    register_strategy(name, mine, override=True)
    assert type(get_strategy({"strategy": name})) is mine


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_string(name):
    with pytest.raises(ConfigError, match="expected the name of a strategy, a string that is not empty"):
        register_strategy(name, new_strategy())


@pytest.mark.parametrize("wrong", [object, "FakeStrategy", lambda: None, None])
def test_only_a_subclass_of_the_base_is_registered(wrong):
    with pytest.raises(
        ConfigError, match="expected a class that inherits from lightrft.strategy.strategy_base.StrategyBase"
    ):
        register_strategy("mine", wrong)


def test_a_class_that_lacks_methods_is_refused_with_their_names():
    class Unfinished(StrategyBase):
        pass

    with pytest.raises(ConfigError, match="Unfinished does not implement .*backward"):
        register_strategy("mine", Unfinished)


def register_own():
    class Mine(new_strategy()):
        pass

    register_strategy("mine", Mine)
    dist.init_process_group("gloo")
    dist.barrier()  # by now every rank has registered its own
    found = get_strategy({"strategy": "mine"})
    dist.destroy_process_group()
    return type(found) is Mine


@pytest.mark.parametrize("schedule", ["fifo", "random"])
def test_every_rank_registers_a_class_of_its_own(schedule):
    assert SimWorld(4, schedule=schedule, stall_limit=60).run(register_own) == [True] * 4


def test_ranks_know_what_was_registered_before_the_run():
    mine = new_strategy()
    register_strategy("mine", mine)
    results = SimWorld(2, stall_limit=60).run(lambda: type(get_strategy({"strategy": "mine"})) is mine)
    assert results == [True] * 2


def test_the_documented_extension():
    class MyCustomStrategy(new_strategy(__init__=StrategyBase.__init__)):
        def setup_distributed(self, timeout=None, num_gpu_per_node=None):
            self.joined = True

        def backward(self, loss, model, optimizer, **kwargs):
            return "custom backward"

    register_strategy("custom", MyCustomStrategy)
    args = argparse.Namespace(strategy="custom", train_batch_size=6, micro_train_batch_size=2)
    strategy = get_strategy(args)
    assert strategy.args is args
    assert strategy.joined
    assert strategy.accumulated_gradient == 3
    assert strategy.backward(None, None, None) == "custom backward"
