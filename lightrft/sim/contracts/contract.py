"""The form of a contract: numbered checks of one property each, and named capabilities.

It knows nothing of what is checked. A check is a function of one argument, the *subject*: whatever the checks of that
contract need of an implementation, with its name and what it lacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from unittest import SkipTest

from lightrft.errors import ConfigError, ContractError

if TYPE_CHECKING:
    import pytest

__all__ = ["Check", "Contract", "Subject"]


class Subject(Protocol):
    """What every subject has, whatever else the checks of its contract need."""

    @property
    def name(self) -> str:
        """How messages call the implementation."""

    @property
    def lacks(self) -> Mapping[str, str]:
        """Capabilities that the implementation does not have, each with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One property that an implementation has to have.

    Attributes:
        number: prefix of the contract and a number, such as ``PG101``; it never changes.
        name: the function's name, without ``check_``.
        property: the property in one sentence.
        needs: names of the capabilities without which it cannot hold.
        probed: whether it can be tried on an implementation that lacks one of them: without harm, and with the same
            outcome each time.
        function: checks a subject, and raises if the property does not hold.
        capabilities: all capabilities that the contract knows.
    """

    number: str
    name: str
    property: str
    needs: tuple[str, ...]
    probed: bool
    function: Callable[[Any], None]
    capabilities: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.number}-{self.name}"

    def __call__(self, subject: Subject) -> None:
        """Check ``subject``.

        A check that needs something that the subject lacks runs all the same, and has to fail: what is declared is
        verified either way.

        Raises:
            Exception: whatever the check raised; a note names the property.
            ContractError: the subject declares that it lacks what the check needs, and the check passes.
            ConfigError: the subject declares that it lacks something unknown, or gives no reason.
            unittest.SkipTest: the subject lacks what the check needs, and the check cannot be tried without harm.
                Pytest and unittest report it as skipped.
        """
        self._verify(subject)
        lacking = "; ".join(f"{name} ({subject.lacks[name]})" for name in self.needs if name in subject.lacks)
        if not lacking:
            self._hold(subject)
            return
        if not self.probed:
            raise SkipTest(f"{self}: {subject.name} lacks {lacking}; not tried")
        try:
            self.function(subject)
        except SkipTest:
            raise
        except Exception:  # noqa: BLE001 - an implementation may fail in any way; that it does is what is checked
            return
        raise ContractError(
            f"{self}: {subject.name} is declared to lack {lacking}, but it works: remove it from what it lacks"
        )

    def _hold(self, subject: Subject) -> None:
        try:
            self.function(subject)
        except SkipTest:
            raise
        except Exception as error:
            needs = f"\nIt needs: {', '.join(self.needs)}." if self.needs else ""
            error.add_note(f"{self}, checked of {subject.name}: {self.property}{needs}")
            raise

    def _verify(self, subject: Subject) -> None:
        for name, reason in subject.lacks.items():
            if name not in self.capabilities:
                known = ", ".join(sorted(self.capabilities)) or "none"
                raise ConfigError(f"{subject.name} lacks {name!r}, which is no capability: expected one of {known}")
            if not reason.strip():
                raise ConfigError(f"{subject.name} lacks {name!r}: say why")


class Contract:
    """A numbered list of checks.

    Args:
        name: what implements it, such as ``process group``.
        prefix: begins the number of each check.
        capabilities: what an implementation may lack, each with what it means.
    """

    def __init__(self, name: str, *, prefix: str, capabilities: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.prefix = prefix
        self.capabilities = dict(capabilities or {})
        self._checks: dict[str, Check] = {}

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks, by number."""
        return tuple(self._checks[number] for number in sorted(self._checks))

    def check(self, number: int, *needs: str, probed: bool = True) -> Callable[[Callable[[Any], None]], Check]:
        """Make a function ``check_...(subject)`` a check of this contract; its docstring is the property.

        Args:
            number: counts the checks; one that is taken away leaves its number unused.
            needs: names of the capabilities without which the property cannot hold.
            probed: whether it can be tried where one of them is lacking. False if it would hang or end the process, or
                would come out differently from run to run.

        Raises:
            ConfigError: the number is taken, a capability is unknown, or the function has no docstring or another name.
        """

        def register(function: Callable[[Any], None]) -> Check:
            check = self._made(number, function, needs, probed)
            self._checks[check.number] = check
            return check

        return register

    def _made(self, number: int, function: Callable[[Any], None], needs: tuple[str, ...], probed: bool) -> Check:
        label = f"{self.prefix}{number:03d}"
        name, sentence = function.__name__, inspect.getdoc(function)
        if label in self._checks:
            raise ConfigError(f"{name}: {label} is {self._checks[label].name}; numbers are given once")
        if not name.startswith("check_"):
            raise ConfigError(f"{name}: expected a name that begins with check_")
        if not sentence:
            raise ConfigError(f"{name}: expected a docstring that states the property in one sentence")
        for unknown in set(needs) - self.capabilities.keys():
            raise ConfigError(f"{name} needs {unknown!r}, which is no capability of the contract {self.name!r}")
        return Check(
            number=label,
            name=name.removeprefix("check_"),
            property=" ".join(sentence.split()),
            needs=needs,
            probed=probed,
            function=function,
            capabilities=self.capabilities,
        )

    def parametrize(self, argument: str = "check") -> pytest.MarkDecorator:
        """A mark for a pytest function: it runs once for each check, given as ``argument``."""
        import pytest

        return pytest.mark.parametrize(argument, self.checks, ids=str)

    def table(self) -> str:
        """The checks as a table in Markdown: number, property, and the capabilities that it needs."""
        rows = [
            f"| {check.number} | {check.property} | {', '.join(f'`{name}`' for name in check.needs)} |"
            for check in self.checks
        ]
        return "\n".join(["| number | property | needs |", "|---|---|---|", *rows])
