"""How the farm scales: 1,000 simulated devices on 25 lab hosts do 20,000 jobs: ``python -m bench.scale``.

Every job goes through what a leg goes through: the scheduler gives it to a device, whose lease is renewed by
heartbeats; the lab agent (a Ray actor) deploys the artifact and opens a session, runs a workload there and
closes it; the result is in the store before the device gets its next job. Only the devices are simulated:
they take as long as recorded ones did, times ``--time-scale``.

For each number of devices a process of its own; prints a table, writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil

from bench.quiet import busy_seconds
from bench.scale_plot import draw
from bench.simulated_farm import SimulatedFarm, inventory_of
from device_agents.deadline import Deadline
from device_agents.simulated.recorded import Recorded, recording
from harness.artifacts import artifact_of
from harness.legs import tokens_digest
from harness.measuring import Shape, sample_info, workload_for
from harness.provenance import now, provenance
from harness.recipes import parse_recipe
from harness.scheduling import InOrder, Job, LongestFirst, MixedFirst, Scheduler
from harness.scheduling.bounds import perfect_s
from harness.scheduling.dispatch import Dispatcher, Done
from harness.spans import Recorder, recording_nothing
from harness.store import open_store
from harness.store.protocol import Span
from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.program import Measurement, Workload
from kvengine.spec import ModelSpec
from reports.results import LegResult, RunResults, VitalsInfo

LIKE = "virtual phone"
RECIPE = "hybrid,threads=1"
SHAPES = tuple(Shape(p, n) for p, n in itertools.product((16, 64, 128), (16, 64)))
REPEATS = (1, 2, 3, 5)
Kind = tuple[Shape, int]  # and repeats
SCHEDULERS: dict[str, type[LongestFirst | InOrder]] = {
    "mixed-first": MixedFirst,
    "longest-first": LongestFirst,
    "in-order": InOrder,
}
LIMIT_S = 1800.0
EVERY_S = 2.0  # progress, and memory is looked at


@dataclass(frozen=True)
class Settings:
    """jobs: for each device. mean_s: of a job, from which the time scale follows."""

    devices: int
    jobs: int
    mean_s: float
    failure_rate: float
    scheduler: str
    seed: int


@dataclass
class Point:
    """What one number of devices came to. Seconds and bytes; shares from 0 to 1.

    client_cpu_s: of this process from the first job to the last, all threads. agents_cpu_s: of the lab
    agents then. machine_busy: share of all cores. perfect_s: no schedule of the jobs as they turned out ends
    sooner. memory: (s, client, all agents) resident.
    """

    settings: Settings
    time_scale: float
    hosts: int
    start_s: float
    lease_s: float
    wall_s: float
    perfect_s: float
    busy_s: float
    client_cpu_s: float
    agents_cpu_s: float
    machine_busy: float
    stored: int
    lost: int
    retried: int
    set_aside: int
    overhead_ms: list[float]  # of a job, beyond its device's time: p50, p95, p99
    memory: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def job_count(self) -> int:
        return self.settings.devices * self.settings.jobs

    @property
    def cpu_ms(self) -> float:
        """Client CPU for each job."""
        return 1e3 * self.client_cpu_s / self.job_count

    @property
    def utilisation(self) -> float:
        """Against the perfect schedule."""
        return self.perfect_s / self.wall_s

    def growth(self, column: int) -> float:
        """Resident memory in the last fifth of the run over that in the second, less 1."""
        rows = [row for row in self.memory if row[column]]
        fifth = max(1, len(rows) // 5)
        early, late = rows[fifth : 2 * fifth] or rows, rows[-fifth:]
        return statistics.median(r[column] for r in late) / statistics.median(r[column] for r in early) - 1

    def summary(self) -> dict[str, float]:
        return {
            "jobs": self.job_count,
            "cpu_ms_per_job": round(self.cpu_ms, 3),
            "utilisation": round(self.utilisation, 4),
            "client_memory_growth": round(self.growth(1), 4),
            "agents_memory_growth": round(self.growth(2), 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--devices", default="10,100,1000", help="numbers of devices, one run each")
    parser.add_argument("--jobs", type=int, default=20, help="jobs for each device")
    parser.add_argument("--mean", type=float, default=8.0, help="seconds that a job takes, on average")
    parser.add_argument("--failure-rate", type=float, default=0.001, help="of calls; recorded: none failed")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="mixed-first")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("out") / "scale.json")
    parser.add_argument("--plot", type=Path, help="SVG to draw from all that is in the JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    counts = [int(text) for text in given.devices.split(",") if text]
    every = [
        Settings(count, given.jobs, given.mean, given.failure_rate, given.scheduler, given.seed)
        for count in counts
    ]
    if given.one:
        point = measure(every[0])
        sys.stdout.write(json.dumps(asdict(point) | {"summary": point.summary()}) + "\n")
        return
    found = json.loads(given.json.read_text())["points"] if given.json.exists() else []
    for settings in every:
        text = _in_a_process(settings)
        found = [each for each in found if each["settings"] != asdict(settings)] + [json.loads(text)]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        source = {"provenance": provenance(), "at": now(), "recorded": recording().provenance}
        given.json.write_text(json.dumps({**source, "points": found}) + "\n")
        sys.stdout.write(f"{settings.devices} devices: {json.dumps(found[-1]['summary'])}\n")
    if given.plot is not None:
        given.plot.write_text(draw(found))


def _in_a_process(settings: Settings) -> str:
    """Each number of devices has its own memory and its own Ray."""
    argv = [sys.executable, "-m", "bench.scale", "--one", "--devices", str(settings.devices)]
    argv += ["--jobs", str(settings.jobs), "--mean", str(settings.mean_s), "--seed", str(settings.seed)]
    argv += ["--failure-rate", str(settings.failure_rate), "--scheduler", settings.scheduler]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT_S)
    return done.stdout.splitlines()[-1]


def measure(settings: Settings) -> Point:
    """Start the farm, do the jobs, and see what it took."""
    # Every thread that waits for Ray looks for signals once a second; a thousand of them cost too much.
    os.environ.setdefault("RAY_get_check_signal_interval_milliseconds", "30000")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = artifact_of(
            synth("tiny-gemma3", folder / "tiny-gemma3"), parse_recipe(RECIPE), folder / "artifacts"
        )
        plan = Plan(settings, artifact)
        options = {
            "like": LIKE,
            "seed": str(settings.seed),
            "time_scale": f"{plan.time_scale!r}",
            "failure_rate": f"{settings.failure_rate!r}",
        }
        inventory = inventory_of(settings.devices, options)
        names = tuple(inventory.devices)
        began = time.monotonic()
        with SimulatedFarm(inventory, names, folder) as farm:
            farm.start()
            started = time.monotonic()
            _say(f"{len(inventory.labs)} lab agents started in {started - began:.1f} s")
            for device in names:
                farm.lease(device)
            leased = time.monotonic()
            _say(f"{len(names)} devices leased in {leased - started:.1f} s")
            return _run(plan, farm, names, folder, len(inventory.labs), started - began, leased - started)


class Plan:
    """The jobs: each a workload of one of several shapes, drawn by the seed."""

    def __init__(self, settings: Settings, artifact: Artifact) -> None:
        self.settings, self.artifact = settings, artifact
        recorded = recording().of(LIKE)
        draws = random.Random(settings.seed)
        count = settings.devices * settings.jobs
        kinds = list(itertools.product(SHAPES, REPEATS))
        drawn = [draws.choice(kinds) for _ in range(count)]
        self.kinds = {f"job-{number:05}": kind for number, kind in enumerate(drawn)}
        self._workloads = {kind: _workload(artifact.manifest.spec, kind) for kind in kinds}
        expected = {kind: expected_s(recorded, self._workloads[kind]) for kind in kinds}
        self.time_scale = settings.mean_s / statistics.fmean(expected[kind] for kind in drawn)
        self.jobs = [Job(id_, expected[kind] * self.time_scale) for id_, kind in self.kinds.items()]

    def workload(self, job: Job) -> Workload:
        return self._workloads[self.kinds[job.id]]

    def scheduler(self) -> Scheduler:
        scheduler: Scheduler = SCHEDULERS[self.settings.scheduler]()
        for job in self.jobs:
            scheduler.add(job)
        return scheduler


def expected_s(recorded: Recorded, workload: Workload) -> float:
    """What a long history would tell: the mean, unscaled."""
    ttft = recorded.ttft_ms.mean * len(workload.prompt) / recorded.prompt
    generation = ttft + recorded.itl_ms.mean * (workload.new_tokens - 1)
    return recorded.open_s.mean + (workload.repeats + workload.warmup) * generation / 1e3


def _workload(spec: ModelSpec, kind: Kind) -> Workload:
    shape, repeats = kind
    return workload_for(spec, shape.prompt, shape.new_tokens, repeats, seed=0)


def _run(
    plan: Plan,
    farm: SimulatedFarm,
    names: tuple[str, ...],
    folder: Path,
    hosts: int,
    start_s: float,
    lease_s: float,
) -> Point:
    settings, recipe = plan.settings, parse_recipe(RECIPE)
    run_id = "scale"
    busy: list[float] = []
    beyond: list[float] = []
    retried = 0

    def work(device: str, job: Job) -> tuple[LegResult, Span]:
        at, began = time.time(), time.monotonic()
        with farm.open(device, plan.artifact, recipe.session) as session:
            measured = session.run_workload(plan.workload(job))
            notes = session.info.notes
        device_s = measured.ended_s * plan.time_scale
        busy.append(device_s)
        beyond.append(1e3 * (time.monotonic() - began - device_s))
        span = Span(device, "leg", job.id, at, time.time(), "INVALID")
        return _row(plan, device, job, measured, notes), farm.recorder.whole(span)

    with open_store(folder / "results.db") as store:
        store.begin_run(_header(run_id, settings))
        farm.recorder = Recorder(partial(store.add_span, run_id))

        def keep(done: Done[tuple[LegResult, Span]]) -> None:
            nonlocal retried
            retried += bool(done.retries)
            store.add_leg(run_id, *done.result)

        watch = _Watch(len(plan.jobs))
        scheduler = plan.scheduler()
        dispatcher = Dispatcher(scheduler, names, work, keep, watch.ended)
        cpu, machine, agents = time.process_time(), busy_seconds(), _agents_cpu()
        with watch.watching() as began:
            dispatcher.run(Deadline(LIMIT_S))
            wall = time.monotonic() - began
        cpu, machine = time.process_time() - cpu, busy_seconds() - machine
        agents = _agents_cpu() - agents
        store.finish_run(run_id, now())
        farm.recorder = recording_nothing()  # the store goes before the farm
        stored = len(store.results(run_id).legs)
    cuts = statistics.quantiles(beyond, n=100)
    return Point(
        settings=settings,
        time_scale=plan.time_scale,
        hosts=hosts,
        start_s=start_s,
        lease_s=lease_s,
        wall_s=wall,
        perfect_s=perfect_s(busy, settings.devices),
        busy_s=sum(busy),
        client_cpu_s=cpu,
        agents_cpu_s=agents,
        machine_busy=machine / wall / (os.cpu_count() or 1),
        stored=stored,
        lost=len(dispatcher.lost),
        retried=retried,
        set_aside=len(dispatcher.set_aside),
        overhead_ms=[cuts[49], cuts[94], cuts[98]],
        memory=watch.memory,
    )


def _row(plan: Plan, device: str, job: Job, measured: Measurement, notes: tuple[str, ...]) -> LegResult:
    shape, _ = plan.kinds[job.id]
    return LegResult(
        device=device,
        recipe=RECIPE,
        model="tiny-gemma3",
        workload=shape.label,
        prompt_tokens=shape.prompt,
        new_tokens=shape.new_tokens,
        load_ms=measured.load_ms,
        samples=tuple(sample_info(sample) for sample in measured.samples),
        peak_rss_bytes=measured.peak_rss_bytes,
        kv_bytes=measured.kv_bytes,
        nodes_by_provider=measured.nodes_by_provider,
        threads=measured.threads,
        validity="INVALID",
        reasons=("simulated device",),
        vitals_before=VitalsInfo(at=0.0),
        vitals_after=VitalsInfo(at=0.0),
        provenance={
            "job": job.id,
            "artifact": plan.artifact.id,
            "tokens": tokens_digest(measured.samples),
        },
        notes=notes,
    )


def _header(run_id: str, settings: Settings) -> RunResults:
    return RunResults(
        run_id=run_id,
        started_at=now(),
        finished_at=None,
        command="python -m bench.scale",
        seed=settings.seed,
        model="tiny-gemma3",
        reference="none: simulated devices",
        provenance=provenance(),
        devices=(),
        recipes=(),
        checks=(),
        legs=(),
        planned_checks=0,
        planned_legs=settings.devices * settings.jobs,
    )


class _Watch:
    """Progress, and memory over the run."""

    def __init__(self, jobs: int) -> None:
        self._jobs, self._done = jobs, 0
        self.memory: list[tuple[float, int, int]] = []
        self._stopped = threading.Event()

    def ended(self, device: str, job: Job) -> None:
        self._done += 1

    @contextmanager
    def watching(self) -> Iterator[float]:
        """When it began, monotonic seconds."""
        began = time.monotonic()
        thread = threading.Thread(target=self._look, args=(began,), daemon=True)
        thread.start()
        try:
            yield began
        finally:
            self._stopped.set()
            thread.join()

    def _look(self, began: float) -> None:
        client, agents = psutil.Process(), _agents()
        while not self._stopped.wait(EVERY_S):
            at, done = time.monotonic() - began, self._done
            resident = sum(agent.memory_info().rss for agent in agents)
            self.memory.append((round(at, 2), client.memory_info().rss, resident))
            left = f", about {at / done * (self._jobs - done):.0f} s left" if done else ""
            _say(f"{done} of {self._jobs} jobs after {at:.0f} s{left}")


def _agents() -> list[psutil.Process]:
    """The processes of the lab agents: of Ray's workers, those that have an actor."""
    descendants = psutil.Process().children(recursive=True)
    return [process for process in descendants if process.name().startswith("ray::HostActor")]


def _agents_cpu() -> float:
    return sum(sum(agent.cpu_times()[:2]) for agent in _agents())


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
