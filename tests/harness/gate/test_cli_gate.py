"""What ``kvfarm gate`` and ``calibrate`` refuse before anything is started: exit code 2 and one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import cli

PAIR = ("--baseline", "static", "--candidate", "hybrid")


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run([arguments[0], "--json", *arguments[1:]]) == 2
    said = json.loads(capfd.readouterr().out)
    message = said["error"]["message"]
    assert isinstance(message, str)
    return message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("gate", "--baseline", "static"), "Missing option '--candidate'"),
        (("gate", *PAIR), "say of which checkpoint: --model FOLDER"),
        (("gate", "--baseline", "nonsense", "--candidate", "hybrid"), "no stored run or tag, no recipe"),
        (("gate", *PAIR, "--blocks", "5"), "the first look is at 8 blocks"),
        (("gate", *PAIR, "--settings", "none.toml"), "sought gate settings at none.toml"),
        (("gate", *PAIR, "--waivers", "none.toml"), "sought waivers at none.toml"),
        (("gate", *PAIR, "--devices", "toaster"), "toaster"),
        (("calibrate", "--baseline", "static", "--inject", "a bit"), "sought shares like 0.03,0.05"),
        (("calibrate", "--baseline", "static", "--inject", "5"), "5 % is 0.05"),
        (("calibrate", "--baseline", "static", "--inject", "0.05,0.05"), "sought different shares"),
    ],
)
def test_a_mistake_is_one_line(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert told in refused(capfd, *arguments)


@pytest.mark.parametrize(
    ("file", "told"), [("gate.toml", "gate.toml is no"), ("waivers.toml", "waivers.toml is no")]
)
def test_files_lying_about_are_read(capfd: pytest.CaptureFixture[str], file: str, told: str) -> None:
    Path(file).write_text("this = is = not toml")
    assert told in refused(capfd, "gate", *PAIR)
