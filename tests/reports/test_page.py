"""The page as a browser's parser sees it: whole, self-contained, and safe whatever a device says."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from reports.page import html, render
from reports.results import RunResults
from tests.reports.parsed import Page
from tests.reports.sample import (
    AFTER,
    BEFORE,
    CHECKS,
    HOST,
    LOST,
    PHONE,
    SMALL,
    device,
    leg,
    run,
    sample_run,
)

TWO_MB = 2_000_000
ATTACK = "</script></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"


@pytest.fixture(scope="module")
def sample() -> Page:
    return Page(html(sample_run()))


@pytest.fixture(scope="module")
def green() -> Page:
    return Page(html(run()))


def attacked(value: Any) -> Any:
    """``value`` with ATTACK appended to every free string in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fixed = {"outcome", "validity", "format", "started_at", "finished_at"}
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**{name: v if name in fixed else attacked(v) for name, v in fields.items()})
    if isinstance(value, tuple):
        return tuple(map(attacked, value))
    if isinstance(value, dict):
        return {attacked(k): attacked(v) for k, v in value.items()}
    return value + ATTACK if isinstance(value, str) and value else value


def executable(page: Page) -> list[str]:
    return [s.text for s in page.all("script") if s.attributes.get("type", "") == ""]


def test_render_writes_index_html_and_nothing_else(tmp_path: Path) -> None:
    page = render(run(), tmp_path / "report")
    assert page == tmp_path / "report" / "index.html"
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]
    assert page.read_text(encoding="utf-8") == html(run())


def test_render_replaces_an_older_page(tmp_path: Path) -> None:
    render(sample_run(), tmp_path)
    render(run(), tmp_path)
    assert "All that was planned passed" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("results", "state", "headline"),
    [
        (run(), "passed", "All that was planned passed"),
        (sample_run(), "failed", "2 checks failed, and the run did not finish"),
        (run(finished_at=None), "interrupted", "The run did not finish"),
        (run(planned_checks=9), "incomplete", "Not all that was planned was done"),
        (run(checks=(), legs=()), "incomplete", "Nothing was planned"),
    ],
)
def test_the_verdict_heads_the_page(results: RunResults, state: str, headline: str) -> None:
    page = Page(html(results))
    assert page.one("h1").words == headline
    assert state in page.one("section", class_="verdict").classes
    assert page.one("title").words.startswith(state.upper())


def test_sections_come_in_the_order_of_a_decision(sample: Page) -> None:
    assert [e.words for e in sample.all("h2")] == [
        "Correctness",
        "Measurements",
        "Latency charts",
        "Failures",
        "Infrastructure errors",
        "Provenance",
    ]


def test_coverage_shows_planned_and_done(sample: Page) -> None:
    checks, measurements = (e.words for e in sample.all(class_="coverage"))
    assert checks == "Checks 54 planned 39 passed 2 failed 1 infrastructure 12 not run"
    assert measurements == "Measurements 10 planned 6 valid 1 noisy 1 invalid 2 missing"


def test_every_device_recipe_and_check_is_in_the_tables(sample: Page) -> None:
    correctness = sample.one("section", id="correctness").words
    for name in (HOST, PHONE, LOST, BEFORE, AFTER, SMALL, *CHECKS.values()):
        assert name in correctness
    measurements = sample.one("section", id="measurements").words
    for name in (HOST, PHONE, LOST, BEFORE, AFTER, SMALL):
        assert name in measurements


def test_a_simulated_device_says_so_wherever_it_appears() -> None:
    devices = (device(HOST), device(PHONE, simulated="a virtual phone"))
    page = Page(html(sample_run(devices=devices)))
    named = [i for i, e in enumerate(page.elements) if "device" in e.classes and e.words == PHONE]
    assert len(named) >= 8
    for index in named:
        assert page.elements[index + 1].classes == {"tag", "simulated"}
    for spec in (json.loads(e.text) for e in page.all("script", type="application/json")):
        if PHONE in spec.get("description", ""):
            assert f"{PHONE} (simulated)" in spec["description"]
    for id_ in ("measurements", "charts", "correctness"):
        assert "Simulated: a virtual phone" in page.one("section", id=id_).words


def test_real_devices_are_not_called_simulated(green: Page) -> None:
    assert not green.all(class_="simulated")


def test_infrastructure_errors_never_appear_among_the_failures(sample: Page) -> None:
    failures, infrastructure = (sample.one("section", id=i).words for i in ("failures", "infrastructure"))
    assert "RunnerDied" not in failures
    assert "RunnerDied" in infrastructure
    assert "lowmemorykiller" in infrastructure
    assert "device offline" in infrastructure
    assert len(sample.all("article", class_="failed")) == 2
    assert len(sample.all("article", class_="infrastructure")) == 2


def test_a_failure_has_all_that_is_needed_to_act(sample: Page) -> None:
    failure = sample.all("article", class_="failed")[1].words
    for said in (
        "poison",
        "first differs here",
        "Reference",
        "Device",
        "9.8121",
        "9.6127",
        "Layer 3",
        "--replay",
    ):
        assert said in failure
    assert [mark.text for mark in sample.all("mark")] == ["3", "40"]


def test_links_from_the_grid_lead_to_the_problems(sample: Page) -> None:
    targets = {e.attributes["id"] for e in sample.elements if "id" in e.attributes}
    links = {e.attributes["href"] for e in sample.all("a")}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert {"#problem-1", "#problem-2", "#problem-3"} <= links


def test_provenance_is_there(sample: Page) -> None:
    words = sample.one("section", id="provenance").words
    for said in ("20251123", "pytest --devices=farm", "f61b6a9", "9f2c" * 16, "CPUExecutionProvider 412"):
        assert said in words
    for said in ("schedutil", "Battery 84 %", "mem_opt.json has no effect", "int4, block 32", "Tensor G4"):
        assert said in words


def test_best_and_worst_are_words_not_only_colours(sample: Page) -> None:
    cues = {e.words for e in sample.all(class_="cue")}
    assert cues == {"▲ best", "▽ worst"}


def test_a_run_without_measurements_carries_no_chart_library() -> None:
    source = html(run(legs=(), planned_legs=0))
    assert "vegaEmbed" not in source
    assert "Nothing was measured." in source
    assert len(source) < 60_000


@pytest.mark.parametrize("results", [run(), sample_run(), run(checks=(), legs=(), devices=(), recipes=())])
def test_the_page_asks_the_network_for_nothing(results: RunResults) -> None:
    page = Page(html(results))
    for element in page.elements:
        assert not {"src", "srcset", "data", "poster", "action", "formaction", "background"} & set(
            element.attributes
        )
        href = element.attributes.get("href", "#")
        assert href in ("results.json", "junit.xml") or href.startswith("#")
        assert "url(" not in element.attributes.get("style", "")
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "form")
    for style in page.all("style"):
        assert not re.search(r"url\(|@import|image-set|https?:", style.text)


def test_the_policy_forbids_the_network_and_unknown_scripts(sample: Page) -> None:
    meta = sample.all("meta", **{"http-equiv": "Content-Security-Policy"})
    directives = dict(d.strip().split(" ", 1) for d in meta[0].attributes["content"].split(";"))
    scripts = directives.pop("script-src").split()
    assert directives == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    packed = sample.one("script", id="chart-library").text
    known = [*executable(sample), gzip.decompress(base64.b64decode(packed)).decode()]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in known]
    assert scripts == [f"'sha256-{digest}'" for digest in digests]
    assert sample.elements.index(meta[0]) < sample.elements.index(sample.all("script")[0])


def test_nothing_a_device_says_becomes_markup(sample: Page) -> None:
    page = Page(html(attacked(sample_run())))
    assert not page.all("img")
    assert not [e for e in page.elements if any(name.startswith("on") for name in e.attributes)]
    assert executable(page) == executable(sample)
    for tag in ("script", "style", "title", "figure", "table"):
        assert len(page.all(tag)) == len(sample.all(tag))
    for block in page.all("script", type="application/json"):
        json.loads(block.text)


def test_what_a_device_says_is_shown_as_it_is() -> None:
    name = f"phone {ATTACK}"
    page = Page(html(run(devices=(device(name),), legs=(leg(name),), checks=())))
    assert [e.text for e in page.all(class_="device")].count(name) >= 3
    specs = [json.loads(e.text) for e in page.all("script", type="application/json")]
    assert sum(name in spec.get("description", "") for spec in specs) == 5


def test_the_page_stays_small(sample: Page) -> None:
    assert len(sample.source.encode()) < TWO_MB
    cells = 9
    growth = len(sample.source) - len(html(run(checks=(), legs=(leg(),))))
    assert growth / cells < 20_000  # so that some fifty device × recipe pairs fit into two megabytes
