"""Taking a device's power away and giving it back, by a program of the lab host.

The program is named in farm.toml as a list of words and started as such; there is no shell that a serial
number could talk to. Every cycle is noted beside the leases before it is tried, so that whatever dies, no
device is cycled more often in a day than its limit says.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError

JOURNAL = "power.jsonl"
DAY_S = 24 * 3600.0
_MOST_CHARS = 200  # of its output, in an error


class PowerCycleFailed(InfrastructureError):
    """The device was not cycled: its limit is reached, or the program failed or took too long."""


def cycle_device(config: DeviceConfig, key: str, reason: str, folder: Path, deadline: Deadline) -> str:
    """As farm.toml says for the device, known to all agents by ``key``; see ``cycle``."""
    if not config.power_cycle:
        raise PowerCycleFailed(f"{config.name}: farm.toml names no power_cycle for it")
    return cycle(config.power_cycle, key, reason, folder, config.power_cycles_per_day, deadline)


def cycle(
    command: Sequence[str],
    device: str,
    reason: str,
    folder: Path,
    per_day: int,
    deadline: Deadline,
    clock: Callable[[], float] = time.time,
) -> str:
    """Run ``command`` for ``device``; returns what was done, for people.

    folder: where cycles of all agents of this machine are noted. clock: Unix time, s.

    Raises:
        PowerCycleFailed: see the class.
    """
    _note(device, reason, folder, per_day, clock())
    try:
        done = subprocess.run(
            list(command),
            timeout=max(0.001, deadline.remaining),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PowerCycleFailed(
            f"{device}: {command[0]} took over {deadline.seconds:g} s and was ended"
        ) from None
    except OSError as error:
        raise PowerCycleFailed(
            f"{device}: sought the program {command[0]} on its lab host: {error.strerror}; install it "
            f"there, or "
            "correct power_cycle in farm.toml"
        ) from error
    if done.returncode:
        said = " ".join(done.stdout.decode(errors="replace").split())[:_MOST_CHARS]
        raise PowerCycleFailed(f"{device}: {command[0]} gave {done.returncode}: {said or 'it said nothing'}")
    return f"power-cycled with {command[0]}"


def _note(device: str, reason: str, folder: Path, per_day: int, now: float) -> None:
    """One line more in the journal. Raises PowerCycleFailed: the limit of the day is reached."""
    with _journal(folder / JOURNAL) as file:
        file.seek(0)
        lately = [line for line in file.readlines() if _is_of(line, now)]
        count = sum(json.loads(line)["device"] == device for line in lately)
        if count >= per_day:
            raise PowerCycleFailed(
                f"{device} was power-cycled {count} times within a day, its limit is {per_day}; see to it"
            )
        lately.append(json.dumps({"device": device, "at": now, "reason": reason}) + "\n")
        file.seek(0)
        file.truncate()
        file.writelines(lately)


def _is_of(line: str, now: float) -> bool:
    """Whether it is a cycle of the last day; what a crash cut short is none."""
    try:
        return float(json.loads(line)["at"]) > now - DAY_S
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def _journal(path: Path) -> Iterator[IO[str]]:
    """Open, and nobody else's meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
