"""``kvfarm ablate`` as a user runs it: real processes on this host, and its page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli
from harness.store import open_store
from tests.e2e.browser import chromium


def test_every_step_is_measured_stored_and_drawn(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--prompt", "24", "--new-tokens", "6", "--rounds", "1", "--weights", "float32")
    assert cli.run(["ablate", str(tiny_checkpoint), *small, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (device,) = told["devices"]
    steps = {step["step"]: step for step in device["steps"]}
    assert list(steps) == [
        "naive",
        "static",
        "binding",
        "logits",
        "windowed",
        "float16",
        "int8",
        "threads",
    ]
    assert all(step["legs"] == 1 and step["values"]["memory"][0] > 0 for step in steps.values())
    exact = ("naive", "static", "binding", "logits", "windowed")
    assert all(steps[key]["same_tokens_as_naive"] for key in exact)
    assert steps["int8"]["kv_bytes"] * 4 == steps["windowed"]["kv_bytes"]
    seed = {row["metric"]: row for row in device["seed"]}
    assert seed["energy"]["outcome"] == "unsupported"
    assert "no battery" in seed["energy"]["why"]
    assert seed["ttft"]["improvement"] == pytest.approx(1 - seed["ttft"]["after"] / seed["ttft"]["before"])

    with open_store(tmp_path / ".kvfarm" / "results.db") as store:
        stored = store.results(told["run_id"])
    assert len(stored.legs) == stored.planned_legs == 8
    assert all(leg.memory_pass for leg in stored.legs)
    assert json.loads((tmp_path / "ablation" / "ablation.json").read_text())["format"] == "kvfarm-ablation/1"

    with chromium() as browser, browser.open(tmp_path / "ablation" / "index.html") as opened:
        states = {e.attributes["id"]: e.attributes["data-state"] for e in opened.dom.all("figure")}
        assert states == {"a0-ttft": "drawn", "a0-rate": "drawn", "a0-memory": "drawn"}
        assert (opened.errors, opened.console) == ("", [])

    assert cli.run(["ablate", "--again", told["run_id"], "-o", "again"]) == 0
    assert (tmp_path / "again" / "index.html").read_bytes() == (
        tmp_path / "ablation" / "index.html"
    ).read_bytes()
