"""What every command does the same: results to stdout, everything else to stderr, errors in one line."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.text import Text

from device_agents.errors import InfrastructureError
from device_agents.printable import printable
from harness.bars import Report as Report
from harness.bars import progress as progress
from harness.errors import HarnessError
from kvengine.codec import DecodeError, encode
from kvengine.errors import KvEngineError

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout, everything else on stderr.")
]
# Refusals: their message is for the user. Anything else is a bug and keeps its traceback.
EXPECTED = (KvEngineError, InfrastructureError, HarnessError, DecodeError)
REFUSED = 2


class Console(RichConsole):
    """Rich's; what a device, a model or a log says never commands the terminal (rich lets an ESC through)."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def show(as_json: bool, data: dict[str, Any], text: Any) -> None:
    """``data`` as JSON, or ``text`` (anything rich can print) for a person."""
    if as_json:
        sys.stdout.write(json.dumps(plain(data), allow_nan=False) + "\n")
    else:
        # A table is never folded for want of columns when the output goes to a file.
        width = None if sys.stdout.isatty() else 160
        Console(width=width, highlight=False, soft_wrap=True).print(text)


def told(text: str) -> str:
    """What others said, for a cell of a table: no markup, and nothing that a terminal would obey."""
    return escape(printable(text))


def note(message: str) -> None:
    """A line for the person who waits, to stderr."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(printable(message))


def fail(kind: str, message: str, as_json: bool) -> int:
    """Report a refusal; returns the exit code."""
    note(f"kvfarm: {message}")
    if as_json:
        sys.stdout.write(json.dumps({"error": {"type": kind, "message": message}}) + "\n")
    return REFUSED


def plain(value: Any) -> Any:
    """``value`` as JSON has it: dataclasses as objects, NaN and the infinities as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return plain(encode(value))
