"""Record how long real devices take, for those that are simulated: ``python -m bench.record --artifact DIR``.

Opens an artifact in fresh runners on this host and on a virtual phone, through the lab agent that runs them
in a farm (without Ray, which a simulated farm has for itself), runs programs of the correctness suite and
workloads, and writes quantiles of what was timed to device_agents/simulated/recorded.json. Progress goes to
stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from device_agents.api import DeviceIdentity
from device_agents.config import DeviceConfig
from device_agents.errors import InfrastructureError
from device_agents.lab_agent import LabAgent
from device_agents.simulated import recorded
from device_agents.simulated.recorded import Quantiles, Recorded, Recording
from harness.farm import CHUNK_BYTES
from harness.measuring import workload_for
from harness.programs import Limits, any_sequence
from harness.provenance import now, provenance
from kvengine.artifact import Artifact
from kvengine.codec import encode
from kvengine.program import Program, Workload
from kvengine.recipe import SessionRecipe

T = TypeVar("T")
SESSION = SessionRecipe(threads=2)
PROMPT, NEW_TOKENS = 128, 64
LEVELS = 50
KINDS = {
    "host": DeviceConfig("host"),
    "virtual phone": DeviceConfig("virtual", "android", options={"virtual": "true"}),
}


@dataclass
class Timings:
    """Of one device. calls: into the device; failures: those that infrastructure stopped."""

    open_s: list[float] = field(default_factory=list)
    program_s: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    peak_rss_bytes: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    calls: int = 0
    failures: int = 0


class Recorder:
    """One leased device of ``agent``, and what calls to it took."""

    def __init__(self, agent: LabAgent, device: str, artifact: Artifact) -> None:
        self._agent, self._device, self._artifact = agent, device, artifact
        self.timings = Timings()
        self._lease = agent.acquire(device, "bench.record", 3600.0)
        for blob in agent.missing_blobs(artifact.manifest.to_json()):
            name = next(b.name for b in artifact.manifest.blobs if b.sha256 == blob.sha256)
            _send(agent, blob.sha256, artifact.folder / name)
            agent.commit_blob(blob.sha256)
        agent.claim(device, self._lease.token)
        agent.deploy(device, self._lease.token, artifact.manifest.to_json())

    def session(self, programs: int, number: int) -> None:
        """A fresh runner: programs, one workload, closed."""
        agent, token, seen = self._agent, self._lease.token, self.timings
        session, info = self._timed(
            seen.open_s, lambda: agent.open_session(self._device, token, self._artifact.id, SESSION)
        )
        seen.load_ms.append(info.load_ms)
        limits = Limits.of(self._artifact.manifest.spec)

        @seed(number)
        @settings(
            max_examples=programs,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(any_sequence(limits))
        def each(program: Program) -> None:
            self._timed(seen.program_s, lambda: agent.run_program(session, token, program))

        each()
        workload: Workload = workload_for(self._artifact.manifest.spec, PROMPT, NEW_TOKENS, 3, number)
        measured = self._timed([], lambda: agent.run_workload(session, token, workload))
        seen.ttft_ms += [sample.ttft_ms for sample in measured.samples]
        seen.itl_ms += [gap for sample in measured.samples for gap in sample.itl_ms]
        seen.peak_rss_bytes.append(measured.peak_rss_bytes)
        seen.kv_bytes = measured.kv_bytes
        agent.close_session(session, token)

    def _timed(self, into: list[float], call: Callable[[], T]) -> T:
        self.timings.calls += 1
        began = time.perf_counter()
        try:
            found = call()
        except InfrastructureError:
            self.timings.failures += 1
            raise
        into.append(time.perf_counter() - began)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--artifact", type=Path, required=True, help="folder that an export wrote")
    parser.add_argument("--sessions", type=int, default=20, help="fresh runners on each device")
    parser.add_argument("--programs", type=int, default=25, help="in each of them")
    parser.add_argument("-o", type=Path, default=Path(recorded.__file__).with_name(recorded.FILE))
    given_ = parser.parse_args()
    kinds: dict[str, Recorded] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = Artifact.open(given_.artifact)
        agent = LabAgent(folder / "lab", tuple(KINDS.values()))
        try:
            for kind, config in KINDS.items():
                identity = agent.identity(config.name)
                recorder = Recorder(agent, config.name, artifact)
                began = time.monotonic()
                for number in range(given_.sessions):
                    recorder.session(given_.programs, number)
                    left = (time.monotonic() - began) / (number + 1) * (given_.sessions - number - 1)
                    sys.stderr.write(
                        f"{kind}: runner {number + 1} of {given_.sessions}, about {left:.0f} s left\n"
                    )
                kinds[kind] = _recorded(kind, identity, recorder.timings)
        finally:
            agent.shutdown()
    source = {
        **{name: value for name, value in provenance().items() if name not in ("transformers", "torch")},
        "recorded": now(),
        "command": f"python -m bench.record --sessions {given_.sessions} --programs {given_.programs}",
        "model": f"{artifact.manifest.checkpoint}, weights {artifact.manifest.recipe.weights}, cache "
        f"{artifact.manifest.recipe.cache.kind}, {SESSION.threads} threads",
        "workload": f"prompt {PROMPT} + {NEW_TOKENS} new",
    }
    text = json.dumps(encode(Recording(source, kinds)), indent=1)
    given_.o.write_text(re.sub(r"\n +(?=[-\d\]])", " ", text) + "\n")  # a list a line


def _send(agent: LabAgent, sha256: str, path: Path) -> None:
    with path.open("rb") as file:
        while (piece := file.read(CHUNK_BYTES)) or not file.tell():
            agent.put_chunk(sha256, file.tell() - len(piece), piece)
            if not piece:
                break


def _recorded(kind: str, identity: DeviceIdentity, seen: Timings) -> Recorded:
    what = "a host" if kind == "host" else f"a {kind}"
    return Recorded(
        what=what,
        prompt=PROMPT,
        open_s=_quantiles(seen.open_s),
        program_s=_quantiles(seen.program_s),
        load_ms=_quantiles(seen.load_ms),
        ttft_ms=_quantiles(seen.ttft_ms),
        itl_ms=_quantiles(seen.itl_ms),
        peak_rss_bytes=_quantiles(seen.peak_rss_bytes),
        kv_bytes=seen.kv_bytes,
        calls=seen.calls,
        failures=seen.failures,
        ram_bytes=identity.ram_bytes,
        cores=identity.cores,
        abi=identity.abi,
    )


def _quantiles(values: list[float]) -> Quantiles:
    # Not up to the most ever seen: one outlier of thousands would be drawn as a tail.
    found = np.quantile(values, (np.arange(LEVELS) + 0.5) / LEVELS)
    return Quantiles(tuple(float(f"{value:.5g}") for value in found), len(values))


if __name__ == "__main__":
    main()
