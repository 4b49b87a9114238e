"""What a right engine holds after each operation, by rule: no logits, and none of the engine's own code.

A row is followed as the sequence that the reference can be asked for: every token at the position it
was appended at, and which positions are hidden from which later ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from harness.reference.protocol import Hidden
from kvengine.plan import CachePlan
from kvengine.program import (
    Append,
    Compact,
    Damage,
    Decode,
    Extend,
    Fork,
    Generate,
    Load,
    Operation,
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


class Refused(Exception):
    """The engine must refuse this; the message is the class name in kvengine.errors."""


@dataclass(frozen=True)
class Window:
    """A windowed layer by the words of GroupQueryAttention's documentation.

    rows: cache rows, None where it keeps every position. there: the oldest index really there, where
    rewinding or compacting left fewer than its rows could hold.
    """

    size: int
    rows: int | None
    there: int = 0

    def oldest(self, held: int) -> int:
        """The oldest index that is there after ``held`` tokens: when the rows are full, the window moves
        down to row 0 and all before it is gone."""
        first = 0
        if self.rows is not None:
            for total in range(1, held + 1):
                if total - first > self.rows:
                    first = total - self.size
        return max(first, self.there)

    def can_go_back_to(self, target: int, held: int) -> bool:
        """Whether the window of the next query at ``target`` is all there."""
        oldest = self.oldest(held)
        return oldest == 0 or target - (self.size - 1) >= oldest


@dataclass(frozen=True)
class Row:
    """One batch row.

    tokens: by position in the sequence. alive: the positions held, oldest first. hidden: for the reference.
    """

    windows: tuple[Window, ...]
    tokens: tuple[int, ...] = ()
    alive: tuple[int, ...] = ()
    hidden: tuple[Hidden, ...] = ()

    @property
    def held(self) -> int:
        return len(self.alive)

    @property
    def compacted(self) -> bool:
        return len(self.tokens) != self.held

    def append(self, tokens: Sequence[int]) -> Row:
        places = range(len(self.tokens), len(self.tokens) + len(tokens))
        return dataclasses.replace(self, tokens=(*self.tokens, *tokens), alive=(*self.alive, *places))

    def clear(self) -> Row:
        return Row(tuple(Window(window.size, window.rows) for window in self.windows))

    def can_rewind_to(self, target: int) -> bool:
        fits = (window.can_go_back_to(target, self.held) for window in self.windows)
        return target in (0, self.held) or all(fits)

    def rewind_to(self, target: int) -> Row:
        if target == self.held:
            return self
        if target == 0:
            return self.clear()
        # Keys keep the distances that a compaction left them, so what it dropped still counts.
        following = target + len(self.tokens) - self.held
        last = self.alive[target - 1]
        hidden = [
            Hidden(h.start, min(h.stop, following), min(h.since, following))
            for h in self.hidden
            if h.start < following
        ]
        if last + 1 < following:
            hidden.append(Hidden(last + 1, following, following))
        windows = (dataclasses.replace(w, there=w.oldest(self.held)) for w in self.windows)
        return Row(tuple(windows), self.tokens[:following], self.alive[:target], tuple(hidden))

    def compact(self, keep: int, sinks: int) -> Row:
        dropped = self.held - keep - sinks
        if keep < 1 or sinks < 0:
            raise Refused("InvalidRequest")
        if dropped <= 0:
            return self
        if sinks and any(keep < window.size - 1 for window in self.windows):
            raise Refused("InvalidRequest")
        windows = (
            dataclasses.replace(w, there=max(w.oldest(self.held) - dropped, sinks)) for w in self.windows
        )
        since = len(self.tokens)
        gone = (Hidden(place, place + 1, since) for place in self.alive[sinks : sinks + dropped])
        alive = self.alive[:sinks] + self.alive[sinks + dropped :]
        return Row(tuple(windows), self.tokens, alive, (*self.hidden, *gone))


State = tuple[Row, ...]


@dataclass(frozen=True)
class Span:
    """Tokens that one operation ran in one batch row: the row afterwards, and the index of the first."""

    row: Row
    start: int


class Rules:
    """Follows one program. ``state`` is what is held now."""

    def __init__(self, program: Program, spec: ModelSpec, plan: CachePlan) -> None:
        slack = plan.slack if program.slack is None else program.slack
        sizes = {layer.window for layer in spec.layers if layer.window is not None}
        rows = {size: size + slack if plan.kind == "hybrid" else None for size in sorted(sizes)}
        self._empty = Row(tuple(Window(size, count) for size, count in rows.items()))
        self._capacity = program.capacity
        self._spec = spec
        self._windowed = plan.kind == "hybrid"
        self._states: dict[str, State] = {"main": (self._empty,) * program.batch}
        self._current = "main"
        self._slots: dict[str, State | None] = {}  # None: damaged

    @property
    def state(self) -> State:
        return self._states[self._current]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the states that can be switched to."""
        return tuple(self._states)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def do(self, operation: Operation, chosen: Sequence[int] = ()) -> list[Span]:
        """Follow one operation; returns what it ran, for the rows of its logits or for its choices.

        chosen: the tokens that a Generate or Speculate found.

        Raises Refused, and nothing has changed.
        """
        match operation:
            case Prefill() | Decode() | Generate() | Speculate() | Extend() | Reuse():
                return self._append(operation, chosen)
            case Reset(row):
                for each in range(len(self.state)) if row is None else [self._index(row)]:
                    self._put(each, self._empty)
            case Rewind(count, row):
                self._rewind(count, self._index(row))
            case Compact(keep, sinks, row):
                self._put(self._index(row), self.state[self._index(row)].compact(keep, sinks))
            case Reorder(order):
                self._require(len(order) == len(self.state), "InvalidRequest")
                self._states[self._current] = tuple(self.state[self._index(row)] for row in order)
            case ReadCache(layer, row):
                self._require(0 <= layer < len(self._spec.layers), "InvalidRequest")
                self._index(row)
            case Fork(name):
                self._require(name != self._current, "InvalidRequest")
                self._states[name] = self.state
            case Switch(name):
                self._require(name in self._states, "InvalidRequest")
                self._current = name
            case Save(name):
                self._slots[name] = self.state
            case Damage(name):
                self._require(name in self._slots, "StateError")
                self._slots[name] = None
            case Load(name):
                self._load(name)
        return []

    def attempt(self, operation: Operation, chosen: Sequence[int] = ()) -> None:
        """As ``do``; what must be refused changes nothing."""
        with contextlib.suppress(Refused):
            self.do(operation, chosen)

    def positions(self, operation: ReadCache) -> tuple[int, ...]:
        """The positions that ReadCache must find."""
        row, layer = self.state[operation.row], self._spec.layers[operation.layer]
        oldest = 0
        if self._windowed and layer.window is not None:
            oldest = next(w.oldest(row.held) for w in row.windows if w.size == layer.window)
        return row.alive[oldest:]

    def _append(self, operation: Append, chosen: Sequence[int]) -> list[Span]:
        self._require(getattr(operation, "chunk", 0) >= 0, "InvalidRequest")
        match operation:
            case Extend(parts):
                self._require(len(parts) == len(self.state), "InvalidRequest")
                self._check([token for part in parts for token in part])
                self._check_room([len(part) for part in parts])
                return [self._add(row, part) for row, part in enumerate(parts) if part]
            case Reuse(tokens, _, row):
                return [self._reuse(tokens, self._index(row))]
            case Generate(token, count, row):
                self._require(count >= 1, "InvalidRequest")
                return [self._chosen(token, count, self._index(row), chosen)]
            case Speculate(token, count, draft, ngram, row, hint):
                self._require(min(count, draft, ngram) >= 1, "InvalidRequest")
                self._check([token])
                self._check_room([count], self._index(row))
                self._check(hint or [token])
                return [self._chosen(token, count, row, chosen)]
            case Prefill() | Decode():
                row = self._index(operation.row)
                self._check(operation.tokens)
                self._check_room([len(operation.tokens)], row)
                return [self._add(row, operation.tokens)]

    def _chosen(self, token: int, count: int, row: int, chosen: Sequence[int]) -> Span:
        self._check([token])
        self._check_room([count], row)
        return self._add(row, (token, *chosen[: count - 1]))

    def _reuse(self, tokens: Sequence[int], row: int) -> Span:
        self._check(tokens)
        self._require(len(tokens) <= self._capacity, "ContextOverflow")
        before = self.state[row]
        held = [before.tokens[place] for place in before.alive]
        most = min(len(held), len(tokens) - 1)
        kept = next((i for i in range(most) if held[i] != tokens[i]), most)
        if before.compacted or not before.can_rewind_to(kept):
            kept = 0
        self._put(row, before.rewind_to(kept))
        return self._add(row, tokens[kept:])

    def _rewind(self, count: int, row: int) -> None:
        before = self.state[row]
        self._require(0 <= count <= before.held, "InvalidRequest")
        self._require(before.can_rewind_to(before.held - count), "RewindTooFar")
        self._put(row, before.rewind_to(before.held - count))

    def _load(self, name: str) -> None:
        state = self._slots.get(name)
        if state is None:
            raise Refused("StateError")
        self._states[self._current] = state

    def _add(self, row: int, tokens: Sequence[int]) -> Span:
        before = self.state[row]
        self._put(row, before.append(tokens))
        return Span(self.state[row], before.held)

    def _put(self, row: int, changed: Row) -> None:
        rows = list(self.state)
        rows[row] = changed
        self._states[self._current] = tuple(rows)

    def _check(self, tokens: Sequence[int]) -> None:
        """The order in which the engine checks: emptiness, token ids, then room."""
        self._require(len(tokens) > 0, "EmptyPrompt")
        self._require(all(0 <= token < self._spec.vocab_size for token in tokens), "InvalidToken")

    def _check_room(self, counts: Sequence[int], first: int = 0) -> None:
        rows = self.state[first:]
        fits = (row.held + n <= self._capacity for row, n in zip(rows, counts, strict=False))
        self._require(all(fits), "ContextOverflow")

    def _index(self, row: int) -> int:
        self._require(0 <= row < len(self.state), "InvalidRequest")
        return row

    def _require(self, met: bool, refusal: str) -> None:
        if not met:
            raise Refused(refusal)
