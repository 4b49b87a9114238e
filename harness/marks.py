"""``@pytest.mark.device("abi==arm64-v8a")``: on which of a run's devices a test is to run.

On each of them; with ``any=True`` on one of them, whichever is free (harness.anywhere).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest

from harness.choosing import what_is_known
from harness.discovery import PassedOver
from harness.errors import InventoryError
from harness.run import DeviceRun
from harness.selection import Condition, Known, parse
from reports.results import NotRun

MARKER = "device"


@dataclass(frozen=True)
class NoDevice:
    """What a test is parametrized with when no device of the run may run it."""

    expression: str
    reasons: tuple[PassedOver, ...]

    @property
    def sentence(self) -> str:
        why = "; ".join(f"{each.name}: {each.reason}" for each in self.reasons)
        return f"no device for {self.expression!r}: {why}"

    def not_run(self, check: str, title: str, kind: str) -> NotRun:
        reasons = tuple(f"{each.name}: {each.reason}" for each in self.reasons)
        return NotRun(check, title, "check" if kind == "cell" else "measurement", self.expression, reasons)


class DeviceMarks:
    """Matches tests' markers against the devices of ``run``, each of which is asked at most once."""

    def __init__(self, run: DeviceRun) -> None:
        self._run = run
        self._silent: set[str] = set()

    def devices(self, markers: Iterable[pytest.Mark], where: str) -> tuple[str, ...] | NoDevice:
        """The devices that satisfy every marker; all of them where there is none.

        One that does not answer may be meant: it is kept, and its test will say that it does not answer.

        Raises:
            InventoryError: a marker that is no condition; names ``where``.
        """
        expressions = [text for mark in markers if (text := _expression(mark, where))]
        if not expressions:
            return self._run.devices
        conditions = [_condition(text, where) for text in expressions]
        chosen, reasons = [], []
        for name in self._run.devices:
            against = self._against(name, conditions)
            if against:
                reasons.append(PassedOver(name, "; ".join(against)))
            else:
                chosen.append(name)
        return tuple(chosen) or NoDevice(" and ".join(expressions), tuple(reasons))

    def _against(self, name: str, conditions: Sequence[Condition]) -> list[str]:
        known = what_is_known(name, self._run.inventory)
        if any(condition.decide(known) is None for condition in conditions):
            known = self._asked(name) or known
        return [r for c in conditions if c.decide(known) is False for r in c.why(known, True)]

    def _asked(self, name: str) -> Known | None:
        if name in self._silent:
            return None
        identity = self._run.identity_for_choice(name)
        if identity is None:
            self._silent.add(name)
            return None
        return what_is_known(name, self._run.inventory, identity)


def for_any(markers: Iterable[pytest.Mark]) -> bool:
    """Whether one of the devices will do."""
    return any(mark.kwargs.get("any") is True for mark in markers)


def _expression(mark: pytest.Mark, where: str) -> str:
    """The condition; "" of a marker that says no more than any=True."""
    texts = [text for text in mark.args if isinstance(text, str)]
    known = all(name == "any" and isinstance(value, bool) for name, value in mark.kwargs.items())
    if len(texts) != len(mark.args) or not known or not (len(texts) == 1 or (not texts and mark.kwargs)):
        found = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
        raise InventoryError(
            f"{where}: sought @pytest.mark.{MARKER}('a condition') or ('a condition', any=True), found "
            f"@pytest.mark.{MARKER}({found})"
        )
    return texts[0] if texts else ""


def _condition(text: str, where: str) -> Condition:
    try:
        return parse(text)
    except InventoryError as error:
        raise InventoryError(f"{where}: @pytest.mark.{MARKER}: {error}") from None
