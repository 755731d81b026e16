"""Programs drawn at random, on real gloo processes and on simulated ranks.

``LIGHTRFT_PROGRAMS_SEED=7`` draws other programs. A program that comes out differently is shrunk, and printed as what
makes it anew.
"""

import os
from random import Random

import pytest
from programs.comparison import difference, smallest, spoils
from programs.faulty_programs import FAULTS, draw_fault
from programs.interpreter import main
from programs.random_programs import sample

from lightrft.errors import CollectiveTimeoutError, RankFailedError, SimulationError
from lightrft.sim import ProcessWorld, SimWorld

SEED = os.environ.get("LIGHTRFT_PROGRAMS_SEED", "0")
COUNT = 500
SIZES = range(2, 9)

SILENT = {"nothing", "wrong values"}
"""How a run may end without telling anybody."""


def alone(results):
    """What one program left, by rank, of a run of it alone."""
    return [found and found[0] for found in results]


def simulated(program):
    return alone(SimWorld(program.size, profile="gloo", strict=True).run(main, [program]))


def disagreement(program):
    """What differs between the two worlds when they run this program only, or None."""
    try:
        real = alone(ProcessWorld(program.size, limit=30).run(main, [program]))
    except SimulationError as error:
        return f"real processes fail: {error}"
    try:
        return difference(program, simulated(program), real)
    except SimulationError as error:
        return f"simulated ranks fail: {error}"


def agrees(program, real):
    try:
        return difference(program, simulated(program), real) is None
    except SimulationError:
        return False


@pytest.mark.processes
@pytest.mark.parametrize("size", SIZES)
def test_both_worlds_come_to_the_same_values(size):
    programs = [program for program in sample(COUNT, SEED) if program.size == size]
    assert programs
    try:
        real = ProcessWorld(size, limit=120).run(main, programs)
        doubtful = [p for index, p in enumerate(programs) if not agrees(p, [found[index] for found in real])]
    except SimulationError:
        doubtful = programs
    for program in doubtful:
        if disagreement(program):
            program = smallest(program, disagreement)  # noqa: PLW2901 - the same one, shorter
            pytest.fail(f"{disagreement(program)}\n{program}")
    assert not doubtful, f"only in a row with others: {doubtful}"


def on_gloo(fault):
    """How real processes take a faulty program: what they say, or ``nothing``, or ``wrong values``."""
    world = ProcessWorld(fault.program.size, limit=3)
    try:
        found = alone(world.run(main, [fault.program], 1.0))
    except CollectiveTimeoutError:
        return "hangs"
    except RankFailedError as error:
        text = str(error)
        if isinstance(error.__cause__, ValueError):
            return "raises"
        if "died of SIG" in text:
            return "crashes"
        # gloo gives up after the timeout of the group, and ranks that still wait then lose their connections
        return "hangs" if "Timed out" in text or "timeout" in text else "loses the connection"
    return "wrong values" if spoils(fault.legal, found, simulated(fault.legal)) else "nothing"


def small_fault(kind, index):
    """A fault in a program for two or three ranks."""
    drawn = (draw_fault(Random(f"real {SEED} {kind} {index} {attempt}"), kind) for attempt in range(100))
    return next(fault for fault in drawn if fault.program.size < 4)


@pytest.mark.processes
def test_gloo_says_nothing_about_faults_that_simulated_ranks_name():
    outcomes = {}
    for kind in FAULTS:
        for index in range(2):
            fault = small_fault(kind, index)
            with pytest.raises(SimulationError) as caught:
                simulated(fault.program)
            assert type(caught.value).__name__ in fault.expected, fault
            outcomes.setdefault(kind, []).append(on_gloo(fault))
    told = "\n".join(f"{kind:24} {', '.join(found)}" for kind, found in outcomes.items())
    print(told)  # noqa: T201 - shown by pytest -s, for docs/differences.md
    for kind in ("another_reduction", "no_wait", "written_before_wait"):
        assert set(outcomes[kind]) <= SILENT, told
    assert set(outcomes["exception"]) == {"raises"}, told
    assert set(outcomes["another_tag"]) <= {"hangs", "loses the connection"}, told
    assert not any("raises" in found for kind, found in outcomes.items() if kind != "exception"), told
