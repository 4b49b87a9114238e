"""How much sooner four phones are done than one: ``python -m bench.parallel``.

Virtual phones (real adbd, real adb) whose links have a stated latency, so that the suite waits for links and
not for this machine's two cores; phones of one's own have cores of their own. The same programs run on one
phone and on all of them, in turn, through Farm, LabAgent, scheduler and store; phones are up and sessions
open before the clock starts, so what is compared is the work. Prints each round, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from device_agents.deadline import Deadline
from harness.artifacts import artifact_of
from harness.farm import Farm
from harness.inventory import DeviceEntry, Inventory
from harness.programs import Limits, any_sequence
from harness.provenance import now, provenance
from harness.recipes import parse_recipe
from harness.scheduling import Job, LongestFirst
from harness.scheduling.dispatch import Dispatcher, Done
from harness.store import SqlStore, open_store
from harness.synth import synth
from kvengine.program import Program
from kvengine.session import EngineSession
from kvengine.spec import ModelSpec
from reports.results import CheckResult, RunResults

RECIPE = "hybrid,threads=1"
BOUND = 0.35
LIMIT_S = 600.0


def main() -> int:
    """Exit code 0: the bound is met in every round; 1: it is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--phones", type=int, default=4)
    parser.add_argument("--latency-ms", type=float, default=50.0, help="of each link, in each direction")
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    names = tuple(f"phone-{number}" for number in range(1, asked.phones + 1))
    options = {"virtual": "true", "latency_ms": f"{asked.latency_ms:g}"}
    inventory = Inventory(devices={name: DeviceEntry("android", options=options) for name in names})
    rounds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder_name, ExitStack() as stack:
        folder = Path(folder_name)
        artifact = artifact_of(
            synth("tiny-gemma3", folder / "tiny-gemma3"), parse_recipe(RECIPE), folder / "artifacts"
        )
        programs = drawn(artifact.manifest.spec, asked.programs)
        store = stack.enter_context(open_store(folder / "results.db"))
        farm = stack.enter_context(Farm(inventory, names, root=folder / "lab"))
        _say("phones start, and get their bundles over their slow links: about two minutes")
        with ThreadPoolExecutor(len(names)) as pool:
            opened = pool.map(lambda name: farm.open(name, artifact, parse_recipe(RECIPE).session), names)
            sessions = dict(zip(names, opened, strict=True))
        _say(f"{len(names)} phones are up, {asked.latency_ms:g} ms in each direction")
        for number in range(asked.rounds):
            # Now the one is first, now the many: what drifts meanwhile hits both.
            order = [names[:1], names][:: -1 if number % 2 else 1]
            took = {
                len(some): suite(store, f"{number}-{len(some)}", programs, sessions, some) for some in order
            }
            rounds.append((took[1], took[len(names)]))
            one, many = rounds[-1]
            _say(f"round {number + 1}: one {one:.2f} s, {len(names)} {many:.2f} s, ratio {many / one:.3f}")
    ratios = [many / one for one, many in rounds]
    found = {
        "at": now(),
        "provenance": provenance(),
        "phones": asked.phones,
        "latency_ms": asked.latency_ms,
        "programs": asked.programs,
        "rounds": [{"one_s": round(one, 3), "all_s": round(many, 3)} for one, many in rounds],
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "bound": BOUND,
        "met": max(ratios) <= BOUND,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["met"] else 1


def drawn(spec: ModelSpec, count: int) -> list[Program]:
    """Programs of the correctness suite, the same each time."""
    found: list[Program] = []

    @seed(7)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(any_sequence(Limits.of(spec)))
    def each(program: Program) -> None:
        found.append(program)

    each()
    random.Random(7).shuffle(found)  # Hypothesis begins with short ones
    return found


def suite(
    store: SqlStore,
    run_id: str,
    programs: Sequence[Program],
    sessions: Mapping[str, EngineSession],
    devices: Sequence[str],
) -> float:
    """Every program on one of the devices, each result stored; seconds."""
    store.begin_run(_header(run_id, len(programs)))
    scheduler = LongestFirst()
    for number, program in enumerate(programs):
        scheduler.add(Job(f"program {number}", len(program.operations), frozenset(devices)))

    def work(device: str, job: Job) -> CheckResult:
        began = time.monotonic()
        sessions[device].run_program(programs[int(job.id.split()[1])])
        return _row(device, job, time.monotonic() - began)

    def keep(done: Done[CheckResult]) -> None:
        store.add_check(run_id, done.result)

    dispatcher = Dispatcher(scheduler, devices, work, keep)
    began = time.monotonic()
    dispatcher.run(Deadline(LIMIT_S))
    took = time.monotonic() - began
    stored = len(store.results(run_id).checks)
    if stored != len(programs) or dispatcher.lost:
        raise RuntimeError(f"sought {len(programs)} results, found {stored}; lost: {dispatcher.lost}")
    return took


def _row(device: str, job: Job, seconds: float) -> CheckResult:
    return CheckResult(device, RECIPE, job.id, job.id, "passed", seconds, 1, None, None)


def _header(run_id: str, checks: int) -> RunResults:
    return RunResults(
        run_id=run_id,
        started_at=now(),
        finished_at=None,
        command="python -m bench.parallel",
        seed=7,
        model="tiny-gemma3",
        reference="none: nothing is compared",
        provenance={},
        devices=(),
        recipes=(),
        checks=(),
        legs=(),
        planned_checks=checks,
        planned_legs=0,
    )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
