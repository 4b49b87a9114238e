"""A run that was killed goes on: what is done stays, and is not done again.

That its report is that of a run unharmed is judged in tests/chaos, of every round.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.errors import CannotResume
from harness.handover import Planned
from harness.resuming import _WHOLE_BYTES, Done, RunLock, check_subjects, find, is_done, request, subjects
from harness.store import open_store
from harness.store.protocol import Store
from kvengine.codec import encode
from reports.results import RunResults
from tests.harness.test_parallel import EVERYTHING, ROOT, SECONDS, Spread, await_, outcomes
from tests.harness.test_store import a_run

KVFARM = str(Path(sys.executable).with_name("kvfarm"))
# Once: what goes on with the run finds the file.
KILL_ONCE = """
    if not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill({whom}, signal.SIGKILL)
"""
MEASURED_TWICE = """
def test_measured_twice(leg):
    leg()
    {between}
    leg()
"""


@pytest.fixture
def spread(tmp_path: Path, tiny_checkpoint: Path) -> Spread:
    return Spread(tmp_path, tiny_checkpoint)


def resume(spread: Spread, *arguments: str) -> tuple[int, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [KVFARM, "resume", *arguments],
        cwd=spread.folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment | {"PYTHONPATH": str(ROOT), "FAKE_FARM": str(spread.folder / "fake")},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_killed_run_goes_on_and_repeats_nothing(spread: Spread) -> None:
    """Of two workers; in one process it is done in tests/chaos."""
    between = KILL_ONCE.format(whom="os.getppid()").strip("\n").lstrip()
    spread.suite(more="import os, signal\n" + MEASURED_TWICE.format(between=between))
    code, output = spread.pytest("--devices=a,b", "-n2")
    assert code == -signal.SIGKILL, output
    killed = spread.stored
    assert killed.finished_at is None
    assert len(killed.legs) >= 1
    # Which a real lab host sees by itself.
    await_(lambda: not any(Path(f"/proc/{each.read_text()}").exists() for each in spread.leases()), "the end")
    for lease in spread.leases():
        lease.unlink()
    workers = {each["pid"] for each in spread.log}

    code, output = resume(spread, "--last")
    assert code == 0, output
    assert f"{len(killed.checks)} checks are done" in output
    whole = spread.stored
    assert (whole.run_id, whole.seed, whole.started_at) == (killed.run_id, 7, killed.started_at)
    assert whole.finished_at is not None
    assert outcomes(whole) == EVERYTHING
    legs = {leg.key: leg for leg in whole.legs}
    assert len(legs) == len(whole.legs) == 4
    assert all(legs[leg.key] == leg for leg in killed.legs), "measured once"
    again = Counter(each["what"] for each in spread.log if each["began"] and each["pid"] not in workers)
    assert again["workload"] == 2 * (4 - len(killed.legs)), "each leg is timed and weighed"
    assert again["program"] == sum(c.programs for c in whole.checks if c not in killed.checks)

    code, output = resume(spread, whole.run_id, "--json")
    assert code == 2
    assert '"type": "CannotResume"' in output
    assert "was finished at" in output


def a_stored_run(store: Store, **changes: Any) -> RunResults:
    run = dataclasses.replace(a_run(), request=request(("--devices=a",), Path(), ("a",), {}), **changes)
    store.begin_run(run)
    return run


def test_what_cannot_go_on_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with open_store(tmp_path / "r.db") as store:
        with pytest.raises(CannotResume, match="found none; `kvfarm report --list`"):
            find(store, None)
        with pytest.raises(CannotResume, match="sought run 'r9', found none such; `kvfarm report --list`"):
            find(store, "r9")
        run = a_stored_run(store, tags=("v1",))
        assert find(store, "v1").run_id == find(store, None).run_id == run.run_id
        store.begin_run(dataclasses.replace(a_run("r2"), command="kvfarm gate x"))
        with pytest.raises(CannotResume, match=r"gates and nights go on .*: kvfarm gate x"):
            find(store, "r2")
        assert find(store, None).run_id == run.run_id, "the newest that can go on"
        store.finish_run(run.run_id, "2026-01-02T03:05:00+00:00")
        with pytest.raises(CannotResume, match="was finished at 2026"):
            find(store, run.run_id)


def test_results_of_two_models_are_never_one_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "big.safetensors").write_bytes(bytes(_WHOLE_BYTES + 1))
    asked = request((), tmp_path, ("a",), subjects([model], []))
    run = dataclasses.replace(a_run(), request=asked)
    check_subjects(run)
    (model / "config.json").write_text("{ }")
    with pytest.raises(CannotResume, match=rf"run r1 cannot go on, .*changed: {model};"):
        check_subjects(run)
    (model / "config.json").write_text("{}")
    os.utime(model / "big.safetensors", (1, 1))
    with pytest.raises(CannotResume):
        check_subjects(run)


def test_what_any_device_may_do_is_done_when_one_has_done_it() -> None:
    done = frozenset({Done("b", "static", "test_one")})

    def planned(check: str, device: str = "", anywhere: tuple[str, ...] = ()) -> Planned:
        return Planned("id", check, "", "", "check", device, "static", anywhere)

    assert is_done(planned("test_one", "b"), done)
    assert not is_done(planned("test_one", "a"), done)
    assert is_done(planned("test_one", anywhere=("a", "b")), done)
    assert not is_done(planned("test_two", anywhere=("a", "b")), done)


def test_one_process_at_a_time_works_for_a_run(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "r1")
    with pytest.raises(CannotResume, match=f"process {os.getpid()} works for it"):
        RunLock(tmp_path, "r1")
    lock.close()
    RunLock(tmp_path, "r1").close()
    assert list(tmp_path.iterdir()) == []


def test_no_password_is_kept_with_what_was_asked() -> None:
    words = ["--devices=a", "--store", "postgresql://u:hunter2@h/d", "-k", "p01", "--store=x://u:hunter2@h/d"]
    kept = request([*words, "--kvfarm-resume=r1", "x://u:hunter2@h"], Path("/f"), ("a",), {})
    assert kept.arguments == ("--devices=a", "-k", "p01", "x://u:***@h")
    assert "hunter2" not in json.dumps(encode(kept))
