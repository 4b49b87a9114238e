"""The trend on a page of its own: one HTML file whose charts are SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from reports.page import asset, environment, policy, script, write_page
from reports.trend import Series, trend_view


def render(series: Sequence[Series], folder: Path) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path.

    Raises:
        OSError: ``folder`` cannot be made or written. ValueError: no cell has a second night.
    """
    return write_page(html(series), folder)


def html(series: Sequence[Series]) -> str:
    """The page as text. Raises ValueError where no cell has a second night."""
    trend = trend_view(series)
    if trend is None:
        raise ValueError("no cell has a second night: there is no trend yet")
    scripts = [script("page.js")]
    return (
        environment()
        .get_template("trend_page.html.j2")
        .render(
            trend=trend,
            policy=policy(scripts),
            style=Markup(asset("style.css") + asset("gate.css") + asset("trend.css")),
            scripts=[Markup(script) for script in scripts],
        )
    )
