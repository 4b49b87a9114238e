"""Virtual phones that are hot or low, in real runs: one cools down and works, the other is set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.store import open_store
from harness.timeline import trace
from tests.e2e.phones import cache
from tests.e2e.test_pytest_run import Run, leaving_nothing

__all__ = ["cache"]  # fixture

# It starts with 29.0 °C and 61 %, charges on USB, and at rest cools down to 23 °C, 1 °C in a minute or so.
PROFILE = "pixel-6-rails"
OPTIONS = ("--devices=farm", "--recipes=static", "--examples=1", "-k", "p01 or p09")


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Any:
    with leaving_nothing(tmp_path) as started:
        yield started


def farm(run: Run, entry: str) -> None:
    text = f'[devices.old]\nkind = "android"\noptions = {{ virtual = "true", profile = "{PROFILE}" }}\n'
    (run.folder / "farm.toml").write_text(f"{text}[entry]\n{entry}\n")


def test_a_hot_phone_cools_down_before_its_checks_and_the_report_tells(run: Run) -> None:
    farm(run, "battery_c = 28.4\nresume_c = 28.2")
    code, output = run.pytest(*OPTIONS)
    assert code == 0, output
    assert "old waits until it is fit: the battery has 2" in output
    (device,) = run.results["devices"]
    assert device["unfit_s"] > 0
    assert device["unfit"].endswith("°C, over 28.4 °C")
    assert device["quarantined"] == ""
    assert "Waited until fit" in (run.folder / "report" / "index.html").read_text()
    with open_store(str(run.folder / ".kvfarm" / "results.db")) as store:
        run_id = store.latest()
        made = trace(store.results(run_id), store.spans(run_id))
    names = [event["name"] for event in made["traceEvents"] if event.get("cat") == "wait"]
    assert any(name.startswith("until it is fit: the battery has") for name in names), json.dumps(names)


def test_a_phone_whose_battery_stays_low_is_set_aside_and_no_test_fails(run: Run) -> None:
    farm(run, "charge_low = 90\ncharge_resume = 95\nwait_s = 3")
    code, output = run.pytest(*OPTIONS)
    assert code == 1, output
    assert [check["outcome"] for check in run.results["checks"]] == ["infrastructure"] * 2
    (device,) = run.results["devices"]
    assert "old was not fit to start within" in device["quarantined"]
    assert "the battery is at 61 %" in device["quarantined"]
    assert "FAILED" not in output.replace("FAILED:", "")
