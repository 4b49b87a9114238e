"""Python source to .pyc, the same bytes on every lab host.

Not by the Python that runs us: its version may be another, and 3.11.2 and 3.11.9 may compile
differently. The locked CPython of the lab host's own architecture does it; bytecode knows no
architecture. The paths inside are the bundle's, not this machine's.
"""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from device_agents.bundle.commands import run, said
from device_agents.bundle.lock import PLATFORMS, PYTHON, Abi
from device_agents.errors import BundleError

# A fixed number, each a process of its own: what one compiles never depends on how many cores are here.
_PARTS = 4
_COMPILE_S = 300.0

_SCRIPT = """
import json, py_compile, sys
unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
for source, target, name in json.load(sys.stdin):
    py_compile.compile(source, target, name, doraise=True, optimize=0, invalidation_mode=unchecked)
"""


@dataclass(frozen=True)
class Unit:
    """One module. name: the path that tracebacks show."""

    source: Path
    target: Path
    name: str


def host_abi() -> Abi:
    """The ABI of this machine. Raises BundleError where no bundle can be made."""
    for abi, known in PLATFORMS.items():
        if platform.system() == "Linux" and platform.machine() == known.machine:
            return abi
    raise BundleError(
        "bundles are made on Linux on x86_64 or aarch64, "
        f"found {platform.system()} on {platform.machine()}; use --runtime DIR with a runtime of your own"
    )


def compile_all(
    compiler: Path, abi: Abi, units: list[Unit], progress: Callable[[int, int], None] | None = None
) -> None:
    """compiler: folder of the unpacked COMPILER_DEBS for ``abi``, this machine's.

    Raises:
        BundleError: a source that does not compile.
    """
    known = PLATFORMS[abi]
    libraries = compiler / "lib" / known.triplet
    binary = compiler / "usr/bin" / f"python{PYTHON}"
    paths = f"{libraries}:{compiler / 'usr/lib' / known.triplet}"
    argv = (
        libraries / known.loader,
        "--inhibit-cache",
        "--library-path",
        paths,
        binary,
        "-P",
        "-S",
        "-c",
        _SCRIPT,
    )
    clean = {"LD_PRELOAD": "", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**clean, "PYTHONHOME": str(compiler / "usr"), "PYTHONHASHSEED": "0"}
    for unit in units:
        unit.target.parent.mkdir(parents=True, exist_ok=True)
    done, lock = 0, threading.Lock()

    def compile_part(part: list[Unit]) -> None:
        nonlocal done
        job = json.dumps([[str(u.source), str(u.target), u.name] for u in part]).encode()
        result = run(argv, within_s=_COMPILE_S, environment=environment, stdin=job)
        if result.returncode:
            raise BundleError(f"cannot compile to .pyc: {said(result)}")
        with lock:
            done += len(part)
            if progress is not None:
                progress(done, len(units))

    ordered = sorted(units, key=lambda u: u.name)
    with ThreadPoolExecutor(_PARTS) as pool:
        list(pool.map(compile_part, filter(None, (ordered[i::_PARTS] for i in range(_PARTS)))))
