"""One virtual phone at work: cell after cell through the lab agent, each under the harness's recovery."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from device_agents.adb.devices import AttachedPhone
from device_agents.blobs import MissingBlob
from device_agents.errors import InfrastructureError, LeaseError
from device_agents.lab_agent import LabAgent
from harness import measuring
from harness.recovery import Recovery
from harness.store.protocol import Store
from kvengine.artifact import Artifact, Manifest
from kvengine.program import Generate, Observation, Prefill, Program, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession
from reports.results import CheckResult, LegResult
from tests.device_agents.conftest import make_artifact
from tests.soak.faults import Point

RECIPE = SessionRecipe(threads=1)
LEASE_S = 600.0
# Its answer is some hundred kilobytes, room enough to break off in.
PROGRAMS = (
    Program(64, (Prefill(tuple(range(1, 30)), chunk=7), Generate(5, 5))),
    Program(600, (Prefill(tuple(1 + n % 90 for n in range(500))),)),
)
WORKLOAD = Workload(tuple(range(1, 9)), 3, repeats=1)
# One that is appended to what has arrived, and some that travel together.
BALLAST = (9 << 20, 1 << 20, 1 << 20)


@dataclass(frozen=True)
class Row:
    """What became of one cell, as the harness delivered it."""

    cell: int
    outcome: str  # passed, failed, infrastructure
    retries: tuple[str, ...]
    message: str
    began: float  # monotonic, s
    ended: float


@dataclass
class Lab:
    """What all phones share. expected: the answers to PROGRAMS of the engine in this process."""

    agent: LabAgent
    store: Store
    run_id: str
    artifact: Artifact
    expected: tuple[tuple[Observation, ...], ...]
    work: Path


@dataclass
class Pending:
    """A fault that waits for its point; strike is called there, by the thread that works."""

    point: Point
    strike: Callable[[], None]
    struck: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class PhoneAtWork:
    """Works from ``start`` to ``stop``; a Target of faults. ``rows`` is what the harness delivered."""

    push_bytes = sum(BALLAST)
    reply_bytes = 100_000

    def __init__(self, lab: Lab, name: str, attached: AttachedPhone, new_recovery: Callable[[], Recovery]):
        self.name, self.attached = name, attached
        self.recovery = new_recovery()
        self._new_recovery = new_recovery
        self._lab = lab
        self._draw = random.Random(name)
        self.begun = 0
        self.rows: list[Row] = []
        self.delivered: Counter[int] = Counter()  # results by cell; the store itself would hide a second
        self.pending: Pending | None = None
        self._stop, self._idle, self._go = threading.Event(), threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self._go.set()
        self._thread = threading.Thread(target=self._run, name=name)
        self.crash: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the cell under way."""
        self._stop.set()
        self._go.set()
        if self._thread.ident is not None:
            self._thread.join()

    @contextlib.contextmanager
    def paused(self, within_s: float):  # type: ignore[no-untyped-def]
        """The phone at rest, between two cells."""
        self._idle.clear()
        self._go.clear()
        try:
            assert self._idle.wait(within_s), f"{self.name}: no rest within {within_s:g} s"
            yield
        finally:
            self._go.set()

    def wait_rows(self, enough: Callable[[list[Row]], bool], within_s: float) -> bool:
        """Whether ``enough`` comes true of the rows in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.crash is not None or enough(self.rows), within_s)

    def replace(self) -> None:
        """Somebody plugs a new phone in, and it starts with a clean slate. Only while paused."""
        self.attached.detach()
        self.recovery = self._new_recovery()

    # -- the work -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._go.is_set():
                    self._idle.set()
                    self._go.wait()
                    continue
                self._cell(self.begun)
        except BaseException as error:
            self.crash = error
            with self._changed:
                self._changed.notify_all()
            raise

    def _cell(self, number: int) -> None:
        self.begun += 1
        began = time.monotonic()
        retries: list[str] = []
        ballast = self._ballast(number) if number % 3 == 2 else None
        kinds = (self._programs, self._leg, lambda: self._push(ballast))
        outcome, message, leg = "passed", "", None
        try:
            leg = self.recovery.attempt(self.name, kinds[number % 3], retries)
        except InfrastructureError as error:
            outcome, message = "infrastructure", f"{type(error).__name__}: {error}"
        except Exception as error:  # as pytest does: whatever else a test raises is its failure
            outcome, message = "failed", f"{type(error).__name__}: {error}"
        self._deliver(number, outcome, message, retries, leg, began)

    def _deliver(
        self, number: int, outcome: str, message: str, retries: list[str], leg: LegResult | None, began: float
    ) -> None:
        if leg is not None:
            leg = dataclasses.replace(leg, recipe=f"cell-{number}", retries=tuple(retries))
            self._lab.store.add_leg(self._lab.run_id, leg)
        else:
            self._lab.store.add_check(self._lab.run_id, self._check(number, outcome, message, retries))
        with self._changed:
            self.delivered[number] += 1
            self.rows.append(Row(number, outcome, tuple(retries), message, began, time.monotonic()))
            self._changed.notify_all()

    def _check(self, number: int, outcome: str, message: str, retries: list[str]) -> CheckResult:
        return CheckResult(
            device=self.name,
            recipe="tiny",
            check=f"cell-{number}",
            title="cell",
            outcome=outcome,  # type: ignore[arg-type]
            seconds=0.0,
            programs=0,
            worst_error=None,
            tolerance=None,
            message=message,
            retries=tuple(retries),
        )

    @contextlib.contextmanager
    def _leased(self):  # type: ignore[no-untyped-def]
        agent = self._lab.agent
        lease = agent.acquire(self.name, "soak", LEASE_S)
        try:
            agent.claim(self.name, lease.token)
            yield lease.token
        finally:
            with contextlib.suppress(LeaseError):
                agent.release(self.name, lease.token)

    def _reached(self, point: Point) -> None:
        pending = self.pending
        if pending is None or pending.point != point or pending.struck.is_set():
            return
        try:
            pending.strike()
        except Exception as error:
            pending.error = error
        pending.struck.set()

    def _session(self, token: int) -> str:
        agent, artifact = self._lab.agent, self._lab.artifact
        self._ship(artifact.folder, artifact.manifest)
        agent.deploy(self.name, token, artifact.manifest.to_json())
        session, _ = agent.open_session(self.name, token, artifact.id, RECIPE)
        return session

    def _programs(self) -> None:
        self._reached("cell")
        agent = self._lab.agent
        with self._leased() as token:
            self._reached("shell")
            session = self._session(token)
            for program, expected in zip(PROGRAMS[:1], self._lab.expected[:1], strict=True):
                compare(agent.run_program(session, token, program), expected)
            self._reached("frame")
            compare(agent.run_program(session, token, PROGRAMS[1]), self._lab.expected[1])
            agent.close_session(session, token)

    def _leg(self) -> LegResult:
        self._reached("cell")
        agent = self._lab.agent
        with self._leased() as token:
            before = measuring.vitals_info(agent.vitals(self.name))
            session = self._session(token)
            measured = agent.run_workload(session, token, WORKLOAD)
            agent.close_session(session, token)
            after = measuring.vitals_info(agent.vitals(self.name))
        return LegResult(
            device=self.name,
            recipe="",
            model="tiny",
            workload="tiny",
            prompt_tokens=len(WORKLOAD.prompt),
            new_tokens=WORKLOAD.new_tokens,
            load_ms=measured.load_ms,
            samples=tuple(measuring.sample_info(sample) for sample in measured.samples),
            peak_rss_bytes=measured.peak_rss_bytes,
            kv_bytes=measured.kv_bytes,
            nodes_by_provider=measured.nodes_by_provider,
            threads=measured.threads,
            validity="VALID",
            reasons=(),
            vitals_before=before,
            vitals_after=after,
            provenance={},
        )

    def _push(self, ballast: tuple[Path, Manifest] | None) -> None:
        """Blobs that the phone has never seen; it must have every byte of them."""
        assert ballast is not None
        folder, manifest = ballast
        self._reached("cell")
        with self._leased() as token:
            self._ship(folder, manifest)
            self._reached("push")
            self._lab.agent.deploy(self.name, token, manifest.to_json())

    def _ballast(self, number: int) -> tuple[Path, Manifest]:
        folder = self._lab.work / f"{self.name}-ballast"
        contents = {f"{index}.bin": self._draw.randbytes(size) for index, size in enumerate(BALLAST)}
        return folder, make_artifact(folder, contents)

    def _ship(self, folder: Path, manifest: Manifest) -> None:
        """To the lab host's store, as harness.farm does it over Ray."""
        agent = self._lab.agent
        names = {blob.sha256: blob.name for blob in manifest.blobs}
        missing: tuple[MissingBlob, ...] = agent.missing_blobs(manifest.to_json())
        for blob in missing:
            data = (folder / names[blob.sha256]).read_bytes()
            agent.put_chunk(blob.sha256, blob.present, data[blob.present :])
            agent.commit_blob(blob.sha256)


def compare(found: tuple[Observation, ...], expected: tuple[Observation, ...]) -> None:
    """Raises AssertionError unless the phone answers as this machine does."""
    assert len(found) == len(expected)
    for theirs, ours in zip(found, expected, strict=True):
        assert (theirs.position, theirs.tokens, theirs.error) == (ours.position, ours.tokens, ours.error)
        np.testing.assert_allclose(theirs.logits, ours.logits, rtol=1e-4, atol=1e-4)


def answers(engine: EngineSession) -> tuple[tuple[Observation, ...], ...]:
    return tuple(tuple(engine.run_program(program)) for program in PROGRAMS)


def mark_processes(mark: str) -> None:
    """Whatever we start from now on carries ``mark`` in its environment."""
    os.environ["KVFARM_SOAK"] = mark
