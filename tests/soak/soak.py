"""Each fault, many times, at random moments, against phones at work; and what came of it."""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from device_agents.adb.android import AndroidDevice
from device_agents.adb.devices import AttachedPhone
from device_agents.bundle import Bundle
from device_agents.config import DeviceConfig, DeviceSettings
from device_agents.deadline import Deadline
from device_agents.lab_agent import LabAgent
from device_agents.lab_types import AgentBudgets
from device_agents.remote_session import Budgets
from harness.provenance import now
from harness.recovery import Recovery, RecoveryPolicy
from harness.store import open_store
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from reports.results import RunResults
from tests.device_agents.virtual_support import listening, tree
from tests.soak import leftovers
from tests.soak.faults import Fault, Outcome, Scale, faults
from tests.soak.phones import RECIPE, Lab, PhoneAtWork, Row, answers, mark_processes
from tests.soak.table import table

WITNESS = "witness"  # at work all the time, and never struck
STORAGE = 1 << 30
_ATTACH_S = 300.0
# On while a cell has the phone, and so at every strike; at rest the phone has to have its own.
SETTINGS = DeviceSettings(fixed_performance=True, stay_on=True, airplane=True, brightness=60)


@dataclass(frozen=True)
class Round:
    """One fault on one phone. seconds: from the strike to the end of the first cell that passed after it,
    of a new phone where this one was lost."""

    fault: str
    phone: str
    outcome: str
    seconds: float
    wrong: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()


@dataclass
class Report:
    """All of a soak."""

    seed: int
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    cells: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Everything that should not be."""
        rounds = [f"{r.fault} on {r.phone}: {w}" for r in self.rounds for w in (*r.wrong, *r.orphans)]
        return [*rounds, *self.lost, *self.doubled, *self.disturbed, *self.left, *self.crashed]

    def table(self) -> str:
        """A line a fault."""
        heads = ("fault", "times", "outcomes", "median recovery", "wrong", "left behind")
        lines = [heads]
        for name in dict.fromkeys(r.fault for r in self.rounds):
            mine = [r for r in self.rounds if r.fault == name]
            outcomes = ", ".join(f"{k} {n}" for k, n in Counter(r.outcome for r in mine).most_common())
            median = f"{statistics.median(r.seconds for r in mine):.1f} s"
            wrong, left = sum(len(r.wrong) for r in mine), sum(len(r.orphans) for r in mine)
            lines.append((name, str(len(mine)), outcomes, median, str(wrong), str(left)))
        text = table(lines)
        text.append(
            f"{self.cells} cells, {len(self.lost)} lost, {len(self.doubled)} doubled, "
            f"{len(self.disturbed)} disturbed on the witness, {len(self.left)} left at the end; "
            f"{self.seconds:.0f} s, seed {self.seed}"
        )
        return "\n".join(text)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "ok": not self.wrong, "made_at": now()}, indent=1) + "\n"


class Soak:
    """Phones at work around one lab agent, in this process."""

    def __init__(self, work: Path, bundle: Bundle, artifact: Artifact, seed: int, scale: Scale) -> None:
        self._bundle, self._seed, self._scale = bundle, seed, scale
        self.mark = uuid.uuid4().hex
        mark_processes(self.mark)
        self._ports = listening(tree(os.getpid()))
        self._work = work
        self._artifact = artifact
        self.report = Report(seed)
        self._reporting = threading.Lock()
        self.phones: list[PhoneAtWork] = []
        self._settings: dict[str, str] = {}

    @contextmanager
    def running(self, struck: int) -> Iterator[None]:
        """``struck`` phones and the witness at work; afterwards nothing is."""
        scale, attached = self._scale, dict[str, AttachedPhone]()
        policy = RecoveryPolicy(retries=2, answer_s=scale.answer_s, lost_in_a_row=2, pause_s=0.1)

        def make(config: DeviceConfig, _: object) -> AndroidDevice:
            phone = attached[config.name] = AttachedPhone(
                config,
                self._work / "phones",
                storage=STORAGE if config.name == "phone-1" else 0,
                reach_s=scale.reach_s,
            )
            budgets = Budgets(scale.hello_s, scale.program_s, workload_s=scale.program_s)
            return AndroidDevice(
                config.name,
                phone.attach,
                lambda abi: self._bundle,
                limit_bytes=300 << 20,
                wanted=config.settings,
                budgets=budgets,
                detach=phone.detach,
            )

        names = [*(f"phone-{number}" for number in range(1, struck + 1)), WITNESS]
        # Not on all: to put them and to put them back takes as long as the work of a cell.
        configs = [
            DeviceConfig(
                name,
                "android",
                options={"virtual": "true"},
                settings=DeviceSettings() if name == "phone-2" else SETTINGS,
            )
            for name in names
        ]
        budgets = AgentBudgets(identity_s=120, deploy_s=30, open_s=30, vitals_s=scale.vitals_s)
        with ExitStack() as stack:
            store = stack.enter_context(open_store(self._work / "results.db"))
            store.begin_run(_header(self._seed))
            agent = LabAgent(
                self._work / "lab", configs, make=make, budgets=budgets, store_limit_bytes=200 << 20
            )
            stack.callback(agent.shutdown)
            engine = LocalEngine.open(self._artifact.folder, RECIPE)
            lab = Lab(agent, store, "soak", self._artifact, answers(engine), self._work)
            engine.close()

            def recovery() -> Recovery:
                return Recovery(agent.vitals, policy)

            self.phones = [PhoneAtWork(lab, name, attached[name], recovery) for name in names]
            try:
                self._begin()
                yield
            finally:
                for phone in self.phones:
                    phone.stop()
            self._count(store.results("soak"))
        self._look_at_the_end()

    def strike_all(self, times: int, which: tuple[Fault, ...], within_s: float) -> None:
        """Each fault ``times`` times, spread over the phones that may be struck, each phone in a thread."""
        struck = [phone for phone in self.phones if phone.name != WITNESS]
        draw = random.Random(self._seed)
        turns: dict[str, list[Fault]] = {phone.name: [] for phone in struck}
        for fault in [fault for fault in which for _ in range(times)]:
            fit = [p.name for p in struck if not fault.needs_storage or p.name == "phone-1"]
            fit = [name for name in fit if not (fault.loses_data and name == "phone-1")] or fit
            turns[min(fit, key=lambda name: len(turns[name]))].append(fault)
        end = time.monotonic() + within_s
        threads = []
        for phone in struck:
            mine = turns[phone.name]
            draw.shuffle(mine)
            arguments = (phone, mine, random.Random(f"{self._seed} {phone.name}"), end)
            threads.append(threading.Thread(target=self._strike_one_after_the_other, args=arguments))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # -- inside ---------------------------------------------------------------------------

    def _begin(self) -> None:
        for phone in self.phones:
            # As the phone came, before any cell has changed them.
            phone.attached.attach(Deadline(_ATTACH_S))
            self._settings[phone.name] = leftovers.settings_of(phone)
            phone.start()
        for phone in self.phones:
            assert phone.wait_rows(lambda rows: len(rows) >= 3, 300), (
                f"{phone.name} did no work: {phone.rows}"
            )
            assert [row.outcome for row in phone.rows[:3]] == ["passed"] * 3, phone.rows

    def _strike_one_after_the_other(
        self, phone: PhoneAtWork, turns: list[Fault], draw: random.Random, end: float
    ) -> None:
        for fault in turns:
            if time.monotonic() > end:
                self.report.lost.append(f"{phone.name}: no time was left for {fault.name!r}")
                continue
            try:
                found = self._round(phone, fault, draw)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                found = Round(fault.name, phone.name, "unknown", self._scale.round_s, (said,))
            with self._reporting:
                self.report.rounds.append(found)

    def _round(self, phone: PhoneAtWork, fault: Fault, draw: random.Random) -> Round:
        first, at = len(phone.rows), [0.0]

        def strike() -> None:
            at[0] = time.monotonic()
            fault.strike(phone, draw)

        pending = _arm(phone, fault, strike, draw)
        assert pending.wait(self._scale.round_s), f"never came to its point ({fault.point})"
        error = phone.pending.error if phone.pending else None
        phone.pending = None
        assert error is None, f"could not strike: {error!r}"
        # The cell under way and the next, for a fault may show only then; then one without any trouble.
        settled = phone.wait_rows(lambda rows: _settled(rows[first:], at[0]), self._scale.round_s)
        if fault.undo is not None:
            fault.undo(phone)
        rows = [row for row in phone.rows[first:] if row.ended >= at[0]]
        assert settled, f"no result within {self._scale.round_s:g} s: {rows}"
        outcome = "quarantined" if phone.recovery.quarantined else _outcome(rows)
        wrong = _judge(fault, outcome, rows)
        if phone.recovery.quarantined:
            wrong += self._after_quarantine(phone)
        ended = self._usable_again(phone, at[0])
        with phone.paused(self._scale.round_s):
            left = leftovers.on_the_phone(phone, self._settings[phone.name])
        return Round(fault.name, phone.name, outcome, ended - at[0], tuple(wrong), tuple(left))

    def _after_quarantine(self, phone: PhoneAtWork) -> list[str]:
        """What is left for the device is reported without asking it; then a new one is plugged in."""
        (evidence,) = phone.recovery.quarantined.values()
        more = len(phone.rows) + 3
        assert phone.wait_rows(lambda rows: len(rows) >= more, self._scale.round_s), "its cells wait for it"
        late = phone.rows[more - 2 : more]
        wrong = [f"not told to be in quarantine: {row}" for row in late if "quarantined: " not in row.message]
        with phone.paused(self._scale.round_s):
            phone.replace()
        return wrong + ([] if "did not answer again" in evidence else [f"no evidence: {evidence}"])

    def _usable_again(self, phone: PhoneAtWork, struck: float) -> float:
        """When the first cell that was begun after the strike, and was not retried, had passed."""
        start = time.monotonic() if phone.rows[-1].outcome != "passed" else struck

        def clean(row: Row) -> bool:
            return row.began >= start and row.outcome == "passed" and not row.retries

        assert phone.wait_rows(lambda rows: any(map(clean, rows)), self._scale.round_s), "not usable again"
        return next(row.ended for row in phone.rows if clean(row))

    def _count(self, results: RunResults) -> None:
        """Every cell that was begun has one result, delivered once, in the store once."""
        stored = Counter((c.device, c.check) for c in results.checks)
        stored += Counter((leg.device, leg.recipe) for leg in results.legs)
        for phone in self.phones:
            self.report.cells += phone.begun
            if phone.crash is not None:
                self.report.crashed.append(f"{phone.name}: {phone.crash!r}")
            for cell in range(phone.begun):
                times = max(phone.delivered[cell], stored[phone.name, f"cell-{cell}"])
                fewest = min(phone.delivered[cell], stored[phone.name, f"cell-{cell}"])
                if fewest == 0:
                    self.report.lost.append(f"{phone.name}: the result of cell {cell}")
                if times > 1:
                    self.report.doubled.append(f"{phone.name}: {times} results of cell {cell}")
            if phone.name == WITNESS:
                bad = [row for row in phone.rows if row.outcome != "passed" or row.retries]
                self.report.disturbed += [f"the witness: {row}" for row in bad]

    def _look_at_the_end(self) -> None:
        self.report.left += leftovers.on_the_host([], self.mark, self._ports)
        folder = self._work / "phones"
        self.report.left += [f"a phone's folder: {path.name}" for path in folder.iterdir()]


def _arm(
    phone: PhoneAtWork, fault: Fault, strike: Callable[[], None], draw: random.Random
) -> threading.Event:
    """Let the fault strike at its point, or a random time after it; returns what is set then."""
    from tests.soak.phones import Pending

    if not fault.random_delay_s:
        phone.pending = Pending(fault.point, strike)
        return phone.pending.struck
    struck = threading.Event()

    def late() -> None:
        try:
            strike()
        except Exception as error:
            made.error = error
        struck.set()

    timer = threading.Timer(draw.uniform(0.0, fault.random_delay_s), late)
    made = Pending(fault.point, timer.start)
    phone.pending = made
    return struck


def _settled(rows: list[Row], struck: float) -> bool:
    """The cell that was under way at the strike and the one after it have their results, or it is over."""
    after = [row for row in rows if row.ended >= struck]
    return (len(after) >= 2 and (after[-1].outcome != "infrastructure" or len(after) >= 3)) or any(
        row.outcome == "infrastructure" for row in after
    )


def _outcome(rows: list[Row]) -> Outcome:
    """The worst that happened to the cells."""
    if any(row.outcome == "infrastructure" for row in rows):
        return "infrastructure"
    return "retried" if any(row.retries for row in rows) else "survived"


def _judge(fault: Fault, outcome: Outcome, rows: list[Row]) -> list[str]:
    wrong = [f"a test failure was invented: {row.message[:300]}" for row in rows if row.outcome == "failed"]
    if outcome not in fault.may:
        said = [(row.outcome, row.retries, row.message[:200]) for row in rows]
        wrong.append(f"sought {' or '.join(sorted(fault.may))}, found {outcome}: {said}")
    return wrong


def _header(seed: int) -> RunResults:
    return RunResults(
        run_id="soak",
        started_at=now(),
        finished_at=None,
        command="soak",
        seed=seed,
        model="tiny",
        reference="the engine in the same process",
        provenance={},
        devices=(),
        recipes=(),
        checks=(),
        legs=(),
        planned_checks=0,
        planned_legs=0,
    )


def run_soak(
    bundle: Bundle,
    artifact: Artifact,
    *,
    times: int,
    seed: int,
    struck: int = 3,
    within_s: float = 840.0,
    only: str = "",
    scale: Scale | None = None,
) -> Report:
    """Raises InfrastructureError where the machine allows no virtual phones."""
    scale = scale or Scale()
    which = tuple(fault for fault in faults(scale) if only in fault.name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvfarm-soak-") as folder:
        soak = Soak(Path(folder), bundle, artifact, seed, scale)
        with soak.running(struck):
            soak.strike_all(times, which, within_s)
        soak.report.seconds = time.monotonic() - began
        return soak.report
