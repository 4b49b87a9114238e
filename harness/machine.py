"""The machine that writes whole programs over every operation, and keeps them sensible by the rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from harness.programs import Limits
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

MOST_ROWS = 4
_names = st.sampled_from(("a", "b"))
_rows = st.integers(0, MOST_ROWS - 1)
_shares = st.integers(0, 8)  # eighths of what there is
_flavours = st.integers(0, 255)
_chunks = st.integers(0, 9)
_few = st.integers(1, 5)


class ProgramMachine(RuleBasedStateMachine):
    """Each rule appends one operation; at the end the whole program is run, in one round trip.

    Rules draw plain numbers and fit them to what is held when their turn comes, so that any step can be
    left out of a program and the rest still makes sense: that is what shrinking does. Tokens that the
    engine will choose are not known yet; what depends on them may turn out refused, and the oracle
    knows. Make a subclass with ``of``.
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

    @initialize(
        batch=st.sampled_from([1, 1, 2, 3, MOST_ROWS]),
        spare=st.integers(0, 12),
        slack=st.integers(0, 7),
        shares=st.lists(_shares, min_size=MOST_ROWS, max_size=MOST_ROWS),
        flavour=_flavours,
        chunk=_chunks,
    )
    def begin(self, batch: int, spare: int, slack: int, shares: list[int], flavour: int, chunk: int) -> None:
        """Prompts of up to three quarters of the capacity: most of what can go wrong does so behind a
        window or three."""
        limits = self.limits
        batch = batch if limits.ragged else 1
        self.program = Program(max(2, limits.longest - spare), (), min(slack, limits.most_slack), batch)
        self.followed = Rules(self.program, self.spec, self.plan)
        self.operations: list[Operation] = []
        counts = [self.program.capacity * share * 3 // 32 for share in shares[:batch]]
        if any(counts):
            parts = (self._tokens(count, flavour + row) for row, count in enumerate(counts))
            self._add(Extend(tuple(parts), chunk))

    # -- appending --------------------------------------------------------------------------------

    @rule(row=_rows, share=_shares, flavour=_flavours, chunk=_chunks, logits=st.sampled_from(["all", "last"]))
    def prefill(self, row: int, share: int, flavour: int, chunk: int, logits: Literal["all", "last"]) -> None:
        row = self._row(row)
        self._add(Prefill(self._fitting(row, share, flavour), chunk, logits, row))

    @rule(row=_rows, share=_shares, flavour=_flavours)
    def decode(self, row: int, share: int, flavour: int) -> None:
        row = self._row(row)
        self._add(Decode(self._fitting(row, share, flavour)[:6], row))

    @rule(row=_rows, share=_shares, flavour=_flavours)
    def generate(self, row: int, share: int, flavour: int) -> None:
        row = self._row(row)
        token, *rest = self._fitting(row, share, flavour)[:8]
        self._add(Generate(token, 1 + len(rest), row))

    @rule(row=_rows, share=_shares, flavour=_flavours, draft=_few, ngram=st.integers(1, 2))
    def speculate(self, row: int, share: int, flavour: int, draft: int, ngram: int) -> None:
        row = self._row(row)
        token, *rest = self._fitting(row, share, flavour)[:8]
        self._add(Speculate(token, 1 + len(rest), draft, ngram, row))

    @precondition(lambda self: self.program.batch > 1)
    @rule(shares=st.lists(_shares, min_size=MOST_ROWS, max_size=MOST_ROWS), flavour=_flavours, chunk=_chunks)
    def extend(self, shares: list[int], flavour: int, chunk: int) -> None:
        counts = [self._room(row) * share // 8 for row, share in enumerate(shares[: self.program.batch])]
        parts = (self._tokens(min(count, 8), flavour + row) for row, count in enumerate(counts))
        self._add(Extend(tuple(parts), chunk))

    @rule(row=_rows, share=_shares, fresh=_few, flavour=_flavours, chunk=_chunks)
    def reuse(self, row: int, share: int, fresh: int, flavour: int, chunk: int) -> None:
        row = self._row(row)
        held = self.followed.state[row]
        kept = held.alive[: held.held * share // 8]
        tokens = tuple(held.tokens[place] for place in kept) + self._tokens(fresh, flavour)
        self._add(Reuse(tokens[: self.program.capacity], chunk, row))

    # -- forgetting and moving --------------------------------------------------------------------

    @rule(row=_rows, share=_shares, beyond=st.sampled_from([0, 0, 0, 1]))
    def rewind(self, row: int, share: int, beyond: int) -> None:
        """A share of what may be rewound, or of what must be refused."""
        row = self._row(row)
        held = self.followed.state[row]
        possible = [n for n in range(held.held + 1) if held.can_rewind_to(held.held - n)]
        self._add(Rewind(possible[(len(possible) - 1) * share // 8] + beyond, row))

    @rule(row=_rows, share=st.integers(1, 8), sinks=st.integers(0, 2))
    def compact(self, row: int, share: int, sinks: int) -> None:
        row = self._row(row)
        self._add(Compact(max(1, self.followed.state[row].held * share // 8), sinks, row))

    @precondition(lambda self: self.program.batch > 1)
    @rule(order=st.lists(_rows, min_size=MOST_ROWS, max_size=MOST_ROWS))
    def reorder(self, order: list[int]) -> None:
        self._add(Reorder(tuple(self._row(row) for row in order[: self.program.batch])))

    @rule(name=_names)
    def fork(self, name: str) -> None:
        self._add(Fork(name))

    @rule(which=st.integers(0, 2))
    def switch(self, which: int) -> None:
        names = self.followed.names
        self._add(Switch(names[which % len(names)]))

    @precondition(lambda self: not self._was(Save))
    @rule(name=_names)
    def save(self, name: str) -> None:
        self._add(Save(name))

    @precondition(lambda self: self.followed.slots)
    @rule(which=st.integers(0, 1))
    def load(self, which: int) -> None:
        self._add(Load(self._slot(which)))

    @precondition(lambda self: self.followed.slots)
    @rule(which=st.integers(0, 1), at=st.integers(0, 1 << 16), cut=st.booleans())
    def damage(self, which: int, at: int, cut: bool) -> None:
        self._add(Damage(self._slot(which), at, cut))
        self._add(Load(self._slot(which)))

    @rule(row=st.none() | _rows)
    def reset(self, row: int | None) -> None:
        self._add(Reset(None if row is None else self._row(row)))

    @precondition(lambda self: not self._was(Poison))
    @rule()
    def poison(self) -> None:
        self._add(Poison())

    # -- looking, and asking too much -------------------------------------------------------------

    @rule(layer=st.integers(0, 99), row=_rows)
    def read_cache(self, layer: int, row: int) -> None:
        self._add(ReadCache(layer % len(self.spec.layers), self._row(row)))

    @rule(row=_rows, excess=_few, one_by_one=st.booleans())
    def ask_too_much(self, row: int, excess: int, one_by_one: bool) -> None:
        row = self._row(row)
        over = self._tokens(self._room(row) + excess, 0)
        self._add(Decode(over, row) if one_by_one else Prefill(over, 0, "all", row))

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

    def _row(self, drawn: int) -> int:
        return drawn % self.program.batch

    def _slot(self, drawn: int) -> str:
        return self.followed.slots[drawn % len(self.followed.slots)]

    def _room(self, row: int) -> int:
        return self.program.capacity - self.followed.state[row].held

    def _fitting(self, row: int, share: int, flavour: int) -> tuple[int, ...]:
        """A share of the tokens that fit ``row``; where it is full, one that does not."""
        return self._tokens(max(1, self._room(row) * share // 8), flavour)

    def _tokens(self, count: int, flavour: int) -> tuple[int, ...]:
        """``count`` tokens; the first flavours repeat, which gives prompt lookup something to find."""
        if flavour < 4:
            return tuple((3 + i % (flavour + 1)) % self.limits.vocab_size for i in range(count))
        draw = random.Random(flavour)
        return tuple(draw.randrange(self.limits.vocab_size) for _ in range(count))
