"""Where no virtual phone can be: skipped with the reason, never green, and in CI an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import InventoryError
from harness.impossible import impossible
from harness.inventory import DEFAULT, DeviceEntry, Inventory, LabEntry

ROOT = Path(__file__).parents[2]
WHY = "not allowed: Operation not permitted: run as root"


def asked(why: str, abis: list[str]) -> tuple[str, ...]:
    def ask(abi: str) -> str:
        abis.append(abi)
        return why

    far = DeviceEntry("android", "rack", options={"virtual": "true"})
    known = Inventory({"host": DeviceEntry(), "far": far}, {"rack": LabEntry("192.0.2.1")})
    names = ("host", "far", "virtual-1", "virtual-2", "virtual-arm64-v8a-1")
    return tuple(f"{each.name}: {each.reason}" for each in impossible(names, known, Path(), ask))


def test_this_machines_virtual_phones_are_passed_over_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CI", raising=False)
    abis: list[str] = []
    why = f"no virtual phones on this machine: {WHY}"
    assert asked(WHY, abis) == (f"virtual-1: {why}", f"virtual-2: {why}", f"virtual-arm64-v8a-1: {why}")
    assert abis == ["", "arm64-v8a"], "each kind is asked for once"
    assert asked("", abis) == ()


def test_in_ci_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(InventoryError, match=f"(?s)CI is set, so that is an error.*virtual-1: .*{WHY}"):
        asked(WHY, [])
    assert asked("", []) == ()
    assert impossible(("host",), DEFAULT, Path()) == ()
    monkeypatch.setenv("CI", "false")
    assert len(asked(WHY, [])) == 3


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A folder in which a pytest finds that this machine can have no virtual phones."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "no_phones.py").write_text(
        f"from harness import impossible\nimpossible.why_not = lambda *_: {WHY!r}\n"
    )
    return tmp_path


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no_phones",
            "-p",
            "no:cacheprovider",
            "--model=model",
            *options,
        ],
        cwd=folder,
        env=environment | {"PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_run_of_nothing_but_skips_tells_why_and_is_not_green(nowhere: Path) -> None:
    done = run(nowhere, "--devices=virtual:1", "-rs")
    assert f"not chosen: virtual-1: no virtual phones on this machine: {WHY}" in done.stdout
    assert f"no device for 'virtual:1': virtual-1: no virtual phones on this machine: {WHY}" in done.stdout
    assert re.search(r"^INCOMPLETE: 0/(\d+) checks passed, \1 not run; ", done.stdout, re.MULTILINE), (
        done.stdout
    )
    assert (done.returncode, " failed" in done.stdout) == (1, False)


def test_tests_on_the_other_devices_go_on(nowhere: Path) -> None:
    done = run(nowhere, "--devices=host,virtual:1", "--recipes=hybrid", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout
    assert "::test_p01_every_step_equals_the_reference[host-hybrid]" in done.stdout
    assert "::test_p01_every_step_equals_the_reference[virtual-1]" in done.stdout
