"""Running the machine's own tools: dpkg-deb, pip. Bounded in time, errors typed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from device_agents.api import RunResult
from device_agents.errors import BundleError

_TAIL_LINES = 12


def run(
    argv: Sequence[str | Path],
    *,
    within_s: float,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """The finished command, whatever its exit code. environment: what is added to ours.

    Raises:
        BundleError: it cannot be started, or is not done within ``within_s`` seconds.
    """
    name = Path(argv[0]).name
    try:
        return subprocess.run(
            argv,
            input=b"" if stdin is None else stdin,
            capture_output=True,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            timeout=within_s,
            check=False,
        )
    except FileNotFoundError as error:
        if folder is not None and not folder.exists():
            raise
        raise BundleError(
            f"sought the program {name}, found none; "
            f"bundles are made on Debian and what derives from it: {error}"
        ) from error
    except OSError as error:
        raise BundleError(f"cannot start {name}: {error}") from error
    except subprocess.TimeoutExpired:
        raise BundleError(
            f"{name} was not done within {within_s:g} s; is the network slow? try again"
        ) from None


def said(*results: subprocess.CompletedProcess[bytes] | RunResult) -> str:
    """The last lines of what commands wrote, errors first."""
    parts = (part for result in results for part in (result.stderr, result.stdout))
    lines = [line for part in parts for line in part.decode(errors="replace").splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith(("E:", "W:", "Err:", "ERROR", "dpkg"))]
    return "\n".join((complaints or lines)[-_TAIL_LINES:]) or "(it said nothing)"
