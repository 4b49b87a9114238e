"""The correctness suite, second half: batches, rewinds, copies, drafts, and programs over everything.

The numbers are those of the bug catalogue (CATALOGUE in harness/mutants): what each property is there for.
"""

from __future__ import annotations

from harness import lifecycles
from harness.checking import Cell
from harness.compare import CheckFailed
from kvengine.program import Decode, Program, Speculate


def test_p07_ragged_rows_equal_rows_alone(cell: Cell) -> None:
    """P7: rows of a ragged batch equal each row alone, in any order

    Catalogue 27 28 29 30 31 32 33, and 36 for a row that leaves. Every row is held against the reference,
    against a batch of one, and against the same batch turned round.
    """

    def check(program: Program) -> None:
        together = cell.run(program)
        cell.check_reference(program, together)
        order = list(reversed(range(program.batch)))
        turned = cell.run(lifecycles.reordered(program, order))
        for row in range(program.batch):
            single = lifecycles.alone(program, row)
            if not single.operations:
                continue
            mine = lifecycles.row_of(program, together, row)
            limit = cell.tolerance.same
            cell.check_same(single, mine, cell.run(single), f"row {row} alone", limit)
            other = lifecycles.row_of(lifecycles.reordered(program, order), turned, order.index(row))
            cell.check_same(single, mine, other, f"row {row} in another place", limit)

    cell.for_all(lifecycles.ragged(cell.limits), check)


def test_p07_beams_follow_their_parents(cell: Cell) -> None:
    """P7: after a beam reorder every row goes on as its parent

    Catalogue 44, and 33: rows that split up or die out must take lengths and all layers with them.
    """

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(lifecycles.beams(cell.limits), check)


def test_p10_rewound_is_as_if_it_never_happened(cell: Cell) -> None:
    """P10: rewind, then go on, equals never having happened, or is refused where it must be

    Catalogue 38 39 45 46. The refusal is judged too: the oracle knows to the token which rewinds a
    window allows, by simulating the evictions, so that neither too short nor too long a bound passes.
    """

    def check(program: Program) -> None:
        found = cell.run(program)
        cell.check_reference(program, found)
        straight = lifecycles.never_happened(program, cell.spec, cell.plan)
        what = "run in which nothing was rewound"
        cell.check_same(program, found[-2:], cell.run(straight)[-2:], what, cell.tolerance.same)

    cell.for_all(lifecycles.rewound(cell.limits), check)


def test_p10_a_kept_prefix_equals_a_fresh_prompt(cell: Cell) -> None:
    """P10: a prompt that keeps the prefix of the one before equals a fresh prompt

    Catalogue 35 37: as many rows of logits come back as tokens really ran, so keeping one too few shows
    as well as one too many.
    """

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(lifecycles.reused(cell.limits), check)


def test_p11_saved_loaded_and_forked_equal_the_original(cell: Cell) -> None:
    """P11: a loaded or forked state goes on as the original, to the last bit

    Catalogue 22 40 42. Also after the original went on, and twice from the same file.
    """

    def check(drawn: tuple[Program, int]) -> None:
        program, length = drawn
        found = cell.run(program)
        cell.check_reference(program, found)
        saved = next(i for i, operation in enumerate(program.operations) if operation.kind == "fork") + 1
        original = found[saved : saved + length]
        ends = len(found)
        switched = next(i for i, o in enumerate(program.operations) if o.kind == "switch")
        copies = {"state loaded once": switched - length, "fork": switched + 1, "second load": ends - length}
        for what, start in copies.items():
            cell.check_same(program, original, found[start : start + length], what, 0.0)

    cell.for_all(lifecycles.copied(cell.limits), check)


def test_p11_a_damaged_state_is_refused_and_harms_nothing(cell: Cell) -> None:
    """P11: a damaged state is refused, and what was there goes on

    Catalogue 41. Any byte altered, or the file cut off anywhere.
    """

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(lifecycles.damaged(cell.limits), check)


def test_prompt_lookup_gives_the_greedy_tokens(cell: Cell) -> None:
    """Prompt lookup decoding gives the tokens of greedy decoding, always

    Catalogue 38 45 through its rejected drafts. Where two logits tie within the tolerance either token
    will do, as a step of several tokens rounds otherwise than a step of one.
    """

    def check(drawn: tuple[Program, int]) -> None:
        program, spoilt = drawn
        found = cell.run(program)
        cell.check_reference(program, found)
        greedy, lookup = found[2].tokens, found[4].tokens
        same_tokens(program, greedy, lookup)
        hinted = lifecycles.hinted(program, greedy, spoilt, cell.limits)
        found = cell.run(hinted)
        cell.check_reference(hinted, found)
        same_tokens(hinted, greedy, found[1].tokens)

    def same_tokens(program: Program, greedy: tuple[int, ...], lookup: tuple[int, ...]) -> None:
        if greedy == lookup:
            return
        past, draft = program.operations[0], program.operations[-1]
        assert isinstance(draft, Speculate)
        first = next((i for i, (a, b) in enumerate(zip(greedy, lookup, strict=False)) if a != b), 0)
        said = Decode((draft.token, *greedy[:first]))
        row = cell.run(Program(program.capacity, (past, said), program.slack))[1].logits[-1]
        below = float(row.max() - row[lookup[first]]) if lookup else float("inf")
        if below > 2 * (cell.tolerance.logits or cell.tolerance.same):
            raise CheckFailed(
                f"prompt lookup found {list(lookup)}, greedy decoding {list(greedy)}: token {first} is "
                f"{below:.3g} below",
                program,
            )

    cell.for_all(lifecycles.drafted(cell.limits), check)


def test_compaction_hides_and_keeps_distances(cell: Cell) -> None:
    """Keep the newest, with or without sinks: exactly the reference that hides what was dropped

    Catalogue 20 26. Not equal to the run without: the reference computes each kept key with all that was
    visible then, and masks the dropped positions from every later token.
    """

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(lifecycles.compacted(cell.limits), check)


def test_any_program_equals_the_reference(cell: Cell) -> None:
    """Any program over all operations equals the reference

    Written by one Hypothesis machine: batches of 1 to 4, three windows and more, every operation after
    every other. The net under all other properties: lifecycle bugs (35 to 46) that need two operations
    in an order nobody thought of.
    """

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all_programs(check)
