"""Going on with a run that something ended: what it was asked, whether it may go on, what of it is done."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import kvengine
from device_agents.errors import InfrastructureError
from harness.errors import CannotResume
from harness.handover import Planned
from harness.provenance import without_password
from harness.recipes import Recipe
from harness.store.protocol import Store
from reports.results import CheckResult, DeviceInfo, LegResult, RunRequest, RunResults

OPTION = "--kvfarm-resume"
_WHOLE_BYTES = 16 << 20  # of a larger file the size and the time stand for the content
_FINAL = ("passed", "failed", "not_supported")


class Done(NamedTuple):
    """A check that has its result."""

    device: str
    recipe: str
    check: str


def request(
    arguments: Iterable[str], folder: Path, devices: tuple[str, ...], subjects: dict[str, str]
) -> RunRequest:
    """As it is stored: without --store and what of passwords may be in other words."""
    kept, skip = list[str](), False
    for word in arguments:
        if skip:
            skip = False
        elif word in ("--store", OPTION):
            skip = True
        elif not word.startswith(("--store=", f"{OPTION}=")):
            kept.append(without_password(word))
    return RunRequest(tuple(kept), str(folder), devices, subjects)


def subjects(models: Iterable[Path], recipes: Iterable[Recipe]) -> dict[str, str]:
    """A digest of each checkpoint, of each foreign model and of the engine's source: what a run tests."""
    foreign = [recipe.foreign.path for recipe in recipes if recipe.foreign is not None]
    paths = [Path(kvengine.__file__).parent, *models, *foreign]
    return {str(path.absolute()): _digest(path) for path in paths}


def find(store: Store, run_id: str | None) -> RunResults:
    """The run to go on with; None: the newest that is not finished.

    Raises:
        CannotResume: there is none, it is finished, or is no run over devices.
    """
    if run_id is None:
        for header in store.headers(finished=False):
            if header.request is not None:
                return store.results(header.run_id)
        raise CannotResume("sought a run that was interrupted, found none; `kvfarm report --list` lists all")
    found = store.find(run_id)
    if found is None:
        raise CannotResume(f"sought run {run_id!r}, found none such; `kvfarm report --list` lists all")
    run = store.results(found)
    if run.finished_at is not None:
        raise CannotResume(f"run {found} was finished at {run.finished_at}; there is nothing to go on with")
    if run.request is None:
        raise CannotResume(
            f"run {found} tells nothing of how to go on with it (a gate, a night, an ablation, or an older "
            f"kvfarm's); gates and nights go on when their command is given again: {run.command}"
        )
    return run


def check_subjects(run: RunResults) -> None:
    """Raises CannotResume: the run's results would be of two different things."""
    then = run.request.subjects if run.request is not None else {}
    changed = sorted(path for path, digest in then.items() if _digest(Path(path)) != digest)
    if changed:
        raise CannotResume(
            f"run {run.run_id} cannot go on, for what it tests has changed: {', '.join(changed)}; put it "
            "back as it was, or start a new run"
        )


def command(request: RunRequest) -> list[str]:
    """The pytest that the run was started as."""
    return [sys.executable, "-m", "pytest", *request.arguments]


def done(checks: Iterable[CheckResult]) -> frozenset[Done]:
    """Checks that the engine has answered. What infrastructure stopped says nothing, and is done again."""
    return frozenset(Done(c.device, c.recipe, c.check) for c in checks if c.outcome in _FINAL)


def is_done(test: Planned, done: frozenset[Done]) -> bool:
    """Whether a planned test of one cell has its result; of one for any device, on any of them."""
    places = test.anywhere or (test.device,)
    return test.kind in ("check", "both") and any(Done(d, test.recipe, test.check) in done for d in places)


def legs(run: RunResults) -> dict[str, LegResult]:
    """By key."""
    return {leg.key: leg for leg in run.legs if leg.key}


class RunLock:
    """One process at a time works for a run, on this machine; an flock, which dies with its holder.

    Raises:
        CannotResume: another one does. InfrastructureError: ``folder`` cannot be made.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InfrastructureError(
                f"sought a folder for locks, {folder}: {error.strerror}; let KVFARM_LEASES name another"
            ) from error
        self._path = folder / f"{quote(run_id, safe='')}.lock"
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._file, 32, 0).decode(errors="replace") or "?"
                os.close(self._file)
                raise CannotResume(
                    f"run {run_id} is not over: process {holder} works for it; wait for it or end it"
                ) from None
            if self._path.exists() and self._path.stat().st_ino == os.fstat(self._file).st_ino:
                break
            os.close(self._file)  # whoever had it has just removed it
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def second_chance(run: RunResults | None) -> tuple[DeviceInfo, ...]:
    """Devices that a crash may have set aside, as what goes on with the run begins with them."""
    devices = run.devices if run is not None else ()
    return tuple(dataclasses.replace(each, quarantined="") for each in devices if each.quarantined)


def _digest(path: Path) -> str:
    """Of a file, of a checkpoint's files or of a package's sources."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted({*path.glob("*"), *path.rglob("*.py")})
    for file in files:
        if not file.is_file():
            continue
        state = file.stat()
        digest.update(f"{file.relative_to(path.parent)} {state.st_size}\n".encode())
        if state.st_size <= _WHOLE_BYTES:
            digest.update(file.read_bytes())
        else:
            digest.update(str(state.st_mtime_ns).encode())
    return digest.hexdigest()
