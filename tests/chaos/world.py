"""One round: a run over devices that something happens to, gone on with until it is finished, and judged."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from device_agents.deadline import Deadline
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, Ledger, read
from harness import resuming
from harness.errors import CannotResume
from harness.store import open_store
from kvengine.codec import encode
from reports.results import RunResults
from tests.chaos import client, lab
from tests.chaos.client import Plan
from tests.chaos.device import LOG
from tests.soak import leftovers

ROUND_S = 60.0  # a round takes two
_POLL_S = 0.005
# By a real process, and what is judged by it.
_MEASURED = ("validity", "reasons", "load_ms", "itl_ms", "during", "vitals_before", "vitals_after", "notes")
CHECK = """
def test_check_{number}(cell):
    "check {number}"
    cell.for_all(programs.any_sequence(cell.limits), lambda program: right(cell, program))
"""
LEG = """
def test_leg_{number}(leg):
    "leg {number}"
    leg()
"""
HEAD = """
from harness import programs
from tests.chaos.device import answer

def right(cell, program):
    found = cell.run(program)
    if not cell.device.startswith("runner"):
        assert all((each.logits == answer(program)).all() for each in found), "another program's answer"
"""


@dataclass(frozen=True)
class Jobs:
    """What a run is to do on each of its devices."""

    devices: tuple[str, ...] = ("left", "right")
    checks: int = 4
    legs: int = 2

    @property
    def text(self) -> str:
        parts = [CHECK.format(number=number) for number in range(self.checks)]
        for number in range(self.legs):
            parts.insert(2 * number + 1, LEG.format(number=number))
        return HEAD + "".join(parts)


@dataclass
class Client:
    """One user's run: its folder, its store, and the processes that worked for it, one after the other."""

    folder: Path
    store: str
    jobs: Jobs
    checkpoint: Path
    pid: int | None = None
    deaths: list[float] = field(default_factory=list)  # monotonic, s
    codes: list[int] = field(default_factory=list)

    def arguments(self) -> list[str]:
        return [
            "-p",
            "no:cacheprovider",
            "-p",
            "no:terminal",
            "-n0",
            "test_jobs.py",
            f"--devices={','.join(self.jobs.devices)}",
            f"--model={self.checkpoint}",
            f"--store={self.store}",
            "--recipes=static",
            "--examples=3",
            "--kvfarm-seed=7",
            "--prompt=8",
            "--new-tokens=4",
            "--repeats=2",
            "--retries=5",
            "--recover-within=15",
            "--wait=60s",
        ]

    def start(self, plan: Plan | None = None) -> None:
        self.pid = client.start(self.folder, self.arguments(), plan)

    def resume(self, plan: Plan | None = None) -> None:
        """As ``kvfarm resume`` does it; from the beginning where even that was not stored."""
        with open_store(self.store) as store:
            try:
                found = resuming.find(store, None)
            except CannotResume:
                if store.runs():  # it was killed when all was done
                    self.codes.append(0)
                else:
                    self.start(plan)
                return
        assert found.request is not None
        own = [f"--store={self.store}", f"{resuming.OPTION}={found.run_id}"]
        self.pid = client.start(self.folder, [*found.request.arguments, *own], plan)

    def kill(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> bool:
        """Whether its process has; its exit code is then the last of ``codes``, negative for a signal."""
        if self.pid is None:
            return True
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if not found:
            return False
        self.pid = None
        self.codes.append(os.waitstatus_to_exitcode(status))
        if self.codes[-1] < 0:
            self.deaths.append(time.monotonic())
        return True

    @property
    def finished(self) -> bool:
        return bool(self.codes) and self.codes[-1] >= 0

    def results(self) -> RunResults:
        with open_store(self.store) as store:
            return store.results(store.latest())

    def good(self) -> list[float]:
        """When the store took results, monotonic, s."""
        return [line["at"] for line in lines(self.folder / client.GOOD)]

    def log(self) -> str:
        path = self.folder / "client.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""


class World:
    """The folder of a round, with what all its clients share. mark: in the environment of what is started."""

    def __init__(
        self, folder: Path, checkpoint: Path, artifacts: Path, mark: str, **environment: str
    ) -> None:
        self.folder = folder
        self._checkpoint, self._artifacts, self._mark = checkpoint, artifacts, mark
        self.clients: list[Client] = []
        self.strikes: list[float] = []  # monotonic, s
        folder.mkdir(parents=True)
        self.environment = {
            "KVFARM_LEASES": str(folder / "leases"),
            LOG: str(folder / "device.jsonl"),
            **environment,
        }

    def client(self, jobs: Jobs, store: str | None = None) -> Client:
        """Another user, with nothing started yet."""
        folder = self.folder / f"client-{len(self.clients)}"
        (folder / ".kvfarm").mkdir(parents=True)
        (folder / ".kvfarm" / "artifacts").symlink_to(self._artifacts)
        (folder / "environment.json").write_text(json.dumps(self.environment))
        (folder / "test_jobs.py").write_text(textwrap.dedent(jobs.text))
        (folder / "farm.toml").write_text("".join(f"[devices.{name}]\n" for name in jobs.devices))
        made = Client(folder, store or f"sqlite:///{folder}/results.db", jobs, self._checkpoint)
        self.clients.append(made)
        return made

    def strike(self) -> None:
        """Something has been done to the world just now."""
        self.strikes.append(time.monotonic())

    def until(self, condition: Callable[[], bool], what: str, within_s: float = ROUND_S) -> None:
        deadline = Deadline(within_s)
        while not condition():
            if deadline.expired:
                raise AssertionError(f"{what}: not within {within_s:g} s: {[c.log() for c in self.clients]}")
            time.sleep(_POLL_S)

    def pass_time(self, who: Client, seconds: float) -> None:
        """So long, or until the client has ended."""
        deadline = Deadline(seconds)
        while not deadline.expired and not who.ended():
            time.sleep(_POLL_S)

    def finish(self) -> None:
        """Every run is gone on with until it is finished."""
        for who in self.clients:
            self.until(who.ended, "a client's end")
            while not who.finished:
                assert len(who.codes) < 20, f"no end: {who.log()}"
                who.resume()
                self.until(who.ended, "a client's end")

    def agent(self, who: Client) -> int | None:
        """The PID of the client's lab agent, if it lives."""
        pid = lab.agent_of(who.folder / ".kvfarm" / "lab")
        return pid if pid is not None and alive(pid) else None

    # -- what came of it --------------------------------------------------------------------------

    def wrong(self, expected: RunResults, wasted: int, strict: bool, kept: bool = False) -> list[str]:
        """All that should not be. expected: of a run that nothing happened to. wasted: measurements that each
        strike may have cut off from the disk. strict: nothing was even tried again. kept: what is stored may
        still lie at the agent."""
        found = [f"exit code {who.codes[-1]}: {who.log()}" for who in self.clients if who.codes[-1] != 0]
        for who in self.clients:
            results = who.results()
            found += _exactly_once(results, who.jobs)
            if report(results, strict) != report(expected, strict):
                found.append(
                    f"another report: {difference(report(results, strict), report(expected, strict))}"
                )
        found += violations(read(self.folder / "leases" / JOURNAL))
        found += self._devices(wasted)
        found += self._left()
        if not kept:
            found += [f"not acknowledged: {path.name}" for path in self.folder.glob("leases/results/*")]
        return found

    def _devices(self, wasted: int) -> list[str]:
        """By what the devices tell: one user at a time, and no result that was not measured, or not kept."""
        told = lines(self.folder / "device.jsonl")
        found = [line for device in {each["device"] for each in told} for line in _two_users(told, device)]
        measured = [line["value"] for line in told if line["what"] == "workload" and not line["begins"]]
        legs = [leg for who in self.clients for leg in who.results().legs]
        stored = Counter(sample.ttft_ms for leg in legs for sample in leg.samples[:1])
        if any(leg.recipe for leg in legs if not leg.device.startswith("runner")):
            found += [f"{n} rows of measurement {value}" for value, n in stored.items() if n > 1]
            found += [f"a row of a measurement that nobody made: {v}" for v in stored if v not in measured]
            # Each leg is timed and weighed.
            most = 2 * len(legs) + wasted * max(1, len(self.strikes))
            if len(measured) > most:
                found.append(f"measured {len(measured)} times, sought {most} at most: work was repeated")
        return found

    def _left(self) -> list[str]:
        """No process, no lease, nobody in line, nothing that waits to be delivered."""
        mine = {pid for who in self.clients if (pid := self.agent(who)) is not None}
        with contextlib.suppress(AssertionError):
            self.until(lambda: not any(map(alive, mine)), "the agents' end", 5.0)
        found = [f"an agent: {pid}" for pid in mine if alive(pid)]
        found += [f"a process: {pid} {line}" for pid, line in leftovers.marked(self._mark + "-round").items()]
        state = Ledger(self.folder / "leases").act()
        found += [f"{device} is still held by {held.request.holder}" for device, held in state.held.items()]
        found += [f"{each.request.holder} still waits" for each in state.waiting.values()]
        spools = self.folder.glob("client-*/.kvfarm/spool/*")
        return found + [f"not delivered: {path.name}" for path in spools]

    def outcome(self) -> str:
        """The worst that happened to a run."""
        if any(who.deaths for who in self.clients):
            return "resumed"
        return "retried" if any(has_retries(who.results()) for who in self.clients) else "survived"

    def seconds_to_next(self) -> float | None:
        """Median over strikes, and deaths by a client's own hand, of the time to the next stored result."""
        good = sorted(at for who in self.clients for at in who.good())
        at = self.strikes or [death for who in self.clients for death in who.deaths]
        waits = [next((g for g in good if g >= strike), None) for strike in at]
        known = [g - strike for g, strike in zip(waits, at, strict=True) if g is not None]
        return statistics.median(known) if known else None

    def remove(self) -> None:
        for who in self.clients:
            if who.pid is not None:
                who.kill()
                os.waitpid(who.pid, 0)
            if (pid := self.agent(who)) is not None:
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def _two_users(told: Sequence[dict[str, Any]], device: str) -> list[str]:
    """Operations of two agents on a device at the same time. One that has no end died with its agent."""
    began: dict[int, float] = {}
    spans = list[tuple[float, float, int]]()
    for line in told:
        if line["device"] == device and line["begins"]:
            began[line["agent"]] = line["at"]
        elif line["device"] == device:
            spans.append((began.pop(line["agent"]), line["at"], line["agent"]))
    spans.sort()
    return [
        f"{device}: {one} from {since} to {until}, {other} from {then}"
        for (since, until, one), (then, _, other) in itertools.pairwise(spans)
        if one != other and then < until
    ]


def report(results: RunResults, strict: bool) -> Any:
    """What the report is made of, without what no two runs share: names, moments, durations, measured values.

    strict: what was tried again counts too.
    """
    own = {
        "run_id",
        "started_at",
        "finished_at",
        "seconds",
        "at",
        "ttft_ms",
        "request",
        "command",
        "provenance",
    }
    own |= set() if strict else {"retries", "infrastructure", "stopped", *_MEASURED}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in own}
        return [plain(item) for item in value] if isinstance(value, list) else value

    found = plain(encode(results))
    if not strict:  # what infrastructure stopped may come later than what was planned after it
        found["checks"].sort(key=lambda row: (row["device"], row["check"]))
        found["legs"].sort(key=lambda row: row["key"])
    found["devices"].sort(key=lambda row: row["name"])
    return found


def has_retries(results: RunResults) -> bool:
    return any(check.retries for check in results.checks) or any(leg.retries for leg in results.legs)


def _exactly_once(results: RunResults, jobs: Jobs) -> list[str]:
    checks = Counter((c.device, c.check, str(c.outcome)) for c in results.checks)
    legs = Counter((leg.device, leg.key) for leg in results.legs)
    wanted = Counter((d, f"test_check_{n}", "passed") for d in jobs.devices for n in range(jobs.checks))
    found = [f"checks: lost {wanted - checks}, too many {checks - wanted}"] if checks != wanted else []
    many = jobs.legs * len(jobs.devices)
    if len(legs) != many or set(legs.values()) != {1}:
        found.append(f"legs: sought {many}, each once, found {legs}")
    return found + ([] if results.finished_at else ["the run is not finished"])


def difference(found: Any, sought: Any, where: str = "") -> str:
    """The first one."""
    if isinstance(found, dict) and isinstance(sought, dict) and found.keys() == sought.keys():
        return next((t for k in found if (t := difference(found[k], sought[k], f"{where}.{k}"))), "")
    if isinstance(found, list) and isinstance(sought, list) and len(found) == len(sought):
        pairs = enumerate(zip(found, sought, strict=True))
        return next((t for i, (a, b) in pairs if (t := difference(a, b, f"{where}[{i}]"))), "")
    return "" if found == sought else f"{where}: found {str(found)[:300]}, sought {str(sought)[:300]}"


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a file whose last line may be cut off."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
