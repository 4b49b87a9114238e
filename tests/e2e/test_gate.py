"""The gate for real: Ray, runner processes and the engine on this host, killed and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from harness.store import open_store
from harness.synth import synth

# The machine that tests run on is busy; whether a block counts is not what is tested here.
SETTINGS = """
looks = [4]
[entry]
busy_cores = 1000.0
wait_total_s = 0.0
"""
COMMAND = [sys.executable, "-c", "from harness.cli import main; main()", "gate", "--json"]
WORKLOAD = ["--model", "tiny", "--prompt", "8", "--new-tokens", "4", "--repeats", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    synth("tiny-gemma3", tmp_path / "tiny")
    (tmp_path / "gate.toml").write_text(SETTINGS)
    return tmp_path


def stored_legs(folder: Path) -> int:
    database = folder / ".kvfarm" / "results.db"
    if not database.exists():
        return 0
    with open_store(database) as store:
        runs = store.runs()
        return runs[0].legs if runs else 0


def killed_after(legs: int, command: list[str], folder: Path) -> int:
    """Legs in the store once ``command`` was killed with at least ``legs`` of them done."""
    deadline = Deadline(120)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while stored_legs(folder) < legs:
                assert process.poll() is None, process.communicate()[1]
                deadline.check("the first legs")
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGKILL)
    return stored_legs(folder)


def test_a_killed_gate_goes_on_where_it_was(folder: Path) -> None:
    command = [*COMMAND, "--baseline", "static", "--candidate", "static,threads=1", *WORKLOAD]
    before = killed_after(4, command, folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "going on with run" in done.stderr, done.stderr
    said = json.loads(done.stdout)
    assert done.returncode == said["exit_code"] in (0, 1, 3, 4)
    with open_store(folder / ".kvfarm" / "results.db") as store:
        (run,) = store.headers()
        results = store.results(run.run_id)
    places = [leg.place for leg in results.legs]
    assert len(places) == len({(p.block, p.position) for p in places if p}) > before
    assert results.gate is not None
    cells = {cell.metric: cell for cell in results.gate.cells}
    assert set(cells) == {"ttft", "decode", "memory", "tokens", "kv_bytes", "nodes"}
    assert cells["tokens"].verdict == "PASS"
    assert cells["kv_bytes"].verdict == "PASS"
    assert (folder / "report" / "index.html").stat().st_size > 10_000
