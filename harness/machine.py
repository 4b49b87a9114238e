"""The machine that writes whole programs over every operation, and keeps them sensible by the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from harness.programs import Limits, slacks
from harness.rules import Rules
from kvengine.plan import CachePlan
from kvengine.program import (
    Compact,
    Damage,
    Decode,
    Extend,
    Fork,
    Generate,
    Load,
    Operation,
    Poison,
    Prefill,
    Program,
    ReadCache,
    Reorder,
    Reset,
    Reuse,
    Rewind,
    Save,
    Speculate,
    Switch,
)
from kvengine.spec import ModelSpec

NAMES = ("a", "b")
MOST_ROWS = 4


class ProgramMachine(RuleBasedStateMachine):
    """Each rule appends one operation; at the end the whole program is run, in one round trip.

    Make a subclass with ``of``. Tokens that the engine will choose are not known yet, so rules that
    depend on them may turn out refused: the oracle says so too.
    """

    limits: ClassVar[Limits]
    spec: ClassVar[ModelSpec]
    plan: ClassVar[CachePlan]
    check: ClassVar[Callable[[Program], None]]

    @classmethod
    def of(
        cls, limits: Limits, spec: ModelSpec, plan: CachePlan, check: Callable[[Program], None]
    ) -> type[ProgramMachine]:
        """A machine for one cell. check: called with each program; raises where the device is wrong."""
        body: dict[str, Any] = {"limits": limits, "spec": spec, "plan": plan, "check": staticmethod(check)}
        return type(cls.__name__, (cls,), body)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        sizes = [1, 1, 2, 3, MOST_ROWS] if self.limits.ragged else [1]
        batch = data.draw(st.sampled_from(sizes))
        capacity = data.draw(st.integers(max(2, self.limits.longest // 2), self.limits.longest))
        self.program = Program(capacity, (), data.draw(slacks(self.limits)), batch)
        self.followed = Rules(self.program, self.spec, self.plan)
        self.operations: list[Operation] = []
        # Most of what can go wrong does so behind a window or three.
        counts = [data.draw(st.integers(0, capacity)) for _ in range(batch)]
        prompts = tuple(data.draw(self._token_lists(count, count)) for count in counts)
        if any(prompts):
            self._add(Extend(prompts, data.draw(st.integers(0, max(counts)))))

    # -- appending --------------------------------------------------------------------------------

    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        row, tokens = self._tokens(data)
        chunk = data.draw(st.integers(0, len(tokens)))
        self._add(Prefill(tokens, chunk, data.draw(st.sampled_from(["all", "last"])), row))

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        row, tokens = self._tokens(data, most=6)
        self._add(Decode(tokens, row))

    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        row, (token, *rest) = self._tokens(data, most=8)
        self._add(Generate(token, 1 + len(rest), row))

    @rule(data=st.data())
    def speculate(self, data: st.DataObject) -> None:
        row, (token, *rest) = self._tokens(data, most=8)
        draft, ngram = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
        self._add(Speculate(token, 1 + len(rest), draft, ngram, row))

    @precondition(lambda self: self.program.batch > 1)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        counts = [data.draw(st.integers(0, min(8, self._room(row)))) for row in range(self.program.batch)]
        parts = tuple(data.draw(self._token_lists(count, count)) for count in counts)
        self._add(Extend(parts, data.draw(st.integers(0, max(counts)))))

    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        row = self._row(data)
        held = self.followed.state[row]
        kept = data.draw(st.integers(0, held.held))
        prefix = tuple(held.tokens[place] for place in held.alive[:kept])
        fresh = data.draw(self._token_lists(1, max(1, min(8, self.program.capacity - kept))))
        self._add(Reuse(prefix + fresh, data.draw(st.integers(0, 4)), row))

    # -- forgetting and moving --------------------------------------------------------------------

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        row = self._row(data)
        held = self.followed.state[row]
        possible = [n for n in range(held.held + 1) if held.can_rewind_to(held.held - n)]
        self._add(Rewind(data.draw(st.sampled_from(possible) | st.integers(0, held.held)), row))

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        row = self._row(data)
        keep = data.draw(st.integers(1, max(1, self.followed.state[row].held)))
        self._add(Compact(keep, data.draw(st.integers(0, 2)), row))

    @precondition(lambda self: self.program.batch > 1)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = st.integers(0, self.program.batch - 1)
        order = data.draw(st.lists(rows, min_size=self.program.batch, max_size=self.program.batch))
        self._add(Reorder(tuple(order)))

    @rule(name=st.sampled_from(NAMES))
    def fork(self, name: str) -> None:
        self._add(Fork(name))

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self._add(Switch(data.draw(st.sampled_from(self.followed.names))))

    @precondition(lambda self: not self._was(Save))
    @rule(name=st.sampled_from(NAMES))
    def save(self, name: str) -> None:
        self._add(Save(name))

    @precondition(lambda self: self.followed.slots)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self._add(Load(data.draw(st.sampled_from(self.followed.slots))))

    @precondition(lambda self: self.followed.slots)
    @rule(data=st.data(), at=st.integers(0, 1 << 20), cut=st.booleans())
    def damage(self, data: st.DataObject, at: int, cut: bool) -> None:
        name = data.draw(st.sampled_from(self.followed.slots))
        self._add(Damage(name, at, cut))
        self._add(Load(name))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        self._add(Reset(data.draw(st.none() | st.integers(0, self.program.batch - 1))))

    @precondition(lambda self: not self._was(Poison))
    @rule()
    def poison(self) -> None:
        self._add(Poison())

    # -- looking, and asking too much -------------------------------------------------------------

    @rule(data=st.data())
    def read_cache(self, data: st.DataObject) -> None:
        self._add(ReadCache(data.draw(st.integers(0, len(self.spec.layers) - 1)), self._row(data)))

    @rule(data=st.data())
    def ask_too_much(self, data: st.DataObject) -> None:
        row = self._row(data)
        over = (0,) * (self._room(row) + data.draw(st.integers(1, 3)))
        asked: list[Operation] = [Prefill(over, 0, "all", row), Decode(over, row), Switch("nobody")]
        self._add(data.draw(st.sampled_from(asked)))

    def teardown(self) -> None:
        if getattr(self, "operations", None):
            program = self.program
            type(self).check(Program(program.capacity, tuple(self.operations), program.slack, program.batch))

    # -- inside -----------------------------------------------------------------------------------

    def _add(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.followed.attempt(operation, (0,) * getattr(operation, "count", 0))

    def _was(self, kind: type[Operation]) -> bool:
        """Whether the last operation was one of ``kind``, which twice over says nothing more."""
        return bool(self.operations) and isinstance(self.operations[-1], kind)

    def _row(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, self.program.batch - 1))

    def _room(self, row: int) -> int:
        return self.program.capacity - self.followed.state[row].held

    def _tokens(self, data: st.DataObject, most: int | None = None) -> tuple[int, tuple[int, ...]]:
        """A row and tokens that fit it; where it is full, one token too many."""
        row = self._row(data)
        room = max(1, self._room(row))
        return row, data.draw(self._token_lists(1, min(room, most or room)))

    def _token_lists(self, least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
        """Any tokens, or of two only, which repeat and so give prompt lookup something to find."""
        any_token = st.integers(0, self.limits.vocab_size - 1)
        kinds = [st.lists(t, min_size=least, max_size=most) for t in (any_token, st.integers(3, 4))]
        return st.one_of(kinds).map(tuple)
