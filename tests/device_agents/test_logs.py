"""A log line is one JSON object with the ids it is about, and holds no secret, wherever it came from."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device_agents import logs
from device_agents.leases.model import Request
from device_agents.logs import about, keep_secret
from device_agents.printable import printable

_log = logging.getLogger("harness.test")


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv(logs.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(logs, "_process", {})  # of a run that was in this process before
    file = tmp_path / "log.jsonl"
    logs.set_up(file)
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    monkeypatch.delenv(logs.FILE_VARIABLE)
    logs.set_up(terminal=False)
    for name in logs.OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_a_record_says_which_run_device_and_lease_it_is_about(lines: Any) -> None:
    with about(run="r1", device="pixel8"):
        with about(lease=17):
            _log.info("deployed %s", "it")
        _log.info("given back")
    _log.info("idle")
    ids = [tuple(line[name] for name in logs.IDS) for line in lines()]
    assert ids == [("r1", "pixel8", "17"), ("r1", "pixel8", ""), ("", "", "")]
    assert lines()[0]["message"] == "deployed it"
    assert lines()[0]["level"] == "INFO"


SECRETS = (
    ("postgresql+psycopg://kv:hunter2@db/x", "hunter2"),
    ("could not connect to postgresql://kv:p@ss:word@db/x", "p@ss:word"),
    ("password='hunter2' host=db", "hunter2"),
    ('{"token": "eyJhbGciOi"}', "eyJhbGciOi"),
    ("RAY_AUTH_TOKEN=0f3c9a77", "0f3c9a77"),
    ("Authorization: Bearer abc.def-123", "abc.def-123"),
    ("pairing code: 482913", "482913"),
)


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_what_looks_like_a_secret_is_taken_out(lines: Any, text: str, secret: str) -> None:
    _log.warning("failed: %s", text)
    (line,) = lines()
    assert secret not in json.dumps(line)
    assert "***" in line["message"]


def test_a_secret_that_was_told_is_taken_out_of_messages_and_tracebacks(
    lines: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_secrets", set())
    keep_secret("482913")
    try:
        raise ValueError("adb said: no device takes 482913")
    except ValueError:
        _log.exception("pairing with %s", "482913")
    written = json.dumps(lines()) + capsys.readouterr().err
    assert "ValueError: adb said: no device takes ***" in written
    assert "482913" not in written


def test_what_is_no_secret_stays(lines: Any) -> None:
    _log.warning("token 17 of postgresql://db/x is not the current one; 3 tokens: 5")
    assert lines()[0]["message"] == "token 17 of postgresql://db/x is not the current one; 3 tokens: 5"


def test_a_device_cannot_forge_a_line_or_command_a_terminal(
    lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _log.warning("%s", 'ok\n{"level": "INFO", "message": "forged"}\x1b]0;owned\x07\u202e')
    assert len(lines()) == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\\x1b]0;owned\\x07\\u202e" in said


def test_a_long_message_is_cut_and_says_so(lines: Any) -> None:
    _log.warning("x" * 1_000_000)
    assert len(json.dumps(lines())) < 5000
    assert lines()[0]["message"].endswith("characters more)")


def test_processes_that_share_a_file_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    """Those that a process starts log to its file, without being told."""
    code = (
        "from device_agents import logs; import logging; logs.set_up(terminal=False)\n"
        "for _ in range(200): logging.getLogger('harness').info('y' * 3000)"
    )
    file = tmp_path / "log.jsonl"
    children = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, logs.FILE_VARIABLE: str(file)})
        for _ in range(3)
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 600
    assert {line["pid"] for line in found} == {child.pid for child in children}


def test_only_what_commands_a_terminal_is_replaced() -> None:
    assert printable("Pixel 8 – 日本\n\tα\x1b[2J\x9b31m\r") == "Pixel 8 – 日本\n\tα\\x1b[2J\\x9b31m\\r"


def test_what_an_agent_does_is_about_the_lease_and_its_run(lines: Any, tmp_path: Path) -> None:
    from device_agents.config import DeviceConfig
    from device_agents.lab_agent import LabAgent

    agent = LabAgent(tmp_path / "lab", [DeviceConfig("host")], reap_every_s=None)
    try:
        (lease,) = agent.ask(Request("1", "ann", "ann", ("host",), run="r7"), wait=False).granted
        agent.claim("host", lease.token)
        agent.release("host", lease.token)
    finally:
        agent.shutdown()
    ours = [(x["message"], x["run"], x["device"], x["lease"]) for x in lines()]
    about_it = ("r7", "host", str(lease.token))
    assert ours == [("claimed", *about_it), ("free again: given back", *about_it)]
