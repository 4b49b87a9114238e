"""kvfarm doctor for real: Ray, torch, a virtual phone; and through the lab agent of a cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from harness import cli
from harness.cluster import ensure_ray
from harness.farm import Farm
from harness.inventory import DEFAULT
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.export import export
from kvengine.recipe import SessionRecipe

REPOSITORY = Path(__file__).parents[2]  # whose .kvfarm keeps the parts of virtual phones


def states(said: dict[str, Any], where: str) -> dict[str, str]:
    return {row["what"]: row["state"] for row in said["findings"] if row["where"] == where}


def must_be_well(code: int, said: dict[str, Any]) -> None:
    """But for what another worker's test has killed just now: Ray's own agents outlive that by a minute."""
    wrong = [row for row in said["findings"] if row["state"] == "fix" and row["what"] != "leftovers"]
    assert wrong == []
    assert (code, said["well"]) == ((0, True) if states(said, "Ray")["leftovers"] != "fix" else (1, False))


def test_a_healthy_machine_with_a_virtual_phone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    code = cli.run(["doctor", "--json", "--devices", "host,virtual:1"])
    said = json.loads(capfd.readouterr().out)
    allowed = states(said, "virtual phones")["namespaces"] == "ok"
    if not allowed and not os.environ.get("CI"):
        pytest.skip("this machine allows no virtual phones")
    must_be_well(code, said)
    assert states(said, "Ray")["starts"] == "ok"
    assert states(said, "reference") == {"imports": "ok"}
    assert states(said, "host")["runner"] == "ok"
    phone = states(said, "virtual-1")
    assert phone == dict.fromkeys(phone, "ok")
    assert {
        "reachable",
        "ABI",
        "space",
        "executes",
        "battery",
        "thermal",
        "clock",
        "settings",
    } == phone.keys()


def test_in_a_cluster_the_lab_agent_says_who_has_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = synth("tiny-gemma3", tmp_path / "checkpoint")
    artifact = export(checkpoint, tmp_path / "artifact", parse_recipe("hybrid").export)
    with ensure_ray(), Farm(DEFAULT, ("host",), root=tmp_path / "lab") as farm:
        address = ray.get_runtime_context().gcs_address
        with farm.open("host", artifact, SessionRecipe(threads=1)):
            capfd.readouterr()
            code = cli.run(["doctor", "--json", "--devices", "host", "--farm-address", address])
    said = json.loads(capfd.readouterr().out)
    must_be_well(code, said)
    assert states(said, "Ray")["starts"] == "ok"
    (lease,) = (row for row in said["findings"] if row["what"] == "lease" and row["where"] == "host")
    assert lease["state"] == "note"
    assert f"pid {os.getpid()}" in lease["found"]
