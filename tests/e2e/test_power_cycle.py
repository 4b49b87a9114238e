"""A phone on USB that stops answering in a real run: its power is cut; over the limit it is set aside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device_agents.adb_fixtures import adb, commands
from tests.device_agents.fake_adb import SERIAL, FakeAdb
from tests.device_agents.virtual_support import wait_for
from tests.e2e.test_pytest_run import SECONDS, Run, leaving_nothing

__all__ = ["adb", "commands"]  # fixtures

# As uhubctl; it is done when the test has plugged the phone in again.
HUB = 'echo "$@" > asked; until [ -e done ]; do sleep 0.1; done\n'
RUN_SH = f'exec {sys.executable} "$@"\n'
SMALL = ("--devices=farm", "--recipes=static", "--examples=10", "-k", "p01 or p08 or p09", "-n0")


@pytest.fixture
def run(tmp_path: Path, adb: FakeAdb) -> Iterator[Run]:
    """Its farm has one phone, whose hub is ours."""
    with leaving_nothing(tmp_path / "run") as run:
        runtime, hub = run.folder / "runtime", run.folder / "hub.sh"
        runtime.mkdir()
        (runtime / "run.sh").write_text(RUN_SH)
        hub.write_text(f"cd {run.folder}\n{HUB}")
        options = {
            "serial": SERIAL,
            "adb_port": str(adb.port),
            "root": str(tmp_path / "phone"),
            "runtime": str(runtime),
        }
        (run.folder / "farm.toml").write_text(
            "[devices.pixel]\n"
            'kind = "android"\n'
            f'power_cycle = ["sh", "{hub}", "-p", "2"]\n'
            "[devices.pixel.options]\n"
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
            + "[limits]\npower_cycles_per_day = 1\n"
        )
        yield run


def pulled_out(run: Run, adb: FakeAdb, *, again: bool) -> tuple[int, str]:
    """A run whose phone is gone after its first check. again: its hub brings it back."""
    with run.start(*SMALL, "--recover-within=5") as process:
        assert process.stdout is not None
        said = list[str]()
        for line in process.stdout:
            said.append(line)
            if "/3] ok" in line:
                break
        adb.state = "absent"
        adb.hang_up()
        if again:
            wait_for((run.folder / "asked").exists, SECONDS, "the hub")
            adb.state = "device"
            (run.folder / "done").touch()
        rest, _ = process.communicate(timeout=SECONDS)
    adb.state = "device"
    return process.returncode, "".join([*said, rest])


def audit(run: Run) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", "from harness.cli import main; main()", "audit", "--json"]
    done = subprocess.run(command, cwd=run.folder, capture_output=True, text=True, timeout=60, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["events"]
    return [each for each in found if each["device"] == "pixel"]


def test_a_silent_phone_is_power_cycled_and_the_run_is_whole_over_the_limit_it_is_set_aside(
    run: Run, adb: FakeAdb
) -> None:
    code, output = pulled_out(run, adb, again=True)
    assert code == 0, output
    checks = run.results["checks"]
    assert [check["outcome"] for check in checks] == ["passed"] * 3
    (retry,) = [reason for check in checks for reason in check["retries"]]
    assert re.search(r"\(power-cycled with sh, answered again after \d+\.\d s\)", retry)
    assert "power-cycled with sh" in (run.folder / "report" / "index.html").read_text()
    (cut,) = [each for each in audit(run) if each["what"] == "power-cycle"]
    assert "did not answer again within 5 s" in cut["why"]

    code, output = pulled_out(run, adb, again=False)
    assert code == 1, output
    assert {check["outcome"] for check in run.results["checks"]} == {"passed", "infrastructure"}
    (device,) = run.results["devices"]
    assert "was power-cycled 1 times within a day, its limit is 1; see to it" in device["quarantined"]
    told = audit(run)
    assert [each["what"] for each in told].count("power-cycle") == 1
    assert "its limit is 1" in next(each["why"] for each in told if each["what"] == "quarantined")
