"""``python -m tests.chaos``: kills, cuts and full disks at random; a table, and the same as JSON."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

import kvengine
from device_agents.deadline import Deadline
from tests.chaos.chaos import add_cuts, add_phones, add_real, run_cheap

OTHERS_S = 540.0  # rounds with Ray, phones and cut networks


def main() -> int:
    assert kvengine.__version__  # sets up onnxruntime before anything imports it
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=285, help="of cheap devices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of all random choices (default: a new one)")
    parser.add_argument("--within", type=float, default=870.0, help="seconds (default: %(default)s)")
    parser.add_argument("--cheap", action="store_true", help="no Ray and no virtual phones")
    parser.add_argument("--only", default="", help="faults with one of these in their name: PART,PART")
    parser.add_argument("--json", type=Path, default=Path("out") / "chaos.json", help="default: %(default)s")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    deadline = Deadline(options.within)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    cheap_s = options.within if options.cheap else max(60.0, options.within - OTHERS_S)
    report = run_cheap(options.rounds, seed, say, options.only, cheap_s)
    if not options.cheap:
        options.json.write_text(report.to_json())
        say(report.table())
        add_real(report, say, deadline, options.only)
        if not options.only:
            add_phones(report, say, deadline)
        add_cuts(report, say, deadline, options.only)
    options.json.write_text(report.to_json())
    say(f"{report.table()}\nalso in {options.json}")
    for line in report.wrong:
        say(f"wrong: {line}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
