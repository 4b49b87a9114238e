"""The commands that need devices, on this host: kvfarm devices, replay and run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.cases import Case
from harness.cluster import ensure_ray
from harness.synth import synth
from kvengine.program import Decode, Generate, Prefill, Program, Reset

PROGRAM = Program(40, (Prefill((1, 2, 3), chunk=2), Decode((4,)), Generate(5, 3), Prefill((6,) * 40)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("tiny-gemma3", tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """So that not every command starts its own."""
    with ensure_ray():
        yield


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def kvfarm(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON object that is all of stdout."""
    capfd.readouterr()
    command, *rest = map(str, arguments)
    code = cli.run([command, "--json", *rest])
    said = json.loads(capfd.readouterr().out)
    assert isinstance(said, dict)
    return code, said


@pytest.mark.usefixtures("one_ray")
def test_devices_lists_this_host(capfd: pytest.CaptureFixture[str]) -> None:
    code, said = kvfarm(capfd, "devices")
    assert code == 0
    (device,) = said["devices"]
    assert (device["name"], device["kind"], device["leased_to"]) == ("host", "host", None)
    assert "CPUExecutionProvider" in device["identity"]["providers"]


@pytest.mark.usefixtures("one_ray")
def test_devices_says_which_device_does_not_answer(capfd: pytest.CaptureFixture[str]) -> None:
    Path("farm.toml").write_text("[devices.host]\n[devices.pixel8]\nkind = 'android'\nlab = 'rack1'\n")
    code, said = kvfarm(capfd, "devices")
    assert code == 2
    assert "at lab 'rack1'; there are: none" in said["error"]["message"]


@pytest.mark.usefixtures("one_ray")
def test_replay_agrees_with_the_reference(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    Path("program.json").write_text(PROGRAM.to_json())
    options = ("--model", checkpoint, "--recipe", "hybrid,threads=1")
    code, said = kvfarm(capfd, "replay", "program.json", *options)
    assert (code, said["passed"]) == (0, True)
    assert "names no check" in said["note"]
    assert 0 < said["error"] < 1e-4
    (ran,) = said["programs"]
    assert [o["position"] for o in ran["operations"]] == [3, 4, 7, 7]
    assert ran["operations"][3]["refusal"]["type"] == "ContextOverflow"


@pytest.mark.usefixtures("one_ray")
def test_replay_shows_where_the_device_leaves_the_reference(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference of other weights stands for an engine that is wrong.
    other = synth("tiny-gemma3", Path("other"), seed=1)
    monkeypatch.setattr("harness.opened.begin_reference", _swapped(other))
    code, said = kvfarm(capfd, "replay", PROGRAM.to_json(), "--model", checkpoint)
    assert (code, said["passed"]) == (1, False)
    assert "operation 0" in said["message"]
    assert said["divergence"]["row"] == 0


@pytest.mark.usefixtures("one_ray")
def test_replay_asks_the_check_that_failed_on_another_device(
    capfd: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    """With no more than the file: what it is of stands in it."""
    past, future = Program(8, (Prefill((1, 2)), Reset(), Prefill((3, 4)))), Program(8, (Prefill((3, 4)),))
    drawn = [json.loads(each.to_json()) for each in (past, future)]
    case = Case("test_p09_the_dead_never_matter", drawn, 7, 25, "static,threads=1", str(checkpoint))
    Path("failed.json").write_text(case.to_json())
    code, said = kvfarm(capfd, "replay", "failed.json", "--devices", "host")
    assert (code, said["passed"], said["check"]) == (0, True, case.check)
    assert (said["device"], said["recipe"]) == ("host", "static,threads=1")
    assert said["title"].startswith("P9: ")
    assert [len(each["operations"]) for each in said["programs"]] == [3, 1]


def _swapped(other: Path) -> Any:
    from harness.reference import begin_reference

    return lambda checkpoint, *rest, **named: begin_reference(other, *rest, **named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.json",), "nowhere.json: No such file"),
        (('{"capacity": 40}',), "needs 'operations'"),
        (('{"check": "test_p09"}',), "Case needs 'drawn'"),
        ((PROGRAM.to_json(), "--devices", "pixel8"), "'pixel8'; there are host"),
        ((PROGRAM.to_json(), "--recipe", "hybird"), "'hybird'"),
    ],
)
def test_replay_refuses_what_it_cannot_run(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, said = kvfarm(capfd, "replay", *arguments, "--model", checkpoint)
    assert code == 2
    assert message in said["error"]["message"]


def test_run_checks_measures_and_reports(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    options = ("--examples=2", "--prompt=8", "--new-tokens=4", "--repeats=1")
    code, said = kvfarm(
        capfd, "run", "--model", checkpoint, "--recipes", "hybrid", "--report", "out", "--", *options
    )
    assert {file.name for file in Path("out").iterdir()} >= {"index.html", "results.json", "junit.xml"}
    assert (code, said["ok"]) == (0, True), said
    assert said["state"] == "passed"
    assert said["counts"]["passed"] == said["counts"]["planned_checks"] > 0
    assert said["counts"]["measured"] == said["counts"]["planned_legs"] > 0
    listed = kvfarm(capfd, "report", "--list")[1]["runs"]
    assert [run["run_id"] for run in listed] == [said["run_id"]]
