"""Write docs/cli.md from the commands themselves: ``make docs``. A test holds that it is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "synth",
    "export",
    "memory",
    "generate",
    "doctor",
    "devices",
    "lease",
    "quarantine",
    "lift",
    "audit",
    "dash",
    "timeline",
    "connect",
    "pair",
    "run",
    "report",
    "history",
    "tag",
    "export-results",
    "ablate",
    "replay",
    "mutants",
    "bundle",
    "gate",
    "calibrate",
    "nightly",
    "phones up",
    "phones profiles",
)
TARGET = Path(__file__).with_name("cli.md")


def render() -> str:
    """The page: --help of kvfarm and of each command, at 100 columns."""
    parts = ["# The kvfarm command\n\nMade by `make docs`; do not edit.\n"]
    for command in ("", *COMMANDS):
        title = f"kvfarm {command}".strip()
        parts.append(f"## {title}\n\n```\n{_help(command)}\n```\n")
    return "\n".join(parts)


def _help(command: str) -> str:
    arguments = [*command.split(), "--help"]
    done = subprocess.run(
        [sys.executable, "-c", f"from harness.cli import run; raise SystemExit(run({arguments!r}))"],
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


if __name__ == "__main__":
    TARGET.write_text(render())
