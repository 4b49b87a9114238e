"""The smallest failing program, found on the device that failed.

Hypothesis shrinks what it drew; a whole program is better shrunk as what it is. Any program is a fair
question, since the oracle knows what must be refused, so operations may be left out one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from harness.compare import CheckFailed
from kvengine.program import Extend, Operation, Program, Reorder, Reset

MOST_RUNS = 300


def smallest(failure: CheckFailed, check: Callable[[Program], None]) -> CheckFailed:
    """The failure of the smallest program found in MOST_RUNS runs that still fails ``check``."""
    return _Search(failure, check).smallest()


class _Search:
    def __init__(self, failure: CheckFailed, check: Callable[[Program], None]) -> None:
        self._failure = failure
        self._check = check
        self._seen = {failure.program}

    @property
    def _program(self) -> Program:
        return self._failure.program

    def smallest(self) -> CheckFailed:
        before = None
        while before != self._program:
            before = self._program
            self._leave_out_operations()
            self._take_simpler()
        return self._failure

    def _fails(self, candidate: Program) -> bool:
        """Whether ``candidate`` fails too; if so it is the one to go on from."""
        if candidate in self._seen or not candidate.operations or len(self._seen) > MOST_RUNS:
            return False
        self._seen.add(candidate)
        try:
            self._check(candidate)
        except CheckFailed as failure:
            self._failure = failure
            return True
        return False

    def _leave_out_operations(self) -> None:
        """Halves first, then quarters, at last single ones."""
        size = len(self._program.operations) // 2
        while size:
            start = 0
            while start < len(self._program.operations):
                operations = self._program.operations
                rest = operations[:start] + operations[start + size :]
                if not self._fails(dataclasses.replace(self._program, operations=rest)):
                    start += size
            size //= 2

    def _take_simpler(self) -> None:
        while any(self._fails(candidate) for candidate in _simpler(self._program)):
            pass


def _simpler(program: Program) -> Iterator[Program]:
    """Programs with a little less in one place, the greatest simplifications first."""
    if program.batch > 1:
        yield _without_last_row(program)
    if program.slack:
        yield dataclasses.replace(program, slack=0)
    for capacity in (program.capacity // 2, program.capacity - 1):
        if capacity:
            yield dataclasses.replace(program, capacity=capacity)
    for index, operation in enumerate(program.operations):
        for other in _simpler_operations(operation):
            operations = (*program.operations[:index], other, *program.operations[index + 1 :])
            yield dataclasses.replace(program, operations=operations)


def _simpler_operations(operation: Operation) -> Iterator[Operation]:
    values = {field.name: getattr(operation, field.name) for field in dataclasses.fields(operation)}
    for name, value in values.items():
        for simpler in _simpler_values(name, value):
            changed: Any = dataclasses.replace(operation, **{name: simpler})
            yield changed


def _simpler_values(name: str, value: Any) -> Iterator[Any]:
    match name:
        case "tokens" if value and isinstance(value[0], tuple):
            for index, part in enumerate(value):
                for simpler in _shorter(part, least=0):
                    yield (*value[:index], simpler, *value[index + 1 :])
        case "tokens":
            yield from _shorter(value, least=1)
        case "count" | "keep" | "draft" | "ngram":
            yield from {value // 2, value - 1} - {value, 0, -1}
        case "chunk" | "sinks" | "at":
            yield from {0, value // 2} - {value}


def _shorter(tokens: tuple[int, ...], least: int) -> Iterator[tuple[int, ...]]:
    """Fewer tokens, from either end, then the same number of smaller ones."""
    for count in (len(tokens) // 2, len(tokens) - 1):
        if least <= count < len(tokens):
            yield tokens[:count]
            yield tokens[len(tokens) - count :]
    plain = tuple(3 + index for index in range(len(tokens)))
    if tokens > plain:
        yield plain


def _without_last_row(program: Program) -> Program:
    """The batch without its last row and all that was done to it."""
    last = program.batch - 1
    operations: list[Operation] = []
    for operation in program.operations:
        match operation:
            case Extend(tokens, chunk):
                operations.append(Extend(tokens[:last], chunk))
            case Reorder(order):
                operations.append(Reorder(tuple(min(row, last - 1) for row in order[:last])))
            case Reset(None):
                operations.append(operation)
            case _ if getattr(operation, "row", 0) != last:
                operations.append(operation)
    return dataclasses.replace(program, operations=tuple(operations), batch=last)
