"""The index page of a night: the verdict, its parts with their own pages, and the nights before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from reports import gate_night, text
from reports.gate_night import EXIT_CODES, MEANS, NightInfo
from reports.page import asset, environment, policy, script, write_page

MOST_NIGHTS = 60  # of the history that are shown


def render(night: NightInfo, history: Sequence[NightInfo], folder: Path, here: str, others: str) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path.

    history: nights of the same name, this one among them. here, others: prefixes of links, from ``folder`` to
    this night's folder and to that of all nights.

    Raises:
        OSError: ``folder`` cannot be made or written.
    """
    return write_page(html(night, history, here, others), folder)


def html(night: NightInfo, history: Sequence[NightInfo], here: str = "", others: str = "../") -> str:
    """The page as text."""
    page_script = script("page.js")
    return (
        environment()
        .get_template("gate_night.html.j2")
        .render(
            night=night,
            v=gate_night.summary(night),
            parts=_parts(night),
            codes=[
                (word, code, MEANS[word]) for word, code in sorted(EXIT_CODES.items(), key=lambda x: x[1])
            ],
            symbols=gate_night.SYMBOLS,
            tones=gate_night.TONES,
            seconds=text.seconds,
            started=text.moment(night.started_at),
            elapsed=text.elapsed(night.started_at, night.finished_at),
            history=gate_night.lines(history)[:MOST_NIGHTS],
            here=here,
            others=others,
            policy=policy([page_script]),
            style=Markup(asset("style.css") + asset("gate.css")),
            scripts=[Markup(page_script)],
        )
    )


def _parts(night: NightInfo) -> tuple[tuple[str, gate_night.NightPart | None], ...]:
    """Every planned part in order; None where it was not reached."""
    done = {part.name: part for part in night.parts}
    return tuple((name, done.get(name)) for name in night.planned)
