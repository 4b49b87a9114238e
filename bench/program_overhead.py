"""What a program costs more on a virtual phone than on this host: ``python -m bench.program_overhead``.

The same program by turns on both runners; what adb and the relay add is the difference.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from device_agents.adb.devices import make_android
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.host import HostDevice
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.export import export
from kvengine.program import Prefill, Program, Reset
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession

PROGRAM = Program(32, (Prefill((1, 2, 3, 4)), Reset(), Prefill(tuple(range(20)))))
RECIPE = SessionRecipe(threads=1)
MOST_MS = 30.0  # sought
START_S = 300.0  # the first time parts of the phone are fetched


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=200, help="(default: %(default)s)")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extra = measure(folder, times)
    cuts = statistics.quantiles(extra, n=100)
    sys.stdout.write(
        f"a program on a virtual phone costs {cuts[49]:+.1f} ms more than on the host (p95 {cuts[94]:+.1f}, "
        f"most {max(extra):+.1f}; {times} of each by turns; sought: at most {MOST_MS:g} ms)\n"
    )
    return 0 if cuts[94] <= MOST_MS else 1


def measure(folder: Path, times: int) -> list[float]:
    """ms, of each pair: the phone's program less the host's."""
    checkpoint = synth("tiny-gemma3", folder / "tiny-gemma3")
    artifact = export(checkpoint, folder / "artifact", parse_recipe("hybrid").export)
    config = DeviceConfig("virtual", "android", options={"virtual": "true"})
    host, deadline = HostDevice("host", folder / "host"), Deadline(START_S)
    with closing(make_android(config, Path(".kvfarm") / "lab")) as phone:
        there_id, here_id = phone.deploy(artifact.folder, deadline), host.deploy(artifact.folder, deadline)
        with (
            closing(phone.open_session(there_id, RECIPE, deadline)) as there,
            closing(host.open_session(here_id, RECIPE, deadline)) as here,
        ):
            for session in (there, here):
                _ms(session)
            return [_ms(there) - _ms(here) for _ in range(times)]


def _ms(session: EngineSession) -> float:
    began = time.perf_counter()
    session.run_program(PROGRAM)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
