"""``kvfarm mutants``: every known cache bug put into the engine, and what the suite makes of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from harness.cli.output import JsonOption, Report, note, progress, show
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.mutants.farm import Progress
    from harness.mutants.mutant import Mutant
    from harness.mutants.running import Judged
    from reports.results import MutantInfo, MutationScore

CACHE = Path(".kvfarm")


def register(app: typer.Typer) -> None:
    app.command()(mutants)


def mutants(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MUTANT]...", help="Names, parts of names or catalogue numbers.  [default: all]"
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Programs that each property draws.")] = 30,
    programs: Annotated[
        int, typer.Option(min=0, help="Programs that the engine as it is must pass as well.")
    ] = 0,
    first: Annotated[
        bool, typer.Option("--first", help="Stop at the first property that finds a mutant.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one core each.")] = 2,
    seed: Annotated[int, typer.Option(help="Another seed, other programs.")] = 20260112,
    as_json: JsonOption = False,
) -> None:
    """Put every known KV-cache bug into the engine, one at a time, and see that the suite finds it.

    A mutant counts as found when a property sees a wrong result, not when the engine dies of it. The
    score of all mutants is kept in .kvfarm and shown in later reports."""
    from harness.mutants.catalogue import CANNOT_EXIST, MUTANTS
    from harness.mutants.farm import crew
    from harness.mutants.score import save
    from harness.provenance import commit, now
    from reports.results import MutationScore

    chosen = _chosen(names or [], MUTANTS)
    started, began = now(), time.monotonic()
    note(f"{len(chosen)} mutants, {examples} programs a property, {workers} processes")
    with progress() as report, crew(workers) as hands:
        judged = hands.judge(chosen, examples, seed, first, _teller(report, "mutants"))
        right = hands.right(programs, examples, seed, _teller(report, "programs on the right engine"))
    score = MutationScore(
        commit=commit(),
        started_at=started,
        seconds=time.monotonic() - began,
        seed=seed,
        examples=examples,
        mutants=tuple(_info(mutant, found) for mutant, found in zip(chosen, judged, strict=True)),
        cannot_exist={str(number): f"{source}: {why}" for number, (source, why) in CANNOT_EXIST.items()},
        right_programs=sum(found.programs for found in right),
    )
    wrong = [f"{k.property}: {k.message}" for found in right for k in found.kills]
    wrong += [crash for found in right for crash in found.crashes]
    if len(chosen) == len(MUTANTS) and not first:
        save(score, CACHE)
    show(as_json, _data(score, wrong), Group(_table(score), _rest(score, wrong)))
    raise typer.Exit(1 if wrong or score.killed < len(chosen) else 0)


def _teller(report: Report, stage: str) -> Progress:
    """A bar for who sees a terminal, a line a mutant for who reads a log."""

    def tell(judged: Judged, done: int, total: int) -> None:
        report(stage, done, total)
        if not sys.stderr.isatty():
            by = judged.kills[0].property if judged.kills else "nothing"
            note(f"[{done}/{total}] {judged.mutant}: found by {by}, {judged.seconds:.1f} s")

    return tell


def _chosen(names: list[str], all_mutants: tuple[Mutant, ...]) -> list[Mutant]:
    """Raises HarnessError for a name that nothing goes by."""
    for name in names:
        if not any(_goes_by(mutant, name) for mutant in all_mutants):
            raise HarnessError(f"sought a mutant {name!r}, found none; `kvfarm mutants` lists their names")
    return [m for m in all_mutants if not names or any(_goes_by(m, name) for name in names)]


def _goes_by(mutant: Mutant, name: str) -> bool:
    return name in mutant.name if not name.isdigit() else int(name) == mutant.number


def _info(mutant: Mutant, found: Judged) -> MutantInfo:
    from reports.results import MutantInfo

    first = found.kills[0] if found.kills else None
    return MutantInfo(
        name=mutant.name,
        number=mutant.number,
        source=mutant.source,
        killed_by=first.property if first else "",
        also=tuple(kill.property for kill in found.kills[1:]),
        examples=first.examples if first else found.programs,
        seconds=first.seconds if first else found.seconds,
        recipe=mutant.recipe,
        model=mutant.model,
        crashes=found.crashes,
    )


def _data(score: MutationScore, wrong: list[str]) -> dict[str, Any]:
    from harness.mutants.running import NET
    from harness.mutants.score import only_by
    from kvengine.codec import encode

    whole: dict[str, Any] = encode(score)
    return whole | {
        "killed": score.killed,
        "total": len(score.mutants),
        "only_by": only_by(score.mutants, NET),
        "right_engine": {"programs": score.right_programs, "wrong": wrong},
    }


def _table(score: MutationScore) -> Table:
    table = Table("nr", "mutant", "source", "recipe, model", "found by", "programs", "s", "and by")
    for mutant in score.mutants:
        found = mutant.killed_by or ("[red]only a crash[/]" if mutant.crashes else "[red]SURVIVED[/]")
        also = " ".join(
            name if name[:1] == "P" and name[1:2].isdigit() else name.split()[0] for name in mutant.also
        )
        table.add_row(
            str(mutant.number),
            mutant.name,
            mutant.source,
            f"{mutant.recipe}, {mutant.model}",
            found,
            str(mutant.examples),
            f"{mutant.seconds:.1f}",
            also,
        )
    return table


def _rest(score: MutationScore, wrong: list[str]) -> str:
    from harness.mutants.running import NET
    from harness.mutants.score import only_by

    lines = [f"{number} cannot exist here: {why}" for number, why in score.cannot_exist.items()]
    if any(mutant.also for mutant in score.mutants):  # with --first nobody knows
        alone = only_by(score.mutants, NET).items()
        lines += [f"{name} alone finds: {', '.join(found)}" for name, found in alone]
    if score.right_programs:
        lines.append(
            f"the engine as it is: {score.right_programs:,} programs, {len(wrong) or 'nothing'} wrong"
        )
        lines += wrong
    lines.append(
        f"{score.killed} of {len(score.mutants)} mutants found in {score.seconds:.0f} s, "
        f"commit {score.commit[:12] or 'unknown'}, seed {score.seed}"
    )
    return "\n".join(lines)
