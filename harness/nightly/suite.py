"""The suite in a process of its own, which ends with the night, however the night ends."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from device_agents.errors import InfrastructureError
from harness.nightly import child
from harness.nightly.parts import Night
from harness.store import DEFAULT_STORE
from harness.suite_process import SUITE, suite_command
from kvengine.codec import DecodeError, decode
from reports.results import RunResults

MEASUREMENTS = f"{SUITE}.test_measurements"
STOP_S = child.GRACE_S + 30.0  # for the suite to end by itself once it was asked to


def checks() -> tuple[str, ...]:
    """Modules of the suite that check; the one that measures is a part of its own."""
    found = importlib.util.find_spec(SUITE)
    assert found is not None
    names = (m.name for m in pkgutil.iter_modules(found.submodule_search_locations))
    return tuple(f"{SUITE}.{n}" for n in names if n.startswith("test_") and f"{SUITE}.{n}" != MEASUREMENTS)


def run_suite(
    night: Night, folder: Path, modules: Sequence[str], recipes: str, extra: Sequence[str]
) -> RunResults:
    """Run ``modules`` on the night's devices; the report goes to ``folder``.

    Raises:
        InfrastructureError: it ended without results.
    """
    settings = night.settings
    options: dict[str, object] = {
        "--devices": settings.devices,
        "--model": settings.model,
        "--recipes": recipes,
    }
    options |= {"--report": folder, "--store": settings.store or DEFAULT_STORE, "--farm": settings.farm}
    options |= {"--farm-address": settings.farm_address}
    arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
    command = suite_command(["-p", child.__name__, *arguments, *extra], modules)
    (folder / "results.json").unlink(missing_ok=True)  # of a night that was killed
    code = _run(command, settings.drill.mutant if settings.drill else "")
    try:
        return decode(RunResults, json.loads((folder / "results.json").read_text()), "results.json")
    except (OSError, DecodeError, ValueError) as error:
        raise InfrastructureError(
            f"the suite ended with exit code {code} and left no results in {folder}: {error}"
        ) from error


def _run(command: list[str], mutant: str) -> int:
    """Its exit code; its output goes to our stderr. Whatever ends us ends it."""
    theirs, ours = os.pipe()
    environment = os.environ | {child.PIPE: str(theirs)} | ({child.MUTANT: mutant} if mutant else {})
    try:
        process = subprocess.Popen(command, stdout=sys.stderr.fileno(), env=environment, pass_fds=(theirs,))
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    try:
        with process:
            try:
                return process.wait()
            except BaseException:
                os.close(ours)
                ours = -1
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
    finally:
        if ours >= 0:
            os.close(ours)
