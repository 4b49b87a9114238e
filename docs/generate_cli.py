"""Write docs/cli.md from the commands themselves: ``make docs``. A test holds that it is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
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
    "head",
    "join",
    "hosts",
    "drain",
    "undrain",
    "leave",
    "connect",
    "pair",
    "run",
    "resume",
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
    commands = ("", *COMMANDS)
    parts = ["# The kvfarm command\n\nMade by `make docs`; do not edit.\n"]
    for command, said in zip(commands, _helps(commands), strict=True):
        title = f"kvfarm {command}".strip()
        parts.append(f"## {title}\n\n```\n{said}\n```\n")
    return "\n".join(parts)


# In a process of its own: typer asks for the width and for colours when it is imported.
_SAY = """
import sys
from harness.cli import run
for command in sys.argv[1:]:
    run([*command.split(), "--help"])
    print("\\f", flush=True)
"""


def _helps(commands: Sequence[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SAY, *commands],
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    pages = done.stdout.split("\f")[:-1]
    return ["\n".join(line.rstrip() for line in page.strip().splitlines()) for page in pages]


if __name__ == "__main__":
    TARGET.write_text(render())
