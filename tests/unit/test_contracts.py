"""The form of a contract; and the contract of process groups, which a simulator that is broken on purpose breaks."""

import json
import subprocess
import sys
import unittest
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lightrft.errors import ConfigError, ContractError, SimulationError
from lightrft.sim import (
    SimWorld,
    acceptance,
    collectives,
    contracts,
    divergence,
    point_to_point,
    process_group,
    works,
    world,
)
from lightrft.sim.contracts import Contract
from lightrft.sim.contracts.process_group import CHECKS, LACKS, Subject

PAGE = (Path(__file__).parents[2] / "docs" / "contracts.md").read_text()

# -- the form ---------------------------------------------------------------------------------------------------------


@dataclass
class Queue:
    """A subject with no simulator in sight."""

    items: list = field(default_factory=list)
    lacks: dict = field(default_factory=dict)
    name: str = "a list"


def queues():
    """A contract of its own, with a check that holds, one that needs a capability, and one that is never tried."""
    contract = Contract("queue", prefix="Q", capabilities={"undo": "pop gives items back", "network": "it is remote"})

    @contract.check(2, "undo")
    def check_pop(queue):
        """`pop` gives the last item
        back."""
        queue.items.append(1)
        assert queue.items.pop() == 1

    @contract.check(1)
    def check_append(queue):
        """`append` takes an item."""
        queue.items.append(1)

    @contract.check(3, "network", probed=False)
    def check_remote(queue):
        """It is remote."""
        raise SystemExit("the end of the process")

    return contract


def test_checks_are_listed_by_number_with_their_property():
    first, second, _ = queues().checks
    assert [str(check) for check in queues().checks] == ["Q001-append", "Q002-pop", "Q003-remote"]
    assert (first.property, first.needs, first.probed) == ("`append` takes an item.", (), True)
    assert (second.property, second.needs) == ("`pop` gives the last item back.", ("undo",))


def test_a_check_that_fails_says_which_property_of_what():
    with pytest.raises(AttributeError) as caught:
        queues().checks[1](Queue(items=None, name="nothing"))
    assert caught.value.__notes__ == ["Q002-pop, checked of nothing: `pop` gives the last item back.\nIt needs: undo."]


def test_what_is_lacking_is_tried_and_has_to_fail():
    append, pop, _ = queues().checks
    lacks = {"undo": "there is no way back"}
    pop(Queue(items=None, lacks=lacks))
    append(Queue(lacks=lacks))
    with pytest.raises(ContractError, match=r"Q002-pop: a list is declared to lack undo \(there is no way back\), but"):
        pop(Queue(lacks=lacks))


def test_what_would_do_harm_is_not_tried():
    remote = queues().checks[2]
    with pytest.raises(unittest.SkipTest, match=r"Q003-remote: a list lacks network \(it is here\); not tried"):
        remote(Queue(lacks={"network": "it is here"}))
    with pytest.raises(SystemExit):
        remote(Queue())


def test_a_lack_is_a_capability_with_a_reason():
    check = queues().checks[0]
    with pytest.raises(ConfigError, match="lacks 'redo', which is no capability: expected one of network, undo"):
        check(Queue(lacks={"redo": "no"}))
    with pytest.raises(ConfigError, match="lacks 'undo': say why"):
        check(Queue(lacks={"undo": " "}))


@pytest.mark.parametrize(
    ("number", "needs", "name", "text", "message"),
    [
        (1, (), "check_other", "Text.", "Q001 is append; numbers are given once"),
        (9, ("redo",), "check_other", "Text.", "needs 'redo', which is no capability of the contract 'queue'"),
        (9, (), "other", "Text.", "expected a name that begins with check_"),
        (9, (), "check_other", None, "expected a docstring"),
    ],
)
def test_what_is_no_check_is_refused(number, needs, name, text, message):
    def function(subject): ...

    function.__name__, function.__doc__ = name, text
    with pytest.raises(ConfigError, match=message):
        queues().check(number, *needs)(function)


def test_a_contract_is_bound_to_a_pytest_function_by_a_line():
    mark = queues().parametrize("one").mark
    assert (mark.name, mark.args[0], mark.kwargs["ids"]) == ("parametrize", "one", str)
    assert [str(check) for check in mark.args[1]] == ["Q001-append", "Q002-pop", "Q003-remote"]


def test_the_form_needs_neither_torch_nor_pytest():
    source = (
        "import json, sys; from lightrft.sim import contracts; contracts.Contract('x', prefix='X');"
        "print(json.dumps(sorted({'torch', 'pytest', 'numpy'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_example_of_the_page_works():
    blocks = [block.split("```")[0] for block in PAGE.split("```python\n")[1:]]
    found = {"__name__": "example"}
    exec("\n".join(blocks), found)
    for check in found["clocks"].checks:
        found["test_the_clock_of_the_system"](check)
    for check in CHECKS[:3]:
        found["test_process_groups"](check)


# -- the contract of process groups -----------------------------------------------------------------------------------


def test_its_checks_and_capabilities_are_those_of_the_page():
    contract = contracts.process_group.contract
    assert contract.table() in PAGE
    for name, meaning in contract.capabilities.items():
        assert f"| `{name}` | {meaning} |" in PAGE, name
    for implementation, lacks in LACKS.items():
        rows = [f"| `{name}` | {reason} |" for name, reason in lacks.items() if name != "rank_order"]
        section = PAGE.partition(f"### {implementation}\n")[2].partition("\n#")[0]
        assert section.split("|---|---|\n")[1].strip().splitlines() == rows, implementation


def test_the_checks_of_strategies_are_those_of_the_page():
    contract = contracts.strategy.contract
    assert contract.table() in PAGE
    assert {name for check in contract.checks for name in check.needs} == contract.capabilities.keys()
    for name, meaning in contract.capabilities.items():
        assert f"| `{name}` | {meaning} |" in PAGE, name


def test_the_checks_of_engines_are_those_of_the_page():
    several = (contracts.engine.contract, contracts.weight_sync.contract)
    for contract in several:
        assert contract.table() in PAGE
        assert f"\n{len(contract.checks)} checks of what" in PAGE
    assert {name for contract in several for check in contract.checks for name in check.needs} == (
        contracts.engine.CAPABILITIES.keys()
    )
    for name, meaning in contracts.engine.CAPABILITIES.items():
        assert f"| `{name}` | {meaning} |" in PAGE, name
    for engine, lacks in contracts.engine.LACKS.items():
        assert f"| {engine} | nothing | |" in PAGE or lacks, engine
        for name, reason in lacks.items():
            assert f"| {engine} | `{name}` | {reason} |" in PAGE, (engine, name)


def test_every_capability_is_needed_and_had_by_some_and_lacked_by_some():
    capabilities = contracts.process_group.contract.capabilities.keys()
    assert {name for check in CHECKS for name in check.needs} == capabilities
    lacked = Counter(name for name, lacks in LACKS.items() if name != "gloo" for name in lacks)
    assert all(lacked[name] < len(LACKS) - 1 for name in capabilities), lacked
    assert {name for lacks in LACKS.values() for name in lacks} | {"rank_order"} == capabilities


MUTATIONS = {
    # what is wrong: the number of a check that sees it, what is replaced, and how the original becomes the broken one
    "all_gather in the wrong order": (202, collectives, "all_gather", lambda f: lambda i: [row[::-1] for row in f(i)]),
    "all_gather_single in the wrong order": (203, collectives, "all_gather_single", lambda f: lambda i: f(i[::-1])),
    "AVG without division": (103, collectives, "_divide", lambda f: lambda result, count: None),
    "MIN is MAX": (105, collectives, "_combine", lambda f: lambda op: f("MAX" if op == "MIN" else op)),
    "every root is rank 0": (201, process_group, "_root", lambda f: lambda opts: 0),
    "a root in a group is another one": (711, process_group, "_root", lambda f: lambda opts: max(f(opts) - 1, 0)),
    "reduce to another root": (117, collectives, "reduce_to", lambda f: lambda *args: f(*args)[::-1]),
    "gather in the wrong order": (207, collectives, "gather", lambda f: lambda *a: [row[::-1] for row in f(*a)]),
    "scatter gives all the same": (208, collectives, "scatter", lambda f: lambda i, root: f(i, root)[:1] * len(i)),
    "reduce_scatter to the next rank": (
        120,
        collectives,
        "reduce_scatter",
        lambda f: lambda *args: f(*args)[1:] + f(*args)[:1],
    ),
    "reduce_scatter_single backwards": (
        122,
        collectives,
        "reduce_scatter_single",
        lambda f: lambda *args: f(*args)[::-1],
    ),
    "all_to_all moves nothing": (210, collectives, "all_to_all", lambda f: list),
    "all_to_all_single in the wrong order": (
        212,
        collectives,
        "all_to_all_single",
        lambda f: lambda inputs, splits: f(inputs[::-1], splits[::-1]),
    ),
    "all_to_all_single forgets the splits": (
        213,
        collectives,
        "all_to_all_single",
        lambda f: lambda inputs, splits: f(inputs, [sizes[::-1] for sizes in splits]),
    ),
    "what is received is no copy": (217, collectives, "_copies", lambda f: list),
    "results show before wait": (510, works, "poison", lambda f: lambda tensors: None),
    "a changed input goes unseen": (511, works.CollectiveWork, "_check_untouched", lambda f: lambda self: None),
    "no result arrives": (501, process_group, "write_results", lambda f: lambda results, outputs: None),
    "nobody misses a wait": (512, world.SimWorld, "_note_leftovers", lambda f: lambda self, rank: None),
    "the last message comes first": (404, point_to_point, "_find", lambda f: lambda q, *a: f([*(q or ())][::-1], *a)),
    "tags are ignored": (405, point_to_point, "_find", lambda f: lambda queue, *_: queue[0] if queue else None),
    "barriers let everybody through": (
        513,
        process_group.SimProcessGroup,
        "barrier",
        lambda f: lambda self, *_: works.DoneWork(),
    ),
    "strides are accepted": (912, acceptance.Acceptance, "_not_contiguous", lambda f: lambda *_: None),
    "a rest is dropped": (
        910,
        acceptance.Acceptance,
        "splits",
        lambda f: lambda self, what, tensor, splits: [len(tensor) // self.size] * self.size,
    ),
    "a destroyed group goes on": (
        925,
        process_group.SimProcessGroup,
        "shutdown",
        lambda f: lambda self: None,
    ),
    "ranks may disagree": (954, world.SimWorld, "disagree", lambda f: lambda *_: None),
    "groups may differ": (958, world.SimWorld, "note_creation", lambda f: lambda *_: None),
    "timeouts are no error": (517, divergence, "timeout_verdict", lambda f: lambda *_: None),
}


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_broken_simulator_breaks_the_contract(wrong, monkeypatch):
    number, target, name, broken = MUTATIONS[wrong]
    check = next(check for check in CHECKS if check.number == f"PG{number}")
    subject = Subject(
        world=lambda size: SimWorld(size, profile="gloo"),
        backend="gloo",
        name="the simulator",
        lacks=LACKS["simulated gloo"],
    )
    check(subject)
    monkeypatch.setattr(target, name, broken(getattr(target, name)))
    with pytest.raises((AssertionError, SimulationError)):
        check(subject)
