"""Who is to blame when nobody can go on.

First the histories of all ranks are compared, call by call: whoever parts from the largest class is odd. Where that
tells nothing, ranks are put into classes by what they wait in, and whoever is outside the largest class is a suspect.
Rules then spare the victims: a rank that waits only for suspects, the members of a meeting to which most came, and a
rank that has ended and that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lightrft.sim.calls import Call

if TYPE_CHECKING:
    from lightrft.sim.calls import Group, Meeting
    from lightrft.sim.places import Place
    from lightrft.sim.world import SimWorld

__all__ = ["Standing", "cover", "deadlock_suspects", "odd_ranks", "outsiders"]

POINT_TO_POINT = frozenset({"send", "recv"})
_MOST_CALLS = 2_000_000
"""Longest trace whose histories are compared."""


class Standing(NamedTuple):
    """Where one rank stands: the class it is in, whom it waits for, and the meeting it waits in."""

    group_key: Any
    waits_for: frozenset[int]
    meeting: Meeting | None


def outsiders(classes: Mapping[Any, list[int]]) -> set[int]:
    """The ranks outside the largest class; all ranks if no class is the largest, or if there is only one."""
    sizes = sorted((len(members) for members in classes.values()), reverse=True)
    everybody = {rank for members in classes.values() for rank in members}
    if len(sizes) < 2 or sizes[0] == sizes[1]:
        return everybody
    largest = next(members for members in classes.values() if len(members) == sizes[0])
    return everybody - set(largest)


def cover(pairs: Iterable[tuple[int, int]]) -> set[int]:
    """The fewest ranks that have a part in every pair, found greedily; both ranks of a pair that stands alone."""
    left = {frozenset(pair) for pair in pairs}
    chosen: set[int] = set()
    while left:
        counts: dict[int, int] = {}
        for pair in left:
            for rank in pair:
                counts[rank] = counts.get(rank, 0) + 1
        most = max(counts.values())
        found = {rank for rank, count in counts.items() if count == most}
        chosen |= found if most == 1 else {min(found)}
        left = {pair for pair in left if not pair & chosen}
    return chosen


def deadlock_suspects(world: SimWorld) -> set[int]:
    """The ranks to blame for a deadlock."""
    missing: dict[Meeting, frozenset[int]] = {}
    standings = {rank.index: _standing(world, rank.index, missing) for rank in world.ranks}
    awaited = {target for standing in standings.values() for target in standing.waits_for}
    suspects = odd_ranks(world) & awaited
    if suspects:
        return suspects
    suspects = _suspects_by_place(standings)
    idle = {rank for rank in suspects if standings[rank].group_key == "finished" and rank not in awaited}
    return (suspects - idle) or suspects


def odd_ranks(world: SimWorld) -> set[int]:
    """The ranks whose histories part from those of most others.

    A history is the rank's collectives, each as its line, operation and size of group, with an end if it has returned.
    The walk goes call by call and stays with the largest class; it stops where no class is the largest. A rank whose
    history is over because it waits has not parted from anybody.
    """
    if len(world.calls) > _MOST_CALLS:
        return set()
    histories = _histories(world)
    together, odd = set(histories), set[int]()
    position = 0
    while True:
        classes: dict[Hashable, list[int]] = {}
        for rank in together:
            if position < len(histories[rank]):
                classes.setdefault(histories[rank][position], []).append(rank)
        apart = outsiders(classes) if len(classes) > 1 else set()
        here = {rank for members in classes.values() for rank in members}
        if not here or apart == here:
            return odd
        odd |= apart
        together = here - apart
        position += 1


def _histories(world: SimWorld) -> dict[int, list[Hashable]]:
    calls = [call for call in world.calls if call.signature.operation not in POINT_TO_POINT]
    roles = _role_places(calls, world.size)
    histories: dict[int, list[Hashable]] = {rank.index: [] for rank in world.ranks}
    for call in calls:
        if call.place not in roles:
            histories[call.rank].append((call.place, call.signature.operation, call.group.size))
    for rank in world.ranks:
        if rank.main is None or rank.main.finished:
            histories[rank.index].append("end")
    return histories


def _role_places(calls: list[Call], size: int) -> set[Place]:
    """Lines that one sub-group alone uses, and most of its members: a role, comparable to nobody outside it."""
    groups: dict[Place, set[Group]] = {}
    users: dict[Place, set[int]] = {}
    for call in calls:
        groups.setdefault(call.place, set()).add(call.group)
        users.setdefault(call.place, set()).add(call.rank)
    single = {place: next(iter(found)) for place, found in groups.items() if len(found) == 1}
    return {place for place, group in single.items() if group.size < size and 2 * len(users[place]) > group.size}


def _suspects_by_place(standings: Mapping[int, Standing]) -> set[int]:
    classes: dict[Any, list[int]] = {}
    for rank, standing in standings.items():
        classes.setdefault(standing.group_key, []).append(rank)
    suspects = outsiders(classes)
    suspects = _spare_nearly_complete_meetings(suspects, standings)
    return _spare_those_who_wait_for_suspects(suspects, standings)


def _standing(world: SimWorld, index: int, known: dict[Meeting, frozenset[int]]) -> Standing:
    """Where a rank stands; ``known`` keeps whom each meeting lacks, which all who wait in it would look up."""
    task = world.ranks[index].blocked_task()
    waiting = task.waiting if task is not None else None
    if waiting is None:
        return Standing("finished", frozenset(), None)
    if not isinstance(waiting, Call):
        holder = getattr(waiting, "waits_for", None)
        others = frozenset() if holder is None or holder == index else frozenset({holder})
        return Standing((type(waiting), waiting.describe()), others, None)
    if waiting.signature.operation in POINT_TO_POINT:
        ranks = waiting.group.ranks if waiting.peer is None or waiting.peer < 0 else (waiting.peer,)
        return Standing(("message", index), frozenset(ranks) - {index}, None)
    meeting = waiting.group.meetings.get(waiting.sequence)
    if meeting is not None and meeting not in known:
        known[meeting] = _missing(meeting)
    missing = known[meeting] if meeting is not None else frozenset()
    return Standing((waiting.group, waiting.sequence), missing, meeting)


def _missing(meeting: Meeting) -> frozenset[int]:
    ranks = meeting.first.group.ranks
    return frozenset(rank for rank, call in zip(ranks, meeting.calls, strict=True) if call is None)


def _spare_nearly_complete_meetings(suspects: set[int], standings: Mapping[int, Standing]) -> set[int]:
    """Suspects in a meeting that lacks only a few hand the blame on to those few, unless these are better off."""
    result = set(suspects)
    for rank in suspects:
        meeting = standings[rank].meeting
        if meeting is None:
            continue
        missing = _missing(meeting)
        arrived = meeting.first.group.size - len(missing)
        if arrived <= len(missing) or missing & suspects:
            continue
        theirs = [len(_missing(m)) for other in missing if (m := standings[other].meeting) is not None]
        if theirs and len(missing) < min(theirs):
            result -= set(meeting.first.group.ranks)
            result |= missing
    return result


def _spare_those_who_wait_for_suspects(suspects: set[int], standings: Mapping[int, Standing]) -> set[int]:
    """Drop whoever waits only for other suspects, and is not waited for by them in turn."""
    spared = set[int]()
    for circle in _circles(suspects, standings):
        outward = frozenset[int]().union(*{standings[member].waits_for for member in circle}) - circle
        if outward and outward <= suspects:
            spared |= circle
    return suspects - spared


def _circles(suspects: set[int], standings: Mapping[int, Standing]) -> list[set[int]]:
    """The suspects in classes whose members wait for each other, directly or through other suspects.

    These are the strongly connected components of a graph (Kosaraju). Ranks that wait in one meeting wait for the same
    set; the set is a node of its own between them, which keeps the edges few where the ranks are many.
    """
    forward: dict[Hashable, list[Hashable]] = {}
    for rank in sorted(suspects):
        awaited = standings[rank].waits_for
        forward[rank] = [awaited]
        if awaited not in forward:
            forward[awaited] = [*sorted(awaited & suspects)]
    backward: dict[Hashable, list[Hashable]] = {node: [] for node in forward}
    for node, targets in forward.items():
        for target in targets:
            backward[target].append(node)

    finished: list[Hashable] = []
    seen = set[Hashable]()
    for node in forward:
        finished += _walk(node, forward, seen)
    seen.clear()
    components = [_walk(node, backward, seen) for node in reversed(finished)]
    circles = [{node for node in component if isinstance(node, int)} for component in components]
    return [circle for circle in circles if circle]


def _walk(start: Hashable, edges: Mapping[Hashable, list[Hashable]], seen: set[Hashable]) -> list[Hashable]:
    """The nodes that ``start`` leads to and that were not seen before, each after those it leads to."""
    if start in seen:
        return []
    seen.add(start)
    finished: list[Hashable] = []
    path = [(start, iter(edges[start]))]
    while path:
        node, targets = path[-1]
        following = next((target for target in targets if target not in seen), None)
        if following is None:
            finished.append(node)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(edges[following])))
    return finished
