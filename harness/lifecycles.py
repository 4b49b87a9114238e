"""Hypothesis strategies for what happens to a cache beyond appending: batches, rewinds, copies, drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from harness.programs import Limits, fitting, sequences, slacks, token_lists
from harness.rules import Row, Rules, Window
from kvengine.plan import CachePlan
from kvengine.program import (
    Compact,
    Damage,
    Decode,
    Extend,
    Fork,
    Generate,
    Load,
    Observation,
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


@st.composite
def tokens_of_any_length(draw: st.DrawFn, limits: Limits, most: int, least: int = 1) -> tuple[int, ...]:
    """As ``token_lists``, long ones as often as short ones: Hypothesis' own lists are mostly short."""
    count = draw(st.integers(least, most))
    return draw(token_lists(limits, count, least=count))


@st.composite
def ragged(draw: st.DrawFn, limits: Limits) -> Program:
    """Rows of different lengths that grow together, sit out, leave and join again."""
    batch = draw(st.integers(2, MOST_ROWS))
    room = [limits.longest] * batch
    operations: list[Operation] = []
    for _ in range(draw(st.integers(1, 5))):
        counts = [draw(st.integers(0, min(most, 9))) for most in room]
        if any(counts):
            parts = tuple(draw(token_lists(limits, count, least=count)) for count in counts)
            operations.append(Extend(parts, draw(st.integers(0, max(counts)))))
            room = [most - count for most, count in zip(room, counts, strict=True)]
        if draw(st.booleans()):
            leaving = draw(st.integers(0, batch - 1))
            operations.append(Reset(leaving))
            room[leaving] = limits.longest
    if not operations:
        operations.append(Extend(tuple((row,) for row in range(batch))))
    capacity = limits.longest + draw(st.integers(0, 3))
    return Program(capacity, tuple(operations), draw(slacks(limits)), batch)


def reordered(program: Program, order: Sequence[int]) -> Program:
    """The same with what row ``order[i]`` did done by row i."""
    operations: list[Operation] = []
    for operation in program.operations:
        match operation:
            case Extend(parts, chunk):
                operations.append(Extend(tuple(parts[row] for row in order), chunk))
            case Reset(row) if row is not None:
                operations.append(Reset(list(order).index(row)))
            case _:
                operations.append(operation)
    return Program(program.capacity, tuple(operations), program.slack, program.batch)


def alone(program: Program, row: int) -> Program:
    """What ``row`` does in a ragged program, as a batch of one."""
    operations: list[Operation] = []
    for operation in program.operations:
        match operation:
            case Extend(parts, chunk) if parts[row]:
                operations.append(Extend((parts[row],), chunk))
            case Reset(leaving) if leaving == row:
                operations.append(Reset())
    return Program(program.capacity, tuple(operations), program.slack)


def row_of(program: Program, observations: Sequence[Observation], row: int) -> list[Observation]:
    """What ``row`` of a ragged program observed, as ``alone`` would have."""
    found = []
    for operation, observation in zip(program.operations, observations, strict=True):
        held = (observation.positions[row],)
        match operation:
            case Extend(parts) if parts[row]:
                ends = np.cumsum([len(part) for part in parts])
                rows = observation.logits[ends[row] - len(parts[row]) : ends[row]]
                found.append(Observation(held, rows, (), observation.error))
            case Reset(leaving) if leaving == row:
                found.append(Observation(held, observation.logits, (), observation.error))
    return found


@st.composite
def rewound(draw: st.DrawFn, limits: Limits) -> Program:
    """Tokens appended and rewound, once or several times over, then a future of two operations.

    As far as the smallest window allows and one token further are drawn more often than other counts.
    """
    slack = draw(slacks(limits))
    row = Row((Window(limits.window, limits.window + slack),))
    operations: list[Operation] = []
    for _ in range(draw(st.integers(1, 3))):
        if row.held < limits.longest - 2 and draw(st.integers(0, 3)):
            part = draw(tokens_of_any_length(limits, limits.longest - 2 - row.held))
            operations.append(Prefill(part, draw(st.integers(0, len(part))), "last"))
            row = row.append(part)
        deepest = max((n for n in range(row.held) if row.can_rewind_to(row.held - n)), default=0)
        edge = st.sampled_from([deepest, min(deepest + 1, row.held)])
        count = draw(edge | edge | st.integers(0, row.held))
        again = draw(st.lists(st.integers(1, 2), max_size=1))
        for each in (count, *again):
            operations.append(Rewind(each))
            if each <= row.held and row.can_rewind_to(row.held - each):
                row = row.rewind_to(row.held - each)
    if draw(st.booleans()):
        operations.append(Poison())
    following = min(limits.window, 8) + 1
    operations += [Decode(draw(token_lists(limits, 1))), Prefill(draw(token_lists(limits, following)))]
    return Program(limits.longest + following, tuple(operations), slack)


def never_happened(program: Program, spec: ModelSpec, plan: CachePlan) -> Program:
    """What a ``rewound`` program leaves, appended in one shot, then the same future."""
    past = [operation for operation in program.operations[:-2] if not isinstance(operation, Poison)]
    row = held_after(Program(program.capacity, tuple(past), program.slack), spec, plan)
    kept = tuple(row.tokens[place] for place in row.alive)
    start = (Prefill(kept, 0, "last"),) if kept else ()
    return Program(program.capacity, (*start, *program.operations[-2:]), program.slack)


def held_after(program: Program, spec: ModelSpec, plan: CachePlan) -> Row:
    """Row 0 by the rules after a program that chooses no tokens; refused operations change nothing."""
    rules = Rules(program, spec, plan)
    for operation in program.operations:
        rules.attempt(operation)
    return rules.state[0]


@st.composite
def copied(draw: st.DrawFn, limits: Limits) -> tuple[Program, int]:
    """(a program, the length of its future): a past; the future run on; then again after a load, after
    something else was done to the loaded state, and in a fork."""
    past, future = draw(sequences(limits, 2)), draw(sequences(limits, 2))
    other = draw(sequences(limits, 1))
    choices: list[tuple[Operation, ...]] = [(), (Poison(),), (Reset(),), other]
    between = draw(st.sampled_from(choices))
    operations = (
        *past,
        Save("a"),
        Fork("b"),
        *future,
        *between,
        Load("a"),
        *future,
        Switch("b"),
        *future,
        Load("a"),
        *future,
    )
    fits = fitting((*past, *future, *other), draw(st.integers(0, 3)), draw(slacks(limits)))
    return Program(fits.capacity, operations, fits.slack), len(future)


@st.composite
def damaged(draw: st.DrawFn, limits: Limits) -> Program:
    """A saved state whose file is damaged anywhere and then loaded, in the middle of a sequence."""
    past, future = draw(sequences(limits, 2)), draw(sequences(limits, 2))
    damage = Damage("a", draw(st.integers(0, 1 << 16)), draw(st.booleans()))
    loads: list[Operation] = [damage, Load("a")]
    operations = (Save("a"), *past, *loads, *future, Save("a"), Load("a"))
    fits = fitting((*past, *future), draw(st.integers(0, 3)), draw(slacks(limits)))
    return Program(fits.capacity, operations, fits.slack)


@st.composite
def beams(draw: st.DrawFn, limits: Limits) -> Program:
    """Rows that split up and die out as beams do, each with a token of its own after every reorder."""
    batch = draw(st.integers(2, MOST_ROWS))
    prompts = tuple(draw(tokens_of_any_length(limits, limits.longest - 8)) for _ in range(batch))
    operations: list[Operation] = [Extend(prompts)]
    for _ in range(draw(st.integers(1, 4))):
        rows = st.integers(0, batch - 1)
        operations.append(Reorder(tuple(draw(st.lists(rows, min_size=batch, max_size=batch)))))
        operations.append(Extend(tuple(draw(token_lists(limits, 1)) for _ in range(batch))))
    return Program(limits.longest, tuple(operations), draw(slacks(limits)), batch)


@st.composite
def drafted(draw: st.DrawFn, limits: Limits) -> tuple[Program, int]:
    """(the same greedy run twice from a repetitive past, token by token and by prompt lookup; a number)"""
    few = st.sampled_from(draw(token_lists(limits, 3)))
    length = draw(st.integers(1, limits.longest - 2))
    past = tuple(draw(st.lists(few, min_size=length, max_size=length)))
    token, count = past[-1], draw(st.integers(1, limits.longest - len(past)))
    operations = (
        Prefill(past, 0, "last"),
        Fork("by lookup"),
        Generate(token, count),
        Switch("by lookup"),
        Speculate(token, count, draw(st.integers(1, 5)), draw(st.integers(1, 2))),
    )
    return Program(limits.longest, operations, draw(slacks(limits))), draw(st.integers(0, count))


def hinted(program: Program, found: tuple[int, ...], spoilt: int, limits: Limits) -> Program:
    """The lookup run of a ``drafted`` program with what it found as a hint, but for token ``spoilt``.

    Random weights hardly ever say what was said before: only so are drafts accepted.
    """
    past, *_, lookup = program.operations
    assert isinstance(past, Prefill)
    assert isinstance(lookup, Speculate)
    text = [*found[:spoilt], (sum(found) + 1) % limits.vocab_size, *found[spoilt + 1 :]]
    hint = (*past.tokens[len(past.tokens) + 1 - lookup.ngram :], lookup.token, *text[: len(found)])
    return Program(program.capacity, (past, dataclasses.replace(lookup, hint=hint)), program.slack)


@st.composite
def reused(draw: st.DrawFn, limits: Limits) -> Program:
    """Prompt after prompt in one row, each with a prefix of the one before, some with something between."""
    operations: list[Operation] = []
    before: tuple[int, ...] = ()
    for _ in range(draw(st.integers(2, 4))):
        kept = draw(st.integers(0, len(before)) | st.just(len(before)))
        fresh = draw(tokens_of_any_length(limits, max(1, limits.longest - kept)))
        before = (before[:kept] + fresh)[: limits.longest]
        operations.append(Reuse(before, draw(st.integers(0, len(before)))))
        if draw(st.booleans()):
            operations.append(Poison())
    return Program(limits.longest, tuple(operations), draw(slacks(limits)))


@st.composite
def compacted(draw: st.DrawFn, limits: Limits) -> Program:
    """A sequence compacted once or more, going on after each, past what it could hold otherwise."""
    capacity = limits.longest
    prompt = draw(tokens_of_any_length(limits, capacity, least=2))
    operations: list[Operation] = [Prefill(prompt, 0, "last")]
    held = len(prompt)
    for _ in range(draw(st.integers(1, 3))):
        sinks = draw(st.integers(0, 2))
        keep = draw(st.just(max(1, held // 2)) | st.integers(1, held))
        if sinks and limits.window < held:
            keep = max(keep, limits.window - 1)
        operations.append(Compact(keep, sinks))
        held = min(held, keep + sinks)
        if draw(st.booleans()):
            operations.append(Poison())
        if draw(st.booleans()):
            operations.append(Rewind(draw(st.integers(0, 2))))
        tokens = draw(tokens_of_any_length(limits, max(1, capacity - held)))
        operations.append(Prefill(tokens, draw(st.integers(0, len(tokens)))))
        held = min(capacity, held + len(tokens))
    if draw(st.booleans()):
        # Of what was dropped nothing is left behind a reset, in the bookkeeping either.
        fresh = draw(tokens_of_any_length(limits, capacity))
        operations += [Reset(), Prefill(fresh, draw(st.integers(0, len(fresh)))), ReadCache(0)]
    return Program(capacity, tuple(operations), draw(slacks(limits)))
