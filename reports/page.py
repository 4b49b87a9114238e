"""The page: one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reports.charts import chart_groups, config, library
from reports.measurements import METRICS
from reports.results import RunResults
from reports.view import build_view

_TEMPLATES = "templates"


def render(results: RunResults, folder: Path) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path.

    The page links to results.json and junit.xml beside it; writing those is the caller's part.

    Raises:
        OSError: ``folder`` cannot be made or written.
    """
    return write_page(html(results), folder)


def write_page(text: str, folder: Path) -> Path:
    """``text`` as ``folder``/index.html; a reader never sees half of it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    partial = folder / "index.html.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(page)
    return page


def html(results: RunResults) -> str:
    """The page as text."""
    view = build_view(results)
    charts = chart_groups(view.measures)
    scripts = [asset("page.js")] + ([library(), asset("charts.js")] if charts else [])
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            view=view,
            charts=charts,
            curves=view.curves,
            chart_config=config(),
            columns=METRICS,
            policy=policy(scripts),
            style=Markup(asset("style.css")),
            scripts=[Markup(script) for script in scripts],
        )
    )


def policy(scripts: Iterable[str]) -> str:
    """A Content-Security-Policy: no network at all, and no script but those given, known by their hash.

    Inline styles are allowed because Vega sets them on what it draws; none can load anything,
    for no source is allowed.
    """
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def environment() -> Environment:
    """Jinja over our templates, everything escaped."""
    return Environment(
        loader=PackageLoader("reports", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def asset(name: str) -> str:
    """A file of ours beside the templates, free of anything that would end its HTML element."""
    content = (Path(__file__).parent / _TEMPLATES / name).read_text(encoding="utf-8")
    if "</" in content:
        raise ValueError(f"{name} is inlined in HTML and may not contain '</'")
    return content
