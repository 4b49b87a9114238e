"""Many rounds, one after the other, spread over all faults by a seed; and what came of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from device_agents.bundle import build
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.virtual.rootfs import native_abi
from harness.provenance import now
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.export import export
from reports.results import RunResults
from tests import cluster_lab, postgres
from tests.chaos import client, lab
from tests.chaos.cuts import CUTS, Cut, CutLab, cut_lab
from tests.chaos.faults import Fault, Round, faults
from tests.chaos.real import REAL_FAULTS, CameReal, RealRun, strike_for_real
from tests.chaos.world import Jobs, World
from tests.soak.phones import mark_processes
from tests.soak.soak import run_soak
from tests.soak.table import table

Say = Callable[[str], None]
PHONES_S = 90.0
CUTS_S = (
    240.0  # a lab of namespaces alone takes most of a minute, and with less left few rounds would be done
)
LANES = 2


@dataclass(frozen=True)
class Came:
    """What came of one round. outcome: survived, retried, resumed or failed. seconds: to the next result."""

    fault: str
    number: int
    outcome: str
    seconds: float | None
    took_s: float
    wrong: tuple[str, ...] = ()


@dataclass
class Report:
    """All of a chaos. left_out: faults that could not be tried here, and why."""

    seed: int
    seconds: float = 0.0
    rounds: list[Came] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [f"{r.fault} ({r.number}): {w}" for r in self.rounds for w in r.wrong] + self.left

    def table(self) -> str:
        """A line a fault."""
        rows: list[tuple[str, ...]] = [
            ("fault", "rounds", "survived", "retried", "resumed", "median s to next result", "wrong")
        ]
        for name in dict.fromkeys(r.fault for r in self.rounds):
            mine = [r for r in self.rounds if r.fault == name]
            count = [str(sum(r.outcome == each for r in mine)) for each in ("survived", "retried", "resumed")]
            known = [r.seconds for r in mine if r.seconds is not None]
            median = f"{statistics.median(known):.2f}" if known else "-"
            rows.append((name, str(len(mine)), *count, median, str(sum(bool(r.wrong) for r in mine))))
        wrong = sum(bool(r.wrong) for r in self.rounds)
        last = f"{len(self.rounds)} rounds, {wrong} wrong, {len(self.left)} left at the end; "
        return "\n".join([*table(rows), f"{last}{self.seconds:.0f} s, seed {self.seed}", *self.left_out])

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ok": not self.wrong, "made_at": now()}, indent=1) + "\n"


class Postgres:
    """Databases of one server, which can be made to seem away."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._number = 0

    def new_database(self) -> str:
        self._number += 1
        name = f"chaos_{self._number}"
        self._say("CREATE DATABASE {}", name)
        return postgres.url(self._folder, name)

    def away(self, url: str) -> None:
        name = str(make_url(url).database)
        self._say("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
        with self._connected() as server:
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
            )

    def back(self, url: str) -> None:
        self._say("ALTER DATABASE {} ALLOW_CONNECTIONS true", str(make_url(url).database))

    def _say(self, statement: str, name: str) -> None:
        with self._connected() as server:
            server.execute(sql.SQL(statement).format(sql.Identifier(name)))

    def _connected(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(host=self._folder, user=postgres.USER, dbname="postgres", autocommit=True)


class Chaos:
    """Rounds in ``folder``, whose path is to be short: there are sockets in it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self.mark = uuid.uuid4().hex
        self._checkpoint = synth("tiny-gemma3", folder / "tiny-gemma3")
        self._artifacts = folder / "artifacts"
        self._artifacts.mkdir()
        self._expected: dict[Jobs, tuple[RunResults, float]] = {}
        self._runs = 0
        self.report = Report(seed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The nursery, which has to be forked before there are threads here."""
        path = str(self._folder / "nursery.sock")
        os.environ[lab.NURSERY] = path
        mark_processes(self.mark)
        client.prepare_to_fork()
        child = os.fork()
        if child == 0:
            try:
                lab.run_nursery(path, lambda root: client.enter(root.parents[1]))
            finally:
                os._exit(1)
        try:
            while not Path(path).exists():
                time.sleep(0.01)
            mark_processes(f"{self.mark}-round")  # what is started from now on ends with its round
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def run(
        self,
        rounds: int,
        which: tuple[Fault, ...],
        server: Postgres | None,
        say: Say,
        within_s: float,
        lane: int,
    ) -> None:
        """This lane's share of the rounds on cheap devices. within_s: none is begun later; the report then
        says how many were not."""
        began = time.monotonic()
        draw = random.Random(self._seed)
        turns = _spread(rounds, which)
        draw.shuffle(turns)
        mine = list(enumerate(turns, 1))[lane::LANES]
        for done, (number, fault) in enumerate(mine, 1):
            if time.monotonic() - began > within_s:
                late = len(mine) - done + 1
                self.report.left_out.append(f"{late} rounds were not begun in {within_s:.0f} s")
                break
            came = self._round(number, fault, random.Random(f"{self._seed} {number}"), server)
            self.report.rounds.append(came)
            left = (time.monotonic() - began) / done * (len(mine) - done)
            say(
                f"[{number:>3}/{len(turns)}] {came.outcome:<9}{came.took_s:5.1f} s  {fault.name:<40} "
                f"about {int(left // 60)}:{int(left % 60):02d} left"
            )
            for line in came.wrong:
                say(f"          wrong: {line}")
        self.report.seconds += time.monotonic() - began

    def _world(self, name: str, environment: tuple[tuple[str, str], ...] = ()) -> World:
        folder = self._folder / name
        words = {key: value.format(folder=folder) for key, value in environment}
        return World(folder, self._checkpoint, self._artifacts, self.mark, **words)

    def expected(self, jobs: Jobs) -> tuple[RunResults, float]:
        """Of a run that nothing happens to, and a moment (s) that such runs seldom end before."""
        if jobs not in self._expected:
            self._unharmed(jobs)  # exports the model, which takes longer than all else
            results, seconds = self._unharmed(jobs)
            self._expected[jobs] = results, 0.8 * seconds
        return self._expected[jobs]

    def _unharmed(self, jobs: Jobs) -> tuple[RunResults, float]:
        self._runs += 1
        world, began = self._world(f"unharmed-{self._runs}"), time.monotonic()
        try:
            who = world.client(jobs)
            who.start()
            world.until(who.ended, "a run that nothing happens to")
            seconds = time.monotonic() - began
            assert who.codes == [0], who.log()
            results = who.results()
            wrong = world.wrong(results, wasted=0, strict=True)
            assert not wrong, wrong
            return results, seconds
        finally:
            world.remove()

    def _round(self, number: int, fault: Fault, draw: random.Random, server: Postgres | None) -> Came:
        began, world = time.monotonic(), self._world(f"r{number}", fault.environment)
        outcome, seconds, wrong = "failed", None, list[str]()
        try:
            expected, run_s = self.expected(fault.jobs)
            began = time.monotonic()
            fault.tell(Round(world, draw, run_s, server))
            world.finish()
            wrong = world.wrong(expected, fault.wasted, strict=not fault.retries, kept=fault.kept)
            outcome, seconds = world.outcome(), world.seconds_to_next()
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        took_s = time.monotonic() - began
        if not wrong or "KVFARM_CHAOS_KEEP" not in os.environ:
            world.remove()
        return Came(fault.name, number, outcome, seconds, took_s, tuple(wrong))


def _spread(rounds: int, which: tuple[Fault, ...]) -> list[Fault]:
    """Each fault at least once, the more often the larger its share."""
    whole = sum(fault.share for fault in which)
    return [fault for fault in which for _ in range(max(1, round(rounds * fault.share / whole)))]


@contextmanager
def chaos(seed: int) -> Iterator[Chaos]:
    with tempfile.TemporaryDirectory(prefix="kvchaos-", ignore_cleanup_errors=True) as folder:
        made = Chaos(Path(folder), seed)
        with made.running():
            yield made


@contextmanager
def server(left_out: list[str]) -> Iterator[Postgres | None]:
    binaries = postgres.programs()
    if binaries is None:
        left_out.append("left out: PostgreSQL away (no initdb here; make apt)")
        yield None
        return
    with postgres.server(binaries) as folder:
        yield Postgres(folder)


def chosen(name: str, only: str) -> bool:
    """only: comma-separated parts of names, "" for all."""
    return any(part in name for part in only.split(","))


def run_cheap(rounds: int, seed: int, say: Say, only: str = "", within_s: float = float("inf")) -> Report:
    """Rounds on devices that follow a script; from a process that has no threads yet.

    Some processes do them side by side, for most of a round is waiting.
    """
    fork, began, report = multiprocessing.get_context("fork"), time.monotonic(), Report(seed)
    which = tuple(fault for fault in faults() if chosen(fault.name, only))
    lanes = list[tuple[Any, Any]]()
    for lane in range(LANES if which else 0):
        answer, tell = fork.Pipe(duplex=False)
        work = partial(_cheap_lane, tell, rounds, seed, say, which, within_s, lane)
        lanes.append((fork.Process(target=work), answer))
        lanes[-1][0].start()
        tell.close()
    for process, answer in lanes:
        found: Report = answer.recv()  # EOFError: it has died, and said why
        process.join()
        report.rounds += found.rounds
        report.left += found.left
        report.left_out += [line for line in found.left_out if line not in report.left_out]
    report.rounds.sort(key=lambda each: each.number)
    report.seconds = time.monotonic() - began
    return report


def _cheap_lane(
    tell: Connection, rounds: int, seed: int, say: Say, which: tuple[Fault, ...], within_s: float, lane: int
) -> None:
    left_out = list[str]()
    with contextlib.ExitStack() as stack:
        # Before what belongs to the rounds, which is to be gone with them.
        found = stack.enter_context(server(left_out)) if any(f.postgres for f in which) else None
        made = stack.enter_context(chaos(seed))
        made.report.left_out += left_out
        made.run(rounds, tuple(f for f in which if found or not f.postgres), found, say, within_s, lane)
    tell.send(made.report)


def add_real(report: Report, say: Say, deadline: Deadline, only: str = "") -> None:
    """Rounds with Ray and a real engine, one of each fault; none is begun after the deadline."""
    began, mark = time.monotonic(), uuid.uuid4().hex
    draw = random.Random(f"{report.seed} real")
    with tempfile.TemporaryDirectory(prefix="kvchaos-", ignore_cleanup_errors=True) as folder:
        checkpoint = synth("tiny-gemma3", Path(folder) / "tiny-gemma3")
        for number, fault in enumerate((f for f in REAL_FAULTS if chosen(f.name, only)), 1):
            at = time.monotonic()
            if deadline.expired:
                report.left_out.append(f"left out, for time was up: {fault.name}")
                continue
            run = RealRun(Path(folder) / str(number), checkpoint, f"{mark}-{number}")
            try:
                came = strike_for_real(run, fault, draw)
            except Exception as error:
                came = CameReal("failed", None, (f"{type(error).__name__}: {error}",))
            took_s = time.monotonic() - at
            report.rounds.append(Came(fault.name, number, came.outcome, came.seconds, took_s, came.wrong))
            say(f"{came.outcome:<9}{took_s:5.1f} s  {fault.name}")
    report.seconds += time.monotonic() - began


def add_cuts(report: Report, say: Say, deadline: Deadline, only: str = "") -> None:
    """Rounds with the network between hosts cut, one of each; none is begun after the deadline."""
    began, cuts = time.monotonic(), [cut for cut in CUTS if chosen(cut.name, only)]
    late = f"less than {CUTS_S:.0f} s were left" if deadline.remaining < CUTS_S else ""
    if why := late or cluster_lab.missing():
        report.left_out += [f"left out: {cut.name} ({why})" for cut in cuts]
    elif cuts:
        try:
            with tempfile.TemporaryDirectory(prefix="kvchaos-") as folder, cut_lab(Path(folder)) as lab:
                _cut_each(lab, cuts, report, say, deadline)
        except Exception as error:  # the table is to come all the same
            report.left.append(f"the lab of cut networks: {type(error).__name__}: {error}")
    report.seconds += time.monotonic() - began


def _cut_each(lab: CutLab, cuts: Sequence[Cut], report: Report, say: Say, deadline: Deadline) -> None:
    draw = random.Random(f"{report.seed} cut")
    for number, cut in enumerate(cuts, 1):
        began = time.monotonic()
        if deadline.expired:
            report.left_out.append(f"left out, for time was up: {cut.name}")
            continue
        try:
            came = lab.strike(cut, draw)
        except Exception as error:
            came = CameReal("failed", None, (f"{type(error).__name__}: {error}",))
        took_s = time.monotonic() - began
        report.rounds.append(Came(cut.name, number, came.outcome, came.seconds, took_s, came.wrong))
        say(f"{came.outcome:<9}{took_s:5.1f} s  {cut.name}")
        for line in came.wrong:
            say(f"          wrong: {line}")


def add_phones(report: Report, say: Say, deadline: Deadline) -> None:
    """Rounds of the soak, three of each fault: adbd and the adb server of virtual phones at work."""
    began = time.monotonic()
    if deadline.remaining < PHONES_S:
        report.left_out.append(
            f"left out, for less than {PHONES_S:.0f} s were left: rounds on virtual phones"
        )
        return
    try:
        bundle = build(native_abi(), Path(".kvfarm") / "bundles")
        with tempfile.TemporaryDirectory(prefix="kvchaos-model-") as folder:
            checkpoint = synth("tiny-gemma3", Path(folder) / "checkpoint")
            artifact = export(checkpoint, Path(folder) / "artifact", parse_recipe("hybrid").export)
            found = run_soak(bundle, artifact, times=3, seed=report.seed, within_s=PHONES_S, only="adb")
    except InfrastructureError as error:
        report.left_out.append(f"left out: rounds on virtual phones ({error})")
        return
    for number, each in enumerate(found.rounds, 1):
        wrong = (*each.wrong, *each.orphans)
        report.rounds.append(
            Came(f"{each.fault} (phone)", number, each.outcome, each.seconds, each.seconds, wrong)
        )
    report.left += [*found.lost, *found.doubled, *found.disturbed, *found.left, *found.crashed]
    report.seconds += time.monotonic() - began
    say(f"{len(found.rounds)} rounds on phones, {found.cells} cells")
