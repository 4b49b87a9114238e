"""The built-in correctness suite: every test is one property of a right KV cache.

Each draws programs, runs them whole on the device under test and compares. The first docstring line
is the property as the report shows it; then come the numbers of the bugs it is there for, from the
catalogue that harness.mutants injects one by one (``kvfarm mutants``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import probes, programs
from harness.checking import Cell
from harness.compare import CheckFailed
from kvengine.plan import PlanKind
from kvengine.program import Program


def test_p01_every_step_equals_the_reference(cell: Cell) -> None:
    """P1: every step equals the cacheless reference

    Catalogue 1-9, 11-16, 18, 21-25, 27, 28, 37, 43, 47-50, 52, 54, 56. It stays whatever others find as
    well: it is what every answer must be, and they say where it goes wrong or see what logits do not
    tell. A window too large for drawn programs to leave is left behind by one long prompt, in one shot
    and in chunks.
    """

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(programs.any_sequence(cell.limits), check)
    if cell.limits.wraps == 0:
        cell.for_these(programs.past_the_window(cell.limits), check)


@pytest.mark.hybrid_only
def test_p02_windowed_layers_equal_full_length_layers(cell: Cell) -> None:
    """P2: window-sized layers equal full-length layers with a mask

    Catalogue 3, 4, 9, 11, 13-16, 18. Stays beside P1 although P1 finds the same at float32: int8 and
    int4 caches are only near the reference, while both layouts hold the same codes and must agree
    closely.
    """

    def check(program: Program) -> None:
        hybrid, static = cell.run(program), cell.run(program, plan="static")
        # Greedy tokens may part at a tie and then so does what follows: compare fixed tokens only.
        cell.check_same(program, hybrid, static, "static cache", cell.tolerance.same)

    cell.for_all(programs.any_sequence(cell.limits, greedy=False), check)


def test_p03_the_cache_holds_the_newest_positions(cell: Cell) -> None:
    """P3: every cache row holds the position it should, and no other

    Catalogue 1-8, 11-18, 21-25, 27, 28, 34, 37; 17 and 34 show in no logit. Stays beside P6, P10 and
    P14, which find these two as well: it alone names the row. Each row's K and V must be nearest to the
    reference's at the position that the row stands for; layers with a window hold the newest W to W +
    slack positions, others all.
    """

    def check(program: Program) -> None:
        program = probes.reading_back(program, cell.spec)
        caches = probes.caches(program, cell.run(program))
        rows = probes.Rows(cell.recipe.export.cache, cell.spec, cell.tolerance)
        rows.check(program, caches, cell.reference_cache(programs.fixed_tokens(program)))

    cell.for_all(programs.any_sequence(cell.limits, greedy=False), check)


def test_p04_a_window_ends_where_it_should(cell: Cell) -> None:
    """P4: the key at distance W has no effect, to the last bit; the one at W - 1 has

    Catalogue 1, 2, 6-8, 12. Bits need no tolerance, so it also sees what an int4 cache hides from P1.
    """
    felt, tried = 0, 0
    last: Program | None = None

    def check(probe: probes.Perturbed) -> None:
        nonlocal felt, tried, last
        base = probe.seen(cell.run(probe.base))
        if probe.outside is not None and probe.seen(cell.run(probe.outside)) != base:
            raise CheckFailed("a token outside the window changed what lies beyond it", probe.outside)
        if probe.inside is not None:
            last, tried = probe.inside, tried + 1
            felt += probe.seen(cell.run(probe.inside)) != base

    def together() -> None:
        # One key may weigh nothing by chance, not most of them.
        if last is not None and 2 * felt < tried:
            raise CheckFailed(f"the oldest token in the window mattered in {felt} of {tried} programs", last)

    cell.for_all(probes.perturbed(cell.limits, cell.spec), check, together)


def test_p05_any_chunking_equals_one_shot(cell: Cell) -> None:
    """P5: any chunking of a prompt equals one shot

    Catalogue 3-5, 8, 9, 11-16, 22, 51. Stays beside P1 and P13: it says that the chunking is at fault,
    and at int8 and int4, where P1 has to be lenient, it need not be.
    """

    def check(program: Program) -> None:
        observations = cell.run(program)
        half = len(observations) // 2
        one_shot, chunked = observations[:half], observations[half + 1 :]
        cell.check_same(program, one_shot, chunked, "one shot", cell.tolerance.same)
        cell.check_reference(program, observations)

    cell.for_all(programs.chunked_twice(cell.limits), check)


def test_p06_only_distances_between_positions_matter(cell: Cell) -> None:
    """P6: where a sequence stands does not matter, and K turns by its layer's own RoPE

    Catalogue 3-5, 9, 13-16, 21-25, 27, 28, 51. In a prompt of one token repeated, attention has the
    same values everywhere: whatever the position, the logits and V must be the same in every layer, and
    K the same but for a rotation whose angles follow from the layer's theta alone. Stays beside P14,
    which finds the same through the reference: it needs none.
    """

    def check(program: Program) -> None:
        program = probes.reading_back(program, cell.spec)
        observations = cell.run(program)
        probes.check_repeated(program, observations, cell.spec, cell.tolerance)

    cell.for_all(probes.repeated(cell.limits), check)


def test_p08_room_is_all_that_capacity_changes(cell: Cell) -> None:
    """P8: a request past the capacity is refused and changes nothing; more room changes no answer

    Catalogue 29 above all; and 1-9, 11-16, 18, 21-25, 27, 28.
    """

    def check(drawn: tuple[Program, Program, Program]) -> None:
        overflowing, tight, roomy = drawn
        cell.check_reference(overflowing, cell.run(overflowing))
        cell.check_same(tight, cell.run(tight), cell.run(roomy), "run with more room", cell.tolerance.same)

    cell.for_all(programs.rooms(cell.limits), check)


def test_p09_the_dead_never_matter(cell: Cell) -> None:
    """P9: neither NaN in unused cache rows nor what was before a reset changes a bit

    Catalogue 5, 14, 16, 19, 27, 28, 30, 36, 42. Stays beside P11, which meets much of this in copied
    states: here it is dead rows and resets alone.
    """

    def check(pair: tuple[Program, Program]) -> None:
        haunted, clean = pair
        seen = programs.alive(haunted, cell.run(haunted))
        cell.check_same(clean, seen, cell.run(clean), "run without a past", 0.0)

    cell.for_all(programs.haunted(cell.limits), check)


def test_p12_buffers_are_nobody_elses(cell: Cell) -> None:
    """P12: in-place buffers equal new buffers each step, and two interleaved sessions do not meet

    Catalogue 35; and 3, 4, 9, 11, 13-16, 18, 51 wherever the buffers of one plan only are wrong.
    """
    other: PlanKind = "static" if cell.recipe.export.cache.kind == "growing" else "growing"

    def check(drawn: tuple[Program, Program, Program]) -> None:
        both, one, two = drawn
        aliased, unaliased = cell.run(one), cell.run(one, plan=other)
        cell.check_same(one, aliased, unaliased, f"{other} cache", cell.tolerance.same)
        seen = cell.run(both)
        cell.check_same(one, programs.of_state(both, seen, "main"), aliased, "run alone", 0.0)
        cell.check_same(two, programs.of_state(both, seen, "other"), cell.run(two), "run alone", 0.0)

    cell.for_all(programs.interleaved(cell.limits), check)


@pytest.mark.quantized_cache_only
def test_p13_codes_are_the_nearest(cell: Cell) -> None:
    """P13: a quantized cache is off by at most half a scale, and its codes do not depend on chunking

    Catalogue 14, 48, 49, 51. Stays beside P5 and compaction, which find the same: it names the element,
    and its bound is exact. The bound holds in layer 0, whose K and V are computed from the tokens
    alone; further up the error of the layers below comes in.
    """

    def check(pair: tuple[Program, Program]) -> None:
        one_shot, chunked = (probes.reading_back(program, cell.spec) for program in pair)
        found = probes.caches(one_shot, cell.run(one_shot))
        recipe = cell.recipe.export
        probes.check_same_codes(chunked, found, probes.caches(chunked, cell.run(chunked)), recipe)
        true = cell.reference_cache(programs.fixed_tokens(one_shot))[0]
        probes.check_codes(one_shot, found[0], true, recipe)

    cell.for_all(programs.two_chunkings(cell.limits), check)


def test_p14_every_kv_head_is_its_own(cell: Cell) -> None:
    """P14: every KV head holds its own K and V, and every query head reads the right one

    Catalogue 55 above all; and 1-9, 11-16, 34, 37, 43, 50, 54. Says something only where there are
    several KV heads, fewer than query heads, and hidden_size is not heads times head_dim: the tiny
    checkpoints are made so.
    """

    def check(program: Program) -> None:
        program = probes.reading_back(program, cell.spec)
        observations = cell.run(program)
        tokens = programs.fixed_tokens(program)
        probes.check_heads(program, probes.caches(program, observations), cell.reference_cache(tokens))
        steps = replace(program, operations=program.operations[: -len(cell.spec.layers)])
        cell.check_reference(steps, observations[: len(steps.operations)])

    cell.for_all(programs.any_sequence(cell.limits, greedy=False), check)
