"""Hypothesis strategies that draw programs. The host draws, the device runs, Hypothesis shrinks."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from kvengine.program import Decode, Generate, Operation, Poison, Prefill, Program, Reset
from kvengine.spec import ModelSpec

# Where nothing slides, programs are as long as if a window of so many tokens did.
WITHOUT_WINDOW = 8


@dataclass(frozen=True)
class Limits:
    """What programs for one model may contain. ``longest``: tokens in one sequence."""

    vocab_size: int
    window: int  # the smallest of the model's windows; WITHOUT_WINDOW if it has none
    longest: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Limits:
        """At least three wraps of a small window; larger ones are left to ``past_the_window``."""
        windows = [layer.window for layer in spec.layers if layer.window is not None]
        window = min(windows, default=min(WITHOUT_WINDOW, spec.max_position // 4))
        return cls(spec.vocab_size, window, min(spec.max_position, max(24, min(4 * window + 2, 40))))


def token_lists(limits: Limits, most: int, least: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """Between ``least`` and ``most`` token ids."""
    token = st.integers(0, limits.vocab_size - 1)
    return st.lists(token, min_size=least, max_size=most).map(tuple)


def slacks(limits: Limits) -> st.SearchStrategy[int]:
    """Rows above the window: none, a few, more than a window."""
    return st.integers(0, min(limits.window, 16) + 2)


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
    longest = current = 1
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
def with_a_past(draw: st.DrawFn, limits: Limits) -> tuple[Program, Program]:
    """(past, reset, future) and the future alone, at the same capacity."""
    past, future = draw(sequences(limits, 2)), draw(sequences(limits, 2))
    spare, slack = draw(st.integers(0, 3)), draw(slacks(limits))
    whole = fitting((*past, Reset(), *future), spare, slack)
    return whole, Program(whole.capacity, future, slack)


@st.composite
def poisoned(draw: st.DrawFn, limits: Limits) -> tuple[Program, Program]:
    """A sequence with its dead rows poisoned before every operation, and the same unpoisoned."""
    clean = draw(any_sequence(limits))
    operations: list[Operation] = []
    for operation in clean.operations:
        operations += [Poison(), operation]
    return Program(clean.capacity, tuple(operations), clean.slack), clean


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


def past_the_window(limits: Limits) -> Program:
    """One long prompt that leaves every window behind, then a few steps: for windows too large to wrap."""
    prompt = tuple((7 + 31 * i) % limits.vocab_size for i in range(limits.window + 8))
    return fitting((Prefill(prompt, 0, "last"), Decode(prompt[:4])), 1)
