"""What is wrong with the machine that pytest runs on: its disk and memory, Ray, the reference.

What may hang or dies badly (Ray, torch) is tried in a process of its own, which a deadline ends.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import kvengine
from device_agents import scratch
from device_agents.api import Finding
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from device_agents.local import LocalTransport
from device_agents.vitals import read_vitals

GIB = 1 << 30
NEEDED_BYTES, AMPLE_BYTES = 2 * GIB, 10 * GIB  # a 1B model: 4 GB as float32, its artifacts 1 to 4 GB each
NEEDED_MEMORY = 2 * GIB
RAY_S, REFERENCE_S = 60.0, 120.0
# What crosses it: 8 MiB pieces of artifacts and the logits of one program at a time. More spills to disk.
OBJECT_STORE_BYTES = 256 << 20
_INSTALL = "pip install 'kvfarm[all]' (a lab host alone: kvfarm[agent])"


def host(cache: Path) -> tuple[Finding, ...]:
    """Versions, and room for what kvfarm keeps in ``cache``."""
    system = platform.platform(terse=True)
    text = f"kvfarm {kvengine.__version__}, Python {platform.python_version()}, {system}"
    return (Finding("versions", "ok", text), _space(cache), _memory(), _agent(cache / "lab"))


def ray_starts(address: str | None, deadline: Deadline) -> tuple[Finding, ...]:
    """Whether Ray starts, or the cluster at ``address`` can be joined; what killed runs left of it."""
    # Before it is tried, for the next Ray removes the folders; and what ends by itself is no trouble.
    left, folders = orphans(), abandoned_folders()
    began = time.monotonic()
    tried = _try("starts", ["ray", *([address] if address else [])], min(deadline.remaining, RAY_S))
    if tried.state == "ok":
        tried = replace(tried, found=f"{tried.found}, {time.monotonic() - began:.1f} s")
    return (tried, *_shared_memory(), _leftovers(left & orphans(), folders))


def reference(deadline: Deadline) -> tuple[Finding, ...]:
    """Whether torch and transformers are there and compute."""
    return (_try("imports", ["reference"], min(deadline.remaining, REFERENCE_S)),)


def orphans(proc: Path = Path("/proc")) -> set[int]:
    """Processes of Ray, and adb servers of virtual phones, whose kvfarm process is gone."""
    found = set()
    for entry in proc.iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                if scratch.is_of_the_dead(command, proc):
                    found.add(int(entry.name))
    return found


def abandoned_folders(proc: Path = Path("/proc"), base: Path | None = None) -> list[Path]:
    """Temporary folders whose kvfarm process is gone."""
    return list(scratch.abandoned(base or Path(tempfile.gettempdir()), proc))


def _leftovers(pids: set[int], folders: list[Path]) -> Finding:
    if pids:
        numbers = " ".join(map(str, sorted(pids)))
        return Finding("leftovers", "fix", f"processes of killed runs: {numbers}", f"kill {numbers}")
    if folders:
        text = f"{len(folders)} folders of killed runs in {folders[0].parent}"
        return Finding("leftovers", "note", text, "the next run removes them")
    return Finding("leftovers", "ok", "none of killed runs")


def _try(what: str, arguments: list[str], seconds: float) -> Finding:
    """``main`` with ``arguments``, in a process of its own."""
    argv = [sys.executable, "-P", "-m", "harness.this_machine", *arguments]
    try:
        done = LocalTransport().run(argv, Deadline(seconds))
    except DeadlineExceeded:
        return Finding(what, "fix", f"hangs: killed after {seconds:g} s", "if the machine is busy, ask again")
    except InfrastructureError as error:
        return Finding(what, "fix", str(error), "see the message")
    if done.returncode == 0:
        return Finding(what, "ok", done.stdout.decode(errors="replace").strip())
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    reason = lines[-1].removeprefix("device_agents.errors.InfrastructureError: ")
    missing = "No module named" in reason
    return Finding(what, "fix", reason[:400], _INSTALL if missing else "see the message")


def _space(cache: Path) -> Finding:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            free = shutil.disk_usage(cache).free
    except OSError as error:
        found = f"{cache.absolute()}: {error.strerror}"
        return Finding("space", "fix", found, "run kvfarm in a folder that you may write to")
    found = f"{free / GIB:,.1f} GiB free for {cache.absolute()}"
    if free < NEEDED_BYTES:
        return Finding("space", "fix", found, f"free {NEEDED_BYTES / GIB:.0f} GiB")
    if free < AMPLE_BYTES:
        return Finding("space", "note", found, "enough for small models only")
    return Finding("space", "ok", found)


def _memory() -> Finding:
    available = read_vitals().mem_available_bytes
    if available is None:
        return Finding("memory", "note", "not told by /proc/meminfo")
    found = f"{available / GIB:,.1f} GiB available"
    if available < NEEDED_MEMORY:
        return Finding("memory", "note", found, "close other programs; a 1B reference takes 5 GiB")
    return Finding("memory", "ok", found)


def _agent(root: Path) -> Finding:
    """Whether a run has the devices of this folder now: its lab agent holds a lock."""
    with suppress(OSError), (root / "agent.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("lease", "note", "a run in this folder has its devices now", "wait for its end")
    return Finding("lease", "ok", "no run in this folder has devices")


def _shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Docker gives 64 MiB by default; Ray then keeps its objects on the disk."""
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < OBJECT_STORE_BYTES:
            text = f"{free >> 20} MiB free in {folder}, Ray wants {OBJECT_STORE_BYTES >> 20}"
            yield Finding("shared memory", "note", text, "slower; in Docker: --shm-size=1g")


def main() -> None:
    """ray [ADDRESS] or reference: use it once, say its versions."""
    if sys.argv[1] == "ray":
        import ray

        from harness.cluster import ensure_ray

        with ensure_ray(sys.argv[2] if sys.argv[2:] else None) as connection:
            how = "joined at" if connection.joined else "at"
            sys.stdout.write(f"Ray {ray.__version__} {how} {ray.get_runtime_context().gcs_address}\n")
    else:
        from harness.reference.transformers_reference import libraries

        torch, transformers = libraries()
        if float(torch.ones(4) @ torch.ones(4)) != 4:
            sys.exit(f"torch {torch.__version__} computes wrongly; install it again")
        sys.stdout.write(f"torch {torch.__version__}, transformers {transformers.__version__}\n")


if __name__ == "__main__":
    main()
