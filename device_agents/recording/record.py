"""The log of a recording: what a logger on the device wrote, read strictly, for it may be anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from device_agents.api import Vitals
from device_agents.deadline import Deadline
from device_agents.recording.answers import Gauge, integer, parse_gauge, parse_rails, parse_vitals

MARK = "--kvfarm-section--"
LOG_MOST_BYTES = 8 << 20
_SAMPLE = re.compile(r"sample (\d{1,9}) (\d{1,12}\.\d{1,3}) (\S{1,30}) (idle|burn)")


@dataclass(frozen=True)
class Plan:
    """What to record. Seconds.

    max_s: the logger ends by itself then. period_s: between samples. slow_every: of how many samples
    one asks also what takes the device longer to say. burn_after_s: from when on every core is kept busy for
    burn_s, by the logger itself; None: not at all.
    """

    max_s: float = 900.0
    period_s: float = 1.0
    slow_every: int = 5
    burn_after_s: float | None = None
    burn_s: float = 0.0


@dataclass(frozen=True)
class RunnerUse:
    """Of the runner's process since it started: page faults that did and did not wait for the disk, CPU s.

    pss_bytes, swap_bytes, cgroup, cpuset: None when this sample did not ask.
    """

    minor_faults: int
    major_faults: int
    cpu_s: float
    pss_bytes: int | None = None
    swap_bytes: int | None = None
    cgroup: str | None = None
    cpuset: str | None = None


@dataclass(frozen=True)
class Sample:
    """One moment. at: s on the device's clock since boot, time asleep included. burning: see Plan."""

    at: float
    burning: bool
    vitals: Vitals
    gauge: Gauge
    rails: dict[str, tuple[float, int]] = field(default_factory=dict)
    runner: RunnerUse | None = None
    input_suspended: bool = False


@dataclass(frozen=True)
class Record:
    """What a recording found, in time's order. note: why it is not whole, "" if it is."""

    samples: tuple[Sample, ...] = ()
    note: str = ""


class Recording(Protocol):
    """A logger that runs on a device."""

    def stop(self, deadline: Deadline) -> Record:
        """End it, bring its log and leave nothing behind.

        Raises:
            DeviceUnreachable, DeadlineExceeded: the device went away; the logger ends by itself.
        """
        ...


@runtime_checkable
class Records(Protocol):
    """A Device that can record. Not part of Device, which runners know as well."""

    def start_recording(self, plan: Plan, runner: int | None, deadline: Deadline) -> Recording:
        """Begin to record on the device; whatever recorded before is ended. runner: a process to watch.

        Raises:
            InfrastructureError: the device is gone, or does not start the logger.
        """
        ...


def parse_log(text: str) -> Record:
    """Samples that are whole; the last may have been cut off by the device's death."""
    found: list[Sample] = []
    begun = ended = 0
    for number, at, wall, phase, sections in _blocks(text):
        begun += 1
        if sections is None:
            continue
        ended += 1
        if found and at <= found[-1].at:
            return Record(tuple(found), f"sample {number} is not later than the one before")
        found.append(_sample(at, wall, phase, sections))
    note = "" if begun == ended else f"{begun - ended} of {begun} samples are not whole"
    if not found:
        note = "the device's logger wrote no sample"
    return Record(tuple(found), note)


def _blocks(text: str) -> Iterator[tuple[int, float, float, str, dict[str, str] | None]]:
    """Number, time, wall time, phase, and answers by question (None: cut off) of each sample."""
    head: re.Match[str] | None = None
    sections: dict[str, str] = {}
    name, lines = "", list[str]()
    for line in text.splitlines():
        if not line.startswith(MARK):
            lines.append(line)
            continue
        if name and head is not None:
            sections[name] = "\n".join(lines).strip()
        word, lines = line.removeprefix(MARK).strip(), []
        name = word
        start = _SAMPLE.fullmatch(word)
        if start is None and not (head is not None and word == f"end {head[1]}"):
            continue
        if head is not None:
            whole = sections if start is None else None
            yield int(head[1]), float(head[2]), _wall(head[3]), head[4], whole
        head, sections, name = start, {}, ""
    if head is not None:
        yield int(head[1]), float(head[2]), _wall(head[3]), head[4], None


def _wall(text: str) -> float:
    """Unix time, s; 0 where the device's shell cannot tell it."""
    return float(text) if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text) else 0.0


def _sample(at: float, wall: float, phase: str, answers: Mapping[str, str]) -> Sample:
    get = answers.get
    return Sample(
        at=at,
        burning=phase == "burn",
        vitals=parse_vitals(answers, wall),
        gauge=parse_gauge(get("battery", ""), get("current", ""), get("supply", "")),
        rails=parse_rails(get("rails", "")),
        runner=_runner(get("stat", ""), get("rollup", ""), get("cgroup"), get("cpuset")),
        input_suspended=get("suspended", "").strip() in ("1", "true"),
    )


def _runner(stat: str, rollup: str, cgroup: str | None, cpuset: str | None) -> RunnerUse | None:
    """proc(5): fields 10 minflt, 12 majflt, 14 utime, 15 stime; its clock ticks are 1/100 s on Android."""
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 13 or not all(fields[i].isdigit() for i in (7, 9, 11, 12)):
        return None
    kilobytes = dict(re.findall(r"^(Pss|Swap):\s+(\d{1,12}) kB$", rollup, re.MULTILINE))
    pss, swap = integer(kilobytes.get("Pss")), integer(kilobytes.get("Swap"))
    return RunnerUse(
        minor_faults=int(fields[7]),
        major_faults=int(fields[9]),
        cpu_s=(int(fields[11]) + int(fields[12])) / 100,
        pss_bytes=None if pss is None else pss * 1024,
        swap_bytes=None if swap is None else swap * 1024,
        cgroup=cgroup[:500] if cgroup else None,
        cpuset=cpuset[:100] if cpuset else None,
    )
