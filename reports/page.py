"""The page: one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reports.charts import chart_groups, config, library
from reports.measurements import columns_of
from reports.packing import gzipped, packed
from reports.results import RunResults
from reports.trend import Series, trend_view
from reports.view import build_view

_TEMPLATES = "templates"


def render(results: RunResults, folder: Path, trend: Sequence[Series] = ()) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path.

    trend: lines of the run's cells over stored nights; without a second night the page has no trend.

    The page links to results.json and junit.xml beside it; writing those is the caller's part.

    Raises:
        OSError: ``folder`` cannot be made or written.
    """
    return write_page(html(results, trend), folder)


def write_page(text: str, folder: Path) -> Path:
    """``text`` as ``folder``/index.html; a reader never sees half of it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    partial = folder / "index.html.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(page)
    return page


def html(results: RunResults, trend: Sequence[Series] = ()) -> str:
    """The page as text."""
    view = build_view(results)
    charts = chart_groups(view.measures)
    scripts = [script("page.js")] + ([asset("charts.js")] if charts or view.curves else [])
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            view=view,
            retried=view.retried,
            quarantined=view.quarantined,
            trend=trend_view(trend),
            charts=charts,
            curves=view.curves,
            chart_config=config(),
            columns=columns_of(results),
            policy=policy([*scripts, *([library()] if len(scripts) > 1 else [])]),
            library=Markup(packed_library()) if len(scripts) > 1 else "",
            style=Markup(asset("style.css") + asset("gate.css") + asset("trend.css")),
            scripts=[Markup(script) for script in scripts],
        )
    )


def policy(scripts: Iterable[str]) -> str:
    """A Content-Security-Policy: no network at all, and no script but those given, known by their hash.

    Inline styles are allowed because Vega sets them on what it draws; none can load anything,
    for no source is allowed.
    """
    allowed = " ".join(map(hashed, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def hashed(content: str) -> str:
    """As a Content-Security-Policy names a script or a style."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def packed_library() -> str:
    """The chart library as charts.js unpacks it: a third of its size."""
    return gzipped(library())


@cache
def environment() -> Environment:
    """Jinja over our templates, everything escaped; ``packed`` is reports.packing's."""
    made = Environment(
        loader=PackageLoader("reports", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["packed"] = packed
    return made


def script(name: str) -> str:
    """A script of ours for a page, with what keeps its errors."""
    return asset("errors.js") + asset(name)


@cache
def asset(name: str) -> str:
    """A file of ours beside the templates, free of anything that would end its HTML element."""
    content = (Path(__file__).parent / _TEMPLATES / name).read_text(encoding="utf-8")
    if "</" in content:
        raise ValueError(f"{name} is inlined in HTML and may not contain '</'")
    return content
