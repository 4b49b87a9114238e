"""The chaos's short form: a few faults once, on devices that follow a script; ``make chaos`` is long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 120
# No two clients and no real runner: those take longest.
ONLY = ("lives on", "before it stored", "before the run", "before it answered", "disk full")


def test_a_few_rounds_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    """In a process of its own: clients are forked from one that has no threads."""
    command = [sys.executable, "-m", "tests.chaos", "--cheap", "--rounds=5", "--seed=1"]
    command += [f"--only={','.join(ONLY)}", f"--json={tmp_path / 'chaos.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["ok"]
    assert len(report["rounds"]) == len(ONLY)
    assert {each["outcome"] for each in report["rounds"]} <= {"survived", "retried", "resumed"}
    assert any(each["outcome"] == "resumed" for each in report["rounds"])
