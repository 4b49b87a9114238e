"""The client of a round: pytest with kvfarm's plugin, forked from a process that has imported it all."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine

from device_agents.virtual.namespaces import die_with_parent
from harness import farm, opened, run
from harness.lab import Node
from harness.recovery import Recovery, RecoveryPolicy
from harness.store import engine, spool, sql
from harness.store.protocol import Span
from tests.chaos.lab import ChaosLab
from tests.harness.fake_farm import FakeReference

GOOD = "good.jsonl"  # a line for each result that the store has taken
FULL = "store-is-full"  # while this file is there, SQLite finds no room

Point = Literal["before the store", "after the store", "before the end"]
"""Where a client kills itself: with a result in its hands; before the agent hears of it; with all stored."""


@dataclass(frozen=True)
class Plan:
    """What this client does to itself. after: so many results. jump_s: of its wall clock then."""

    die: Point | None = None
    after: int = 0
    jump_s: float = 0.0


# What pytest and the store import when they begin, and each client would for itself.
_IMPORTED = (
    *(
        "anyio.pytest_plugin",
        "harness.parallel",
        "harness.plugin",
        "harness.run_plugin",
        "harness.termination",
    ),
    *("harness.store.migrations.steps", "kvengine.export.reads", "numpy.ma", "numpy.random", "tokenizers"),
    *("alembic.command", "alembic.config", "sqlalchemy.ext.compiler", "xdist.looponfail", "xdist.plugin"),
)


def prepare_to_fork() -> None:
    """What is forked from now on has the modules, and pytest, which collects garbage three times a run, does
    not go through them: that is two thirds of the CPU time of a client."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def start(folder: Path, arguments: Sequence[str], plan: Plan | None = None) -> int:
    """Its PID."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        die_with_parent()
        os.setsid()
        enter(folder)
        log = os.open("client.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        _prepare(plan or Plan())
        code = int(pytest.main(list(arguments)))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def enter(folder: Path) -> None:
    """This process is of the round in ``folder`` from now on."""
    os.chdir(folder)
    os.environ.update(json.loads((folder / "environment.json").read_text()))


class _Ray:
    """What Farm wants to know of Ray."""

    joined = shared = False
    address = "none"

    def check_alive(self) -> None:
        pass

    def close(self) -> None:
        pass


def replaced(module: object, name: str, value: object) -> Any:
    """Put ``value`` in the place of what the module has by that name; returns that."""
    before = getattr(module, name)
    setattr(module, name, value)
    return before


def _prepare(plan: Plan) -> None:
    replaced(farm, "ensure_ray", lambda address=None: _Ray())
    replaced(farm, "here", lambda: Node("chaos", "127.0.0.1"))
    replaced(farm, "Lab", ChaosLab)
    replaced(opened, "begin_reference", lambda checkpoint: FakeReference)
    replaced(engine, "BUSY_TIMEOUT_S", 0.2)
    replaced(engine, "RECONNECT_S", 0.2)
    replaced(spool, "_RETRY_S", 0.05)
    replaced(run, "Recovery", _hasty_recovery)
    event.listen(Engine, "begin", _refuse_to_grow_when_full)
    _note_results(plan)


def _hasty_recovery(
    probe: Callable[[str], object], policy: RecoveryPolicy, *rest: Any, **named: Any
) -> Recovery:
    return Recovery(probe, replace(policy, pause_s=0.05), *rest, **named)


def _refuse_to_grow_when_full(connection: Connection) -> None:
    """SQLite itself says "database or disk is full": it may not have one page more than it has."""
    raw: Any = connection.connection.driver_connection
    if isinstance(raw, sqlite3.Connection):
        (pages,) = raw.execute("PRAGMA page_count").fetchone()
        raw.execute(f"PRAGMA max_page_count = {pages if Path(FULL).exists() else 1 << 30}")


def _note_results(plan: Plan) -> None:
    """A line a result, and death or another time at the plan's point."""
    results = [0]

    def around(keep: Callable[..., None]) -> Callable[..., None]:
        def kept(self: Any, run_id: str, result: Any, span: Span | None = None) -> None:
            results[0] += 1
            now = results[0] >= plan.after
            if now and plan.jump_s:
                _jump(plan.jump_s)
            if now and plan.die == "before the store":
                os.kill(os.getpid(), signal.SIGKILL)
            keep(self, run_id, result, span)
            with Path(GOOD).open("a") as file:
                file.write(json.dumps({"at": time.monotonic(), "key": getattr(result, "key", "")}) + "\n")
            if now and plan.die == "after the store":
                os.kill(os.getpid(), signal.SIGKILL)

        return kept

    for name in ("add_check", "add_leg"):
        replaced(sql.SqlStore, name, around(getattr(sql.SqlStore, name)))
    if plan.die == "before the end":
        replaced(sql.SqlStore, "finish_run", lambda *_: os.kill(os.getpid(), signal.SIGKILL))


_true_time = time.time


def _jump(seconds: float) -> None:
    """The client's wall clock from now on, as Python tells it; monotonic clocks do not jump."""
    replaced(time, "time", lambda: _true_time() + seconds)
    later = timedelta(seconds=seconds)
    replaced(run, "now", lambda: (datetime.now(UTC) + later).isoformat(timespec="seconds"))
