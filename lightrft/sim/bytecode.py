"""What a function does to state that outlives its call, as its bytecode shows.

The answer errs on one side: what is not recognised as reading counts as writing.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from dis import Instruction
from types import CodeType
from typing import NamedTuple

__all__ = ["INSIDE", "WRITES", "Uses", "nested", "uses_of", "words"]

INSIDE = 1
"""An item of the object may be changed, the object itself is not."""

WRITES = 2
"""The object may be changed."""

_LOOK_AHEAD = 60


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


_READING = words(
    "get items keys values copy index count most_common elements issubset issuperset isdisjoint union intersection "
    "difference symmetric_difference shape dtype device ndim size numel item tolist clone detach startswith"
)
"""Methods and attributes through which a container, tensor or array is only read."""

_CHANGING = words(
    "add append appendleft clear discard extend extendleft insert pop popitem popleft remove reverse rotate setdefault "
    "sort subtract update"
)
"""Methods that change a container."""

_READERS = words(
    "all any bool dict enumerate frozenset id isinstance iter len list max min print range repr reversed set sorted "
    "str sum tuple type zip"
)
"""Functions that only read the container they are given."""

_LOADS_OF_NAMES = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_LOADS_OF_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_LOADS_OF_LOCALS = frozenset({"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF"})
_CALLS = frozenset({"CALL", "PRECALL", "CALL_KW"})
_ONLY_READ_AT_TOP = words(
    "GET_LEN TO_BOOL UNARY_NOT CONTAINS_OP COMPARE_OP IS_OP BINARY_OP BINARY_SUBSCR FORMAT_VALUE FORMAT_SIMPLE "
    "LIST_EXTEND SET_UPDATE DICT_UPDATE DICT_MERGE POP_TOP"
)
_ONLY_READ_BELOW = frozenset({"CONTAINS_OP", "COMPARE_OP", "IS_OP"})


class Uses(NamedTuple):
    """What one code object does.

    Attributes:
        rebound: globals that it assigns or deletes.
        names: for each global name that it loads, whether the object may be changed: 0, :data:`INSIDE`, :data:`WRITES`.
        attributes: the same for what it loads as an attribute of something.
        parameters: the same for its parameters.
        stored: attributes that it assigns, with the name of the global or attribute that they belong to; an empty
            name for those of anything else.
        stored_on_first: attributes that it assigns to its first parameter.
        mentioned: all names of globals and attributes, and all strings.
    """

    rebound: frozenset[str]
    names: dict[str, int]
    attributes: dict[str, int]
    parameters: dict[str, int]
    stored: frozenset[tuple[str, str]]
    stored_on_first: frozenset[str]
    mentioned: frozenset[str]


def nested(code: CodeType) -> Iterator[CodeType]:
    """``code`` and all that is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@functools.lru_cache(maxsize=16384)
def uses_of(code: CodeType) -> Uses:
    """What ``code`` does, without what is defined in it."""
    return _Reading(code).uses()


class _Reading:
    """Goes through the instructions of one code object."""

    def __init__(self, code: CodeType) -> None:
        self._code = code
        self._instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
        self._writes_something = any(map(_writes, self._instructions))
        self._first = code.co_varnames[0] if code.co_argcount else None

    def uses(self) -> Uses:
        code = self._code
        arguments = code.co_argcount + code.co_kwonlyargcount
        parameters = dict.fromkeys(code.co_varnames[:arguments], 0)
        names: dict[str, int] = {}
        attributes: dict[str, int] = {}
        rebound, stored, on_first = set(), set(), set()
        for position, instruction in enumerate(self._instructions):
            operation, name = instruction.opname, instruction.argval
            if operation in _LOADS_OF_NAMES:
                names[name] = max(names.get(name, 0), self._use(position))
            elif operation in _LOADS_OF_ATTRIBUTES:
                attributes[name] = max(attributes.get(name, 0), self._use(position))
            elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                rebound.add(name)
            elif operation in ("STORE_ATTR", "DELETE_ATTR"):
                owner = self._owner(position)
                if owner is None:
                    on_first.add(name)
                else:
                    stored.add((owner, name))
            elif operation in _LOADS_OF_LOCALS and name in parameters:
                parameters[name] = max(parameters[name], self._use(position))
            elif type(name) is tuple and operation.startswith(("LOAD_FAST_", "STORE_FAST_LOAD_FAST")):
                parameters.update(dict.fromkeys(parameters.keys() & {*name}, WRITES))  # two at once: not looked into
        strings = {constant for constant in code.co_consts if isinstance(constant, str)}
        return Uses(
            rebound=frozenset(rebound),
            names=names,
            attributes=attributes,
            parameters=parameters,
            stored=frozenset(stored),
            stored_on_first=frozenset(on_first),
            mentioned=frozenset({*code.co_names, *strings}),
        )

    def _owner(self, position: int) -> str | None:
        """What an attribute is assigned to: its name, None for the first parameter, empty for anything else."""
        before = self._instructions[position - 1]
        if before.opname == "SWAP":  # x.a += 1
            before = self._owner_in_place(position)
        name = before.argval[-1] if type(before.argval) is tuple else before.argval
        if before.opname in _LOADS_OF_NAMES or before.opname in _LOADS_OF_ATTRIBUTES:
            return str(name)
        return None if before.opname.startswith(("LOAD_FAST", "STORE_FAST_LOAD_FAST")) and name == self._first else ""

    def _owner_in_place(self, position: int) -> Instruction:
        name = self._instructions[position].argval
        for index in range(position - 1, 1, -1):
            load, copy = self._instructions[index], self._instructions[index - 1]
            if load.opname == "LOAD_ATTR" and load.argval == name and copy.opname == "COPY":
                return self._instructions[index - 2]
        return self._instructions[position - 1]

    def _use(self, position: int) -> int:
        """What becomes of the object that the instruction at ``position`` loads."""
        depth = 1  # how far below the top of the stack the object lies, the top being 1
        inside = INSIDE if self._writes_something else 0
        for instruction in self._instructions[position + 1 : position + _LOOK_AHEAD]:
            found = _consumer(instruction, depth, inside)
            if found is not None:
                return found
            before = depth
            depth += _effect(instruction)
            if depth < 1:
                first = before == 1 or instruction.opname in _CALLS
                return inside if first and self._is_argument_of_reader(position, instruction) else WRITES
        return WRITES

    def _is_argument_of_reader(self, position: int, call: Instruction) -> bool:
        """Whether the object is the first argument of a function that only reads it."""
        callee = self._instructions[position - 1]
        return call.opname in _CALLS and callee.opname in _LOADS_OF_NAMES and callee.argval in _READERS


def _consumer(instruction: Instruction, depth: int, inside: int) -> int | None:
    """What ``instruction`` does to the object at ``depth``; None if it leaves it where it lies."""
    operation = instruction.opname
    if depth == 1:
        if operation in _LOADS_OF_ATTRIBUTES:
            return inside if instruction.argval in _READING else WRITES
        if operation == "GET_ITER":
            return inside
        if operation in _ONLY_READ_AT_TOP or (operation.startswith("POP_JUMP") and "IF" in operation):
            return 0
    elif (depth == 2 and operation == "BINARY_SUBSCR") or (depth == 3 and operation == "BINARY_SLICE"):
        return inside
    elif depth == 2 and operation == "BINARY_OP":
        if instruction.argrepr == "[]":  # how Python 3.14 spells it
            return inside
        return WRITES if instruction.argrepr.endswith("=") else 0
    elif depth == 2 and operation in _ONLY_READ_BELOW:
        return 0
    return WRITES if instruction.opcode in _JUMPS else None


_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


def _effect(instruction: Instruction) -> int:
    argument = instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None
    return dis.stack_effect(instruction.opcode, argument, jump=False)


def _writes(instruction: Instruction) -> bool:
    operation = instruction.opname
    return (
        operation in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE", "STORE_ATTR")
        or (operation == "BINARY_OP" and instruction.argrepr.endswith("="))
        or (operation in _LOADS_OF_ATTRIBUTES and (instruction.argval in _CHANGING or instruction.argval[-1:] == "_"))
    )
