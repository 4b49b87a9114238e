"""Hypothesis strategies that draw programs. The host draws, the device runs, Hypothesis shrinks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from kvengine.program import (
    Decode,
    Fork,
    Generate,
    Observation,
    Operation,
    Poison,
    Prefill,
    Program,
    Reset,
    Switch,
)
from kvengine.spec import ModelSpec

# Where nothing slides, programs are as long as if a window of so many tokens did.
WITHOUT_WINDOW = 8


@dataclass(frozen=True)
class Limits:
    """What programs for one model may contain. ``longest``: tokens in one sequence."""

    vocab_size: int
    window: int  # the smallest of the model's windows; WITHOUT_WINDOW if it has none
    longest: int
    most_slack: int = 18  # rows above a window
    ragged: bool = True  # whether batch rows may be of different lengths

    @classmethod
    def of(cls, spec: ModelSpec) -> Limits:
        """At least three wraps of a small window; larger ones are left to ``past_the_window``."""
        windows = [layer.window for layer in spec.layers if layer.window is not None]
        window = min(windows, default=min(WITHOUT_WINDOW, spec.max_position // 4))
        return cls(spec.vocab_size, window, min(spec.max_position, max(24, min(4 * window + 2, 40))))

    @property
    def wraps(self) -> int:
        """How often the longest sequence leaves the window behind."""
        return self.longest // self.window


def token_lists(limits: Limits, most: int, least: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """Between ``least`` and ``most`` token ids."""
    token = st.integers(0, limits.vocab_size - 1)
    return st.lists(token, min_size=least, max_size=most).map(tuple)


def slacks(limits: Limits) -> st.SearchStrategy[int]:
    """Rows above the window: none, a few, more than a window."""
    return st.integers(0, min(limits.window + 2, limits.most_slack))


@st.composite
def appends(draw: st.DrawFn, limits: Limits, room: int, greedy: bool) -> Operation:
    """One operation that appends 1..``room`` tokens; ``greedy`` allows tokens the engine chooses."""
    kind = draw(st.sampled_from(["prefill", "decode", *(["generate"] if greedy else [])]))
    if kind == "generate":
        count = draw(st.integers(1, room))
        return Generate(draw(st.integers(0, limits.vocab_size - 1)), count)
    tokens = draw(token_lists(limits, room))
    if kind == "decode":
        return Decode(tokens)
    return Prefill(tokens, draw(st.integers(0, len(tokens))), draw(st.sampled_from(["all", "last"])))


def appended(operation: Operation) -> int:
    """Tokens an operation adds to the sequence when it is not refused."""
    match operation:
        case Prefill() | Decode():
            return len(operation.tokens)
        case Generate():
            return operation.count
        case _:
            return 0


@st.composite
def sequences(draw: st.DrawFn, limits: Limits, most: int = 4, greedy: bool = True) -> tuple[Operation, ...]:
    """One to ``most`` appending operations that together stay within ``limits.longest``."""
    operations: list[Operation] = []
    room = limits.longest
    for _ in range(draw(st.integers(1, most))):
        operation = draw(appends(limits, room, greedy))
        operations.append(operation)
        room -= appended(operation)
        if room == 0:
            break
    return tuple(operations)


def fitting(operations: tuple[Operation, ...], spare: int = 0, slack: int | None = None) -> Program:
    """A program whose capacity is what its longest sequence needs, plus ``spare``."""
    longest, current = 1, 0
    for operation in operations:
        current = 0 if isinstance(operation, Reset) else current + appended(operation)
        longest = max(longest, current)
    return Program(longest + spare, operations, slack)


@st.composite
def any_sequence(draw: st.DrawFn, limits: Limits, greedy: bool = True) -> Program:
    """Prefills, decodes and greedy runs in any order and any chunking."""
    return fitting(draw(sequences(limits, greedy=greedy)), draw(st.integers(0, 3)), draw(slacks(limits)))


@st.composite
def chunked_twice(draw: st.DrawFn, limits: Limits) -> Program:
    """The same prompt and continuation twice: in one shot, then, after a reset, in chunks."""
    prompt = draw(token_lists(limits, limits.longest - 2, least=2))
    rest = Decode(draw(token_lists(limits, limits.longest - len(prompt))))
    chunk = draw(st.integers(1, len(prompt)))
    operations = (Prefill(prompt), rest, Reset(), Prefill(prompt, chunk), rest)
    return fitting(operations, draw(st.integers(0, 3)), draw(slacks(limits)))


@st.composite
def haunted(draw: st.DrawFn, limits: Limits) -> tuple[Program, Program]:
    """A sequence that begins in a decoder just reset and has dead rows poisoned in between, and it alone."""
    past: tuple[Operation, ...] = ()
    if draw(st.booleans()):
        past = (*draw(sequences(limits, 2)), Reset())
    clean = draw(sequences(limits))
    poisons = draw(st.lists(st.booleans(), min_size=len(clean), max_size=len(clean)))
    future: list[Operation] = []
    for operation, poison in zip(clean, poisons, strict=True):
        future += [Poison(), operation] if poison or not past else [operation]
    whole = fitting((*past, *future), draw(st.integers(0, 3)), draw(slacks(limits)))
    return whole, Program(whole.capacity, clean, whole.slack)


def alive(program: Program, observations: Sequence[Observation]) -> list[Observation]:
    """What was observed after the last reset, leaving out the poisonings."""
    kinds = [operation.kind for operation in program.operations]
    begin = len(kinds) - kinds[::-1].index("reset") if "reset" in kinds else 0
    return [seen for kind, seen in zip(kinds[begin:], observations[begin:], strict=True) if kind != "poison"]


@st.composite
def interleaved(draw: st.DrawFn, limits: Limits) -> tuple[Program, Program, Program]:
    """Two sequences in turns, in two states of one program; and each of them alone."""
    one, two = (draw(sequences(limits, greedy=False)), draw(sequences(limits)))
    operations: list[Operation] = [Fork("other")]
    for mine, other in itertools.zip_longest(one, two):
        operations += [mine] if mine else []
        operations += [Switch("other"), other, Switch("main")] if other else []
    capacity = max(fitting(one).capacity, fitting(two).capacity) + draw(st.integers(0, 3))
    slack = draw(slacks(limits))
    both, first, second = (Program(capacity, tuple(o), slack) for o in (operations, one, two))
    return both, first, second


def of_state(program: Program, observations: Sequence[Observation], name: str) -> list[Observation]:
    """What was observed of the appending operations in the state ``name``."""
    current, found = "main", []
    for operation, seen in zip(program.operations, observations, strict=True):
        if isinstance(operation, Switch):
            current = operation.name
        elif current == name and not isinstance(operation, Fork):
            found.append(seen)
    return found


@st.composite
def two_chunkings(draw: st.DrawFn, limits: Limits) -> tuple[Program, Program]:
    """The same tokens in one shot and in chunks or one by one."""
    tokens = draw(token_lists(limits, limits.longest, least=2))
    chunk = draw(st.integers(0, len(tokens) - 1))
    spare, slack = draw(st.integers(0, 3)), draw(slacks(limits))
    ways: list[Operation] = [Prefill(tokens), Prefill(tokens, chunk) if chunk else Decode(tokens)]
    one_shot, chunked = (fitting((way,), spare, slack) for way in ways)
    return one_shot, chunked


def fixed_tokens(program: Program) -> tuple[int, ...]:
    """The tokens of a program's prefills and decodes, in order."""
    appending = [o for o in program.operations if isinstance(o, Prefill | Decode)]
    return tuple(token for operation in appending for token in operation.tokens)


@st.composite
def overflowing(draw: st.DrawFn, limits: Limits) -> Program:
    """A sequence, a request too long for what room is left, and a sequence that fits again."""
    before = draw(sequences(limits, 2))
    after = draw(sequences(limits, 2))
    fits = fitting((*before, *after), draw(st.integers(0, 2)), draw(slacks(limits)))
    used = sum(map(appended, before))
    excess = fits.capacity - used + draw(st.integers(1, 3))
    tokens = draw(token_lists(limits, excess, least=excess))
    refusals: list[Operation] = [Prefill(tokens), Prefill(tokens, 1), Decode(tokens)]
    refused = draw(st.sampled_from(refusals))
    return Program(fits.capacity, (*before, refused, *after), fits.slack)


@st.composite
def rooms(draw: st.DrawFn, limits: Limits) -> tuple[Program, Program, Program]:
    """A program that overflows; and one of fixed tokens in as little room as it needs, and in more."""
    tight = draw(any_sequence(limits, greedy=False))
    roomy = Program(tight.capacity + draw(st.integers(1, 8)), tight.operations, draw(slacks(limits)))
    return draw(overflowing(limits)), tight, roomy


def past_the_window(limits: Limits) -> tuple[Program, Program]:
    """One long prompt that leaves every window behind, then a few steps; in one shot and in chunks."""
    prompt = tuple((7 + 31 * i) % limits.vocab_size for i in range(limits.window + 8))
    ways = (Prefill(prompt, 0, "last"), Prefill(prompt, limits.window, "last"))
    one_shot, chunked = (fitting((way, Decode(prompt[:4])), 1) for way in ways)
    return one_shot, chunked
