"""What happens to a run: each fault is a round's whole story, told to a world."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

from tests.chaos import lab
from tests.chaos.client import FULL, Plan, Point
from tests.chaos.world import Client, Jobs, World

USUAL, FEW = Jobs(), Jobs(checks=2, legs=1)
REAL_RUNNERS = Jobs(("runner-1",), checks=3, legs=1)
A_DAY_S = 86400.0


class Postgres(Protocol):
    """The server that some rounds keep their results in."""

    def new_database(self) -> str: ...

    def away(self, url: str) -> None: ...

    def back(self, url: str) -> None: ...


@dataclass(frozen=True)
class Round:
    """What a fault is told: where it is to strike, with which chances. run_s: strikes fall within, for a run
    that nothing happens to takes a little longer here."""

    world: World
    draw: random.Random
    run_s: float
    postgres: Postgres | None


@dataclass(frozen=True)
class Fault:
    """tell: the story, up to a point from which all runs are gone on with. wasted: measurements that each
    strike may have cut off between the device's answer and the disk. retries: whether a report may say that
    something was tried again. environment: of the round's processes. share: of all rounds. kept: results that
    are stored may stay at the agent, for the client had died, or the store took them when the run's devices
    were free."""

    name: str
    tell: Callable[[Round], None]
    jobs: Jobs = USUAL
    wasted: int = 0
    retries: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    share: float = 1.0
    postgres: bool = False
    kept: bool = False


def _client_killed(it: Round) -> None:
    """Once to three times, whenever."""
    who = it.world.client(USUAL)
    who.start()
    for _ in range(it.draw.choice((1, 1, 2, 3))):
        it.world.pass_time(who, it.draw.uniform(0.0, it.run_s))
        if not who.ended():
            who.kill()
            it.world.strike()
            it.world.until(who.ended, "the killed client's end")
            who.resume()


def _dies_at(point: Point) -> Callable[[Round], None]:
    def tell(it: Round) -> None:
        who = it.world.client(USUAL)
        who.start(Plan(die=point, after=it.draw.randrange(1, 12)))
        it.world.until(who.ended, "the client's end")

    return tell


def _agent_killed(it: Round) -> None:
    who = it.world.client(USUAL)
    who.start()
    for _ in range(it.draw.choice((1, 2))):
        it.world.pass_time(who, it.draw.uniform(0.2, it.run_s / 2))
        if not who.ended() and (pid := it.world.agent(who)) is not None:
            os.kill(pid, signal.SIGKILL)
            it.world.strike()


def _agent_dies_before_it_answers(it: Round) -> None:
    """With the result on its disk: it is not measured again."""
    fuse = Path(it.world.environment[lab.KILL_AFTER].format(folder=it.world.folder))
    who = it.world.client(USUAL)
    who.start()
    it.world.pass_time(who, it.draw.uniform(0.0, it.run_s / 2))
    fuse.touch()
    it.world.strike()


def _both_killed(it: Round) -> None:
    """The machine, but for its disk."""
    who = it.world.client(USUAL)
    who.start()
    it.world.pass_time(who, it.draw.uniform(0.2, it.run_s))
    agent = it.world.agent(who)
    if not who.ended():
        who.kill()
    if agent is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, signal.SIGKILL)
    it.world.strike()


def _runner_killed(it: Round) -> None:
    who = it.world.client(REAL_RUNNERS)
    who.start()
    it.world.until(lambda: bool(_runners(it.world, who)) or who.ended(), "a runner")
    it.world.pass_time(who, it.draw.uniform(0.0, 1.0))
    for runner in _runners(it.world, who)[:1]:
        with contextlib.suppress(psutil.Error):
            runner.kill()
            it.world.strike()


def _runners(world: World, who: Client) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        if (pid := world.agent(who)) is not None:
            return [
                each for each in psutil.Process(pid).children() if "fake_runner" in " ".join(each.cmdline())
            ]
    return []


def _sqlite_locked(it: Round) -> None:
    """Another process writes and does not end, for longer than the store waits."""
    who = it.world.client(USUAL)
    who.start()
    path = who.folder / "results.db"
    it.world.until(lambda: bool(who.good()) or who.ended(), "a first result")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        it.world.strike()
        time.sleep(it.draw.uniform(0.3, 1.0))
        other.rollback()


def _sqlite_full(it: Round) -> None:
    who = it.world.client(USUAL)
    who.start()
    it.world.until(lambda: bool(who.good()) or who.ended(), "a first result")
    (who.folder / FULL).touch()
    it.world.strike()
    it.world.pass_time(who, it.draw.uniform(0.3, 1.0))
    if it.draw.random() < 0.4 and not who.ended():  # and the client dies with results in its spool
        who.kill()
        it.world.strike()
        it.world.until(who.ended, "the killed client's end")
    (who.folder / FULL).unlink()


def _postgres_away(it: Round) -> None:
    """Its connections are ended and no new ones taken for a while: a server that is restarted."""
    assert it.postgres is not None
    url = it.postgres.new_database()
    who = it.world.client(USUAL, url)
    who.start()
    it.world.until(lambda: bool(who.good()) or who.ended(), "a first result")
    it.postgres.away(url)
    it.world.strike()
    it.world.pass_time(who, it.draw.uniform(0.1, 1.0))
    if it.draw.random() < 0.4 and not who.ended():
        who.kill()
        it.world.strike()
        it.world.until(who.ended, "the killed client's end")
    it.postgres.back(url)


def _clock_jumps(it: Round) -> None:
    who = it.world.client(USUAL)
    seconds = it.draw.choice((-1, 1)) * A_DAY_S * it.draw.choice((1 / 24, 1, 365, 3650))
    who.start(Plan(after=it.draw.randrange(1, 8), jump_s=seconds))
    it.world.until(lambda: bool(who.good()) or who.ended(), "a first result")
    it.world.strike()


def _two_fight(it: Round) -> None:
    """Two runs of two users want the same devices at the same time; sometimes one of them is killed."""
    clients = [it.world.client(FEW) for _ in range(2)]
    for who in clients:
        who.start()
        time.sleep(it.draw.uniform(0.0, 0.2))
    it.world.strike()
    if it.draw.random() < 0.5:
        victim = it.draw.choice(clients)
        it.world.pass_time(victim, it.draw.uniform(0.1, 2 * it.run_s))
        if not victim.ended():
            victim.kill()
            it.world.strike()
            it.world.until(victim.ended, "the killed client's end")


def faults() -> tuple[Fault, ...]:
    outlives = (("CHAOS_AGENT_OUTLIVES", "1"),)
    kill = Fault("client killed, its lab agent with it", _client_killed, wasted=1, kept=True)
    at = Fault("", _client_killed, wasted=0, kept=True)
    fuse = ((lab.KILL_AFTER, "{folder}/fuse"),)
    return (
        kill,
        replace(kill, name="client killed, the agent lives on", environment=outlives, wasted=0),
        replace(at, name="client killed before it stored", tell=_dies_at("before the store")),
        replace(at, name="client killed before it acknowledged", tell=_dies_at("after the store")),
        replace(at, name="client killed before the run's end", tell=_dies_at("before the end"), share=0.5),
        Fault("lab agent killed", _agent_killed, wasted=1, retries=True, share=2),
        Fault(
            "agent killed before it answered", _agent_dies_before_it_answers, retries=True, environment=fuse
        ),
        Fault("client and agent killed", _both_killed, wasted=1, retries=True, kept=True),
        Fault("runner killed", _runner_killed, REAL_RUNNERS, wasted=1, retries=True, share=0.7),
        Fault("SQLite locked by another", _sqlite_locked, kept=True),
        Fault("SQLite's disk full", _sqlite_full, wasted=1, kept=True),
        Fault("PostgreSQL away", _postgres_away, wasted=1, postgres=True, kept=True),
        Fault("client's wall clock jumps", _clock_jumps),
        Fault(
            "two clients, one killed or none",
            _two_fight,
            FEW,
            wasted=1,
            share=2,
            kept=True,
        ),
    )
