"""The Transport to this very machine: copies, processes, pipes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import kvengine
from device_agents.api import RunResult
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from device_agents.streams import ProcessStream

_PIECE = 1 << 22


def local_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours plus ``extra``, so that a child finds kvengine and device_agents from a checkout too."""
    environment = {**os.environ, **extra}
    source = str(Path(kvengine.__file__).parent.parent)
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    if source not in paths:
        environment["PYTHONPATH"] = os.pathsep.join([*paths, source])
    return environment


class LocalTransport:
    """Transport for this machine. grace_s: see ProcessStream."""

    def __init__(self, grace_s: float = 2.0) -> None:
        self._grace_s = grace_s

    def push(self, source: Path, target: str, deadline: Deadline) -> None:
        copy_file(source, Path(target), deadline)

    def pull(self, source: str, target: Path, deadline: Deadline) -> None:
        copy_file(Path(source), target, deadline)

    def run(self, argv: Sequence[str], deadline: Deadline) -> RunResult:
        """Raises DeadlineExceeded (the process group is killed), InfrastructureError if it cannot start."""
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=local_environment({}),
                start_new_session=True,
            )
        except OSError as error:
            raise InfrastructureError(f"cannot start {list(argv)}: {error}") from error
        with process:
            try:
                stdout, stderr = process.communicate(timeout=deadline.remaining)
            except subprocess.TimeoutExpired:
                raise DeadlineExceeded(f"{list(argv)}: killed after {deadline.seconds:g} s") from None
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return RunResult(process.returncode, stdout, stderr)

    def open_stream(self, argv: Sequence[str], environment: dict[str, str]) -> ProcessStream:
        """environment: what is added to ours."""
        return ProcessStream(argv, local_environment(environment), grace_s=self._grace_s)


def copy_file(source: Path, target: Path, deadline: Deadline) -> None:
    """Copy by way of a temporary file beside ``target``, so that ``target`` is whole or absent.

    Raises:
        DeadlineExceeded: late; InfrastructureError: a file that cannot be read or written.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with source.open("rb") as reader, part.open("wb") as writer:
                while piece := reader.read(_PIECE):
                    deadline.check(f"copying {source.name}")
                    writer.write(piece)
            shutil.copymode(source, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InfrastructureError(f"copying {source} to {target}: {error}") from error
