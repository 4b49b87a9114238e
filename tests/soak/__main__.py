"""``python -m tests.soak``: every fault, many times; a table, and the same as JSON; exit code 1 if wrong."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path

from device_agents.bundle import build
from device_agents.virtual.rootfs import native_abi
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.export import export
from tests.soak.faults import REAL
from tests.soak.soak import run_soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="of each fault (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of all random choices (default: a new one)")
    parser.add_argument("--phones", type=int, default=3, help="that are struck, besides the witness")
    parser.add_argument("--within", type=float, default=870.0, help="seconds to strike in")
    parser.add_argument("--only", default="", help="faults with this in their name")
    parser.add_argument(
        "--real-freezes",
        action="store_true",
        help="only frozen links, of 10 s and 90 s, against the budgets that a release runs with",
    )
    parser.add_argument("--json", type=Path, default=Path("out") / "soak.json", help="default: %(default)s")
    options = parser.parse_args()
    bundle = build(native_abi(), Path(".kvfarm") / "bundles")
    with tempfile.TemporaryDirectory(prefix="kvfarm-soak-model-") as folder:
        checkpoint = synth("tiny-gemma3", Path(folder) / "checkpoint")
        artifact = export(checkpoint, Path(folder) / "artifact", parse_recipe("hybrid").export)
        report = run_soak(
            bundle,
            artifact,
            times=options.times,
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            struck=options.phones,
            within_s=options.within,
            only="frozen" if options.real_freezes else options.only,
            scale=REAL if options.real_freezes else None,
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(report.to_json())
    sys.stdout.write(f"{report.table()}\nalso in {options.json}\n")
    for line in report.wrong:
        sys.stdout.write(f"wrong: {line}\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
