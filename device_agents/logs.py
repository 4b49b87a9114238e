"""Logs of harness and agents: one JSON object a line, with the run, device and lease it is about; no secrets.

Set up once a process by ``set_up``. What is known around a piece of work is said once, by ``about``::

    with about(run=run_id, device="pixel8", lease=17):
        _log.info("deployed")
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from device_agents.printable import printable

FILE_VARIABLE = "KVFARM_LOG_FILE"  # for the processes that a process starts
OURS = ("kvengine", "device_agents", "harness")
IDS = ("run", "device", "lease")
_LONGEST = 4000  # characters of a message; of what a traceback says, twice as many
_SHORTEST_SECRET = 4  # to replace less would hide much that is none

_process: dict[str, str] = {}
_about: ContextVar[dict[str, str]] = ContextVar("kvfarm_about", default={})  # noqa: B039  never changed in place
_secrets: set[str] = set()


def always_about(**ids: str) -> None:
    """All that this process logs from now on is about these; what ``about`` says goes before it."""
    _process.update(ids)


@contextmanager
def about(**ids: str | int) -> Iterator[None]:
    """What is logged in the body is about these: some of IDS; "" for not known."""
    token = _about.set({**_about.get(), **{name: str(each) for name, each in ids.items() if each != ""}})
    try:
        yield
    finally:
        _about.reset(token)


def keep_secret(secret: str) -> None:
    """Never to be in a log of this process, wherever it comes from: a password, a token, a pairing code."""
    if len(secret) >= _SHORTEST_SECRET:
        _secrets.add(secret)


class Redacted(logging.Filter):
    """Takes secrets out of a record: those that were told, and what looks like one by the words before it.

    It goes to every handler that ``set_up`` makes, and is the only place where this happens.
    """

    _PATTERNS = (
        # A URL's password, as SQLAlchemy and libpq take it.
        (re.compile(r"(://[^:/@\s]*:)[^\s]*@"), r"\1***@"),
        (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), r"\1 ***"),
        (
            re.compile(
                r"(?i)(\b[\w-]*(?:password|passwd|secret|token|api[_-]?key|pairing[ _-]?code|authorization)"
                r"[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;\"']+)"
            ),
            r"\1***",
        ),
    )

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.clean(_message(record)), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self.clean(record.exc_text)
        if record.stack_info:
            record.stack_info = self.clean(record.stack_info)
        return True

    @classmethod
    def clean(cls, text: str) -> str:
        # The longest first: one may be a part of another.
        for secret in sorted(_secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        for pattern, instead in cls._PATTERNS:
            text = pattern.sub(instead, text)
        return text


class JsonLines(logging.Formatter):
    """One object: at (UTC, ISO 8601), level, logger, message, pid, and run, device, lease ("" if of none)."""

    def format(self, record: logging.LogRecord) -> str:
        known = _process | _about.get()
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _cut(_message(record), _LONGEST),
            **{name: known.get(name, "") for name in IDS},
            "pid": record.process,
        }
        if record.exc_text:
            line["traceback"] = _cut(record.exc_text, 2 * _LONGEST)
        return json.dumps(line)  # ASCII: what a device says is escaped


class ForPeople(logging.Formatter):
    """A short line for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"kvfarm: {record.levelname.lower()}: {_message(record)}"
        return printable(f"{text}\n{record.exc_text}" if record.exc_text else text)


def set_up(file: Path | None = None, *, terminal: bool = True) -> None:
    """Log to ``file``, and warnings to stderr. Several processes may append to one, logrotate may move it.

    file: None: what FILE_VARIABLE names, which is set for the processes that this one starts. A second call
    replaces what the first one set up.

    Raises:
        OSError: the file cannot be opened.
    """
    named = str(file.absolute()) if file is not None else os.environ.get(FILE_VARIABLE, "")
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Ours)]:
        root.removeHandler(handler)
        handler.close()
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        keep_secret(token)
    if terminal:
        shown = _Terminal()
        shown.setLevel(logging.WARNING)
        shown.setFormatter(ForPeople())
        shown.addFilter(Redacted())
        root.addHandler(shown)
    if named:
        lines = _File(named, encoding="utf-8")
        lines.setFormatter(JsonLines())
        lines.addFilter(Redacted())
        root.addHandler(lines)
        os.environ[FILE_VARIABLE] = named
        for name in OURS:
            logging.getLogger(name).setLevel(logging.INFO)


class _Ours:
    """A handler that ``set_up`` made."""


class _File(_Ours, logging.handlers.WatchedFileHandler):
    pass


class _Terminal(_Ours, logging.Handler):
    """Whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError) as error:  # a mistake of whoever logged it must not stop the work
        return f"{record.msg} ({error})"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} characters more)"
