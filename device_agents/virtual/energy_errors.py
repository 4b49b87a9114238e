"""`python -m device_agents.virtual.energy_errors`: how far off is energy for each token, for each profile?

Simulated phones in simulated time, against their truth; a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from device_agents.virtual.profile import load_profile, profile_names
from device_agents.virtual.simulated import Trial, run_trial


def row(name: str, seeds: int) -> str:
    """One profile: how many of ``seeds`` gave a number, how far off they were, why the others gave none."""
    trials: list[Trial] = [run_trial(load_profile(name), seed) for seed in range(seeds)]
    errors = [abs(trial.error) for trial in trials if trial.error is not None]
    rungs = sorted({trial.energy.rung for trial in trials if trial.error is not None})
    reasons = [trial.energy.reason for trial in trials if trial.error is None]
    reason = statistics.mode(reasons) if reasons else ""
    off = f"{statistics.median(errors):.2%} | {max(errors):.2%}" if errors else "— | —"
    return f"| {name} | {len(errors)}/{seeds} | {', '.join(rungs)} | {off} | {reason} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="phones of each profile (default: %(default)s)")
    seeds = parser.parse_args().seeds
    tell = sys.stdout.write
    tell("| profile | numbers | rung | median error | worst error | reason of the others |\n")
    tell("|---|---|---|---|---|---|\n")
    for name in profile_names():
        tell(row(name, seeds) + "\n")


if __name__ == "__main__":
    main()
