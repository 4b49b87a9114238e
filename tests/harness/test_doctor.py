"""kvfarm doctor: whom it asks, what this machine may lack, and the table and exit code it comes to."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from device_agents.api import Finding
from device_agents.blobs import BlobStore
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure
from harness import cli, doctor, this_machine
from harness.doctor import Patients, diagnose, find_patients
from harness.inventory import DEFAULT, DeviceEntry, Inventory
from tests.device_agents.fake_adb import SERIAL, FakeAdb

WELL = Finding("something", "ok", "is well")
VIRTUAL = DeviceEntry("android", options={"virtual": "true", "abi": "x86_64"})
PHONE = DeviceEntry("android", options={"serial": SERIAL})


def quiet(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdb]:
    with FakeAdb(tmp_path) as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
        yield server


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def all_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked; every part of this machine is well."""
    monkeypatch.setattr(this_machine, "host", lambda cache: (WELL,))
    monkeypatch.setattr(this_machine, "ray_starts", lambda address, within: (WELL,))
    monkeypatch.setattr(this_machine, "reference", lambda within: (WELL,))
    monkeypatch.setattr(doctor, "diagnose_adb", lambda server, within: (WELL,))
    monkeypatch.setattr(doctor, "ready", lambda abi, cache, ask, within: WELL)
    monkeypatch.setattr("device_agents.virtual.possible.namespaces", lambda within: WELL)
    monkeypatch.setattr("device_agents.virtual.possible.parts", lambda abi, cache, ask, within: WELL)
    monkeypatch.setattr(doctor, "_asked_here", lambda name, entry, store: [WELL])


# -- whom it asks -------------------------------------------------------------------------


def test_by_default_all_of_the_farm_file_and_all_of_adb_are_asked(adb: FakeAdb) -> None:
    Path("farm.toml").write_text(
        "[devices.host]\n[devices.old]\nkind = 'android'\n[pools]\nsome = ['virtual:2']\n"
    )
    assert list(find_patients(None, None).devices) == ["host", "old", "virtual-1", "virtual-2", SERIAL]


def test_a_listed_phone_is_asked_once_and_by_its_name(adb: FakeAdb) -> None:
    Path("farm.toml").write_text(f"[devices.p]\nkind = 'android'\noptions = {{ serial = '{SERIAL}' }}\n")
    assert list(find_patients(None, None).devices) == ["p"]
    adb.state = "unauthorized"
    assert find_patients(None, None) == find_patients("p", None)  # its own rows say what is wrong


@pytest.mark.parametrize(
    ("state", "words"), [("unauthorized", "accept this computer's key"), ("offline", "plug it in")]
)
@pytest.mark.parametrize("selection", [None, "farm"])
def test_a_phone_that_adb_cannot_use_is_told(
    adb: FakeAdb, selection: str | None, state: str, words: str
) -> None:
    adb.state = state
    (row,) = find_patients(selection, None).amiss
    assert (row.where, row.finding.state, row.finding.found) == (SERIAL, "fix", state)
    assert words in row.finding.do


def test_without_an_adb_server_there_is_only_this_host() -> None:
    assert find_patients(None, None) == Patients({"host": DeviceEntry()}, DEFAULT)


@pytest.mark.parametrize(
    ("farm", "selection", "words"),
    [("[devices.x", None, "is not an inventory"), ("[devices.x]", "y", "sought device or pool 'y'")],
)
def test_what_cannot_be_read_is_a_row_and_not_the_end(farm: str, selection: str, words: str) -> None:
    Path("farm.toml").write_text(farm)
    (row,) = find_patients(selection, None).amiss
    assert row.finding.state == "fix"
    assert words in row.finding.found


# -- what these devices need --------------------------------------------------------------


@pytest.mark.usefixtures("all_well")
@pytest.mark.parametrize(
    ("entry", "needed"),
    [
        (DeviceEntry(), set()),
        (VIRTUAL, {"bundle x86_64", "virtual phones", "parts x86_64"}),
        (PHONE, {"adb", "bundle arm64-v8a"}),
    ],
)
def test_only_what_the_devices_need_has_to_be_fixed(
    entry: DeviceEntry, needed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ill(what: str) -> Finding:
        return Finding(what, "fix", "is ill", "heal it")

    monkeypatch.setattr(doctor, "diagnose_adb", lambda server, within: (ill("adb"),))
    monkeypatch.setattr(doctor, "ready", lambda abi, cache, ask, within: ill(f"bundle {abi}"))
    monkeypatch.setattr("device_agents.virtual.possible.namespaces", lambda within: ill("virtual phones"))
    monkeypatch.setattr(
        "device_agents.virtual.possible.parts", lambda abi, cache, ask, within: ill(f"parts {abi}")
    )
    rows = diagnose(Patients({"x": entry}, Inventory()), None, tmp_path, quiet)
    by_state = {
        state: {r.finding.what for r in rows if r.finding.state == state} for state in ("fix", "note")
    }
    assert by_state["fix"] == needed
    assert len(by_state["fix"] | by_state["note"]) == 6


@pytest.mark.usefixtures("all_well")
def test_what_fails_in_one_place_keeps_no_other_from_being_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(server: object, within: Deadline) -> Iterable[Finding]:
        raise AdbFailure("broken")

    monkeypatch.setattr(doctor, "diagnose_adb", fails)
    rows = diagnose(Patients({"p": PHONE, "host": DeviceEntry()}, Inventory()), None, tmp_path, quiet)
    assert [(row.where, row.finding.found) for row in rows if row.finding != WELL] == [("adb", "broken")]
    assert [row.where for row in rows][-2:] == ["p", "host"]


def test_a_device_elsewhere_needs_the_cluster(tmp_path: Path) -> None:
    (finding,) = doctor._asked_here("p", DeviceEntry("android", lab="rack1"), BlobStore(tmp_path))
    assert (finding.state, "--farm-address" in finding.do) == ("fix", True)


@pytest.mark.usefixtures("all_well")
def test_what_is_no_cluster_is_not_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        this_machine, "ray_starts", lambda address, within: (Finding("starts", "fix", f"hangs at {address}"),)
    )
    monkeypatch.setattr("harness.farm.Farm.__enter__", lambda self: pytest.fail("it was joined"))
    patients = Patients({"p": DeviceEntry("android", lab="rack1")}, Inventory())
    rows = diagnose(patients, "192.0.2.1:1", tmp_path, quiet)
    assert {row.where: row.finding.found for row in rows if row.finding.state == "fix"} == {
        "Ray": "hangs at 192.0.2.1:1",
        "p": "not asked: no Ray at 192.0.2.1:1",
    }


@pytest.mark.usefixtures("all_well")
def test_a_virtual_phone_of_no_abi_is_left_to_say_so(tmp_path: Path) -> None:
    entry = DeviceEntry("android", options={"virtual": "true", "abi": "mips"})
    assert Patients({"p": entry}, Inventory()).virtual == set()


def test_of_options_that_make_no_sense_the_device_itself_tells(tmp_path: Path) -> None:
    entry = DeviceEntry("android", options={"virtual": "maybe"})
    store = BlobStore(tmp_path)
    (finding,) = doctor._looked(lambda within: doctor._asked_here("p", entry, store), True)
    assert (finding.state, "make no sense" in finding.found) == ("fix", True)


# -- this machine -------------------------------------------------------------------------


def by_what(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_this_machine_has_room(tmp_path: Path) -> None:
    found = by_what(this_machine.host(tmp_path / ".kvfarm"))
    assert {what: f.state for what, f in found.items()}.keys() == {"versions", "space", "memory", "lease"}
    assert found["lease"].state == "ok"


@pytest.mark.parametrize(("free", "state"), [(1 << 30, "fix"), (5 << 30, "note"), (50 << 30, "ok")])
def test_too_little_room(free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert by_what(this_machine.host(tmp_path))["space"].state == state


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = by_what(this_machine.host(tmp_path / "file" / ".kvfarm"))["space"]
    assert (found.state, "Not a directory" in found.found) == ("fix", True)


def test_a_run_that_has_the_devices_of_this_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    with (tmp_path / "lab" / "agent.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert by_what(this_machine.host(tmp_path))["lease"].state == "note"
    assert by_what(this_machine.host(tmp_path))["lease"].state == "ok"


def fake_process(proc: Path, pid: int, command: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes(command.replace(" ", "\0").encode())


def test_what_killed_runs_left_is_told(tmp_path: Path) -> None:
    proc, temporary = tmp_path / "proc", tmp_path / "tmp"
    fake_process(proc, 10, "pytest --devices=farm")
    fake_process(proc, 11, "raylet --dir=/tmp/kvfarm-ray-10-abc/session")
    (temporary / "kvfarm-ray-10-abc").mkdir(parents=True)
    assert this_machine.orphans(proc) == set()
    assert this_machine.abandoned_folders(proc, temporary) == []
    fake_process(proc, 12, "raylet --dir=/tmp/kvfarm-ray-99-abc/session")
    fake_process(proc, 13, "gcs_server --dir=/tmp/kvfarm-ray-99-abc/session")
    abandoned = temporary / "kvfarm-ray-99-abc"
    abandoned.mkdir()
    assert this_machine.orphans(proc) == {12, 13}
    assert this_machine.abandoned_folders(proc, temporary) == [abandoned]
    assert this_machine._leftovers({13, 12}, [abandoned]).do == "kill 12 13"
    assert [this_machine._leftovers(set(), folders).state for folders in ([abandoned], [])] == ["note", "ok"]


def test_a_process_that_a_killed_run_left_stands_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, whose command line names a folder of a run that is gone."""
    monkeypatch.setattr(this_machine, "_try", lambda *_: WELL)
    nobody = 1 << 30  # beyond every pid_max: one that has just ended may be another's already
    waits = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", waits, f"--dir=/tmp/kvfarm-ray-{nobody}-abc/session"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        left.stdout.readline()  # just after fork() and exec() its command line may still be empty
        row = by_what(this_machine.ray_starts(None, Deadline(5)))["leftovers"]
        assert row.state == "fix"
        assert str(left.pid) in row.found.split()
        assert row.do.startswith("kill ")
        left.communicate()
    ended = by_what(this_machine.ray_starts(None, Deadline(5)))["leftovers"]
    assert str(left.pid) not in ended.found.split()


def test_what_ends_meanwhile_was_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{1, 2}, {2, 3}])
    monkeypatch.setattr(this_machine, "orphans", lambda: next(answers))
    monkeypatch.setattr(this_machine, "_try", lambda *_: WELL)
    assert by_what(this_machine.ray_starts(None, Deadline(5)))["leftovers"].do == "kill 2"


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert [f.state for f in this_machine._shared_memory()] == ["note"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert list(this_machine._shared_memory()) == []


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Of torch and Ray: a module that does this when it is imported."""

    def put(code: str) -> None:
        for name in ("torch", "ray"):
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


@pytest.mark.parametrize(
    "look", [this_machine.reference, lambda within: this_machine.ray_starts(None, within)]
)
@pytest.mark.parametrize(
    ("code", "found", "do"),
    [
        ("raise ModuleNotFoundError(\"No module named 'x'\")", "No module named 'x'", "pip install"),
        ("raise OSError('libx.so: cannot open')", "libx.so: cannot open", "see the message"),
        ("import os; os._exit(3)", "exit code 3", "see the message"),
        ("import time; time.sleep(60)", "hangs: killed after", "ask again"),
    ],
)
def test_a_library_that_is_missing_broken_or_hangs(
    instead: Callable[[str], None],
    look: Callable[[Deadline], Iterable[Finding]],
    code: str,
    found: str,
    do: str,
) -> None:
    instead(code)
    finding, *_ = look(Deadline(1.5 if "sleep" in code else 20))
    assert finding.state == "fix"
    assert found in finding.found
    assert do in finding.do


def test_a_cluster_that_does_not_answer() -> None:
    finding, *_ = this_machine.ray_starts("127.0.0.1:1", Deadline(60))
    assert finding.state == "fix"
    assert finding.found.startswith("could not join the Ray cluster at 127.0.0.1:1: nothing answers there")


# -- the command --------------------------------------------------------------------------


@pytest.mark.usefixtures("all_well")
def test_well_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["well"] is True
    assert said["findings"][-1] == {
        "where": "host",
        "what": "something",
        "state": "ok",
        "found": "is well",
        "do": "",
    }


@pytest.mark.usefixtures("all_well")
def test_something_to_fix_is_exit_code_1_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ill = Finding("thing", "fix", "sought [bold]a[/bold] at [::1]:5", "heal it by " + "q" * 200)
    monkeypatch.setattr(this_machine, "reference", lambda within: (ill,))
    assert cli.run(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "sought [bold]a[/bold] at [::1]:5" in said
    assert said.count("q") == 200
    assert said.endswith("1 to fix\n")
    assert cli.run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["well"] is False


@pytest.mark.usefixtures("all_well")
def test_a_note_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        this_machine, "reference", lambda within: (Finding("thing", "note", "odd", "know it"),)
    )
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("nothing to fix; 1 to know\n")


def test_no_part_of_it_needs_ray_or_torch_to_be_installed() -> None:
    code = "import sys, harness.cli, harness.doctor; sys.exit(bool({'ray', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
