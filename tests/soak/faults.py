"""The faults of the soak: when each strikes, what it does, and what may come of it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil

from device_agents.adb.devices import AttachedPhone
from device_agents.bundle import Bundle
from device_agents.deadline import Deadline
from device_agents.remote_session import Budgets
from device_agents.virtual import VirtualPhone
from harness.recovery import RecoveryPolicy
from tests.device_agents.virtual_support import tree

Point = Literal["cell", "shell", "push", "frame"]
"""What the device is asked next: anything, a shell command, a blob, a program (whose session is open)."""

Outcome = Literal["survived", "retried", "infrastructure", "quarantined"]
"""Passed at once; passed after a retry; lost after all retries; the device was set aside."""


class Target(Protocol):
    """The device that a fault strikes."""

    attached: AttachedPhone
    push_bytes: int  # that the next push moves
    reply_bytes: int  # that the next program's answer has at least


@dataclass(frozen=True)
class Fault:
    """One way to fail. random_delay_s: it strikes up to so long after its point; 0: there and then."""

    name: str
    point: Point
    strike: Callable[[Target, random.Random], None]
    may: frozenset[Outcome]
    random_delay_s: float = 0.0
    undo: Callable[[Target], None] | None = None  # once the cell that was hit has its result
    needs_storage: bool = False  # only a phone with a limit of its own
    loses_data: bool = False  # not for a phone with storage in memory, where it would prove less


@dataclass(frozen=True)
class Scale:
    """Seconds. The budgets of the soak's devices are scaled down from the real ones, and so are the freezes:
    the short one is below every budget, the long one above a program's. ``REAL`` has nothing scaled.

    round_s: far more than a round takes; one that takes longer is lost.
    """

    hello_s: float = 20.0
    program_s: float = 5.0
    vitals_s: float = 4.0
    reach_s: float = 4.0
    answer_s: float = 8.0
    short_freeze_s: float = 0.5
    long_freeze_s: float = 7.0
    round_s: float = 90.0


REAL = Scale(
    hello_s=Budgets().hello_s,
    program_s=Budgets().program_s,
    vitals_s=Budgets().vitals_s,
    reach_s=10.0,
    answer_s=RecoveryPolicy().answer_s,
    short_freeze_s=10.0,
    long_freeze_s=90.0,
    round_s=400.0,
)


def phone_of(target: Target) -> VirtualPhone:
    phone = target.attached.phone
    assert phone is not None, "the phone of the soak does not run"
    return phone


def runner_of(target: Target) -> psutil.Process:
    """The runner's process, as this machine numbers it."""
    for pid in tree(phone_of(target).launcher_pid):
        try:
            process = psutil.Process(pid)
            if "device_agents.runner" in process.cmdline():
                return process
        except psutil.Error:
            continue
    raise AssertionError("no runner is there to be struck")


def _kill_adbd_in_an_answer(target: Target, draw: random.Random) -> None:
    phone_of(target).kill_adbd(at=("to_host", draw.randrange(1, 80)))


def _kill_adbd_in_a_push(target: Target, draw: random.Random) -> None:
    phone_of(target).kill_adbd(at=("to_phone", draw.randrange(target.push_bytes // 10, target.push_bytes)))


def _kill_adbd_in_a_frame(target: Target, draw: random.Random) -> None:
    phone_of(target).kill_adbd(at=("to_host", draw.randrange(100, target.reply_bytes)))


def _reboot(target: Target, draw: random.Random) -> None:
    phone_of(target).reboot(draw.uniform(0.1, 1.5))


def _kill_adb_server(target: Target, _: random.Random) -> None:
    server = target.attached.server
    assert server is not None
    for child in psutil.Process(server.pid).children():
        child.kill()


def _fill(target: Target, draw: random.Random) -> None:
    """At once, so that the check before the push sees it; or only in the middle of the push, whose last part
    the phone may have got when we hear of it."""
    at = None if draw.random() < 0.5 else draw.randrange(target.push_bytes // 10, target.push_bytes * 3 // 4)
    phone_of(target).fill_storage(at=None if at is None else ("to_phone", at))


def _flip(target: Target, draw: random.Random) -> None:
    phone_of(target).relay.corrupt("to_phone", draw.randrange(target.push_bytes // 10, target.push_bytes))


def _starve(target: Target, draw: random.Random) -> None:
    """From now on the kernel gives the runner no memory, or a megabyte or two, beyond what it has.

    Set by a process of the same user on the phone, for it takes privileges otherwise; prlimit(2).
    """
    say = (
        "import glob, resource\n"
        "for name in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    if b'device_agents.runner' in open(name, 'rb').read().split(bytes(1)):\n"
        "        pid = int(name.split('/')[2])\n"
        "        has = int(open(f'/proc/{pid}/statm').read().split()[0]) * resource.getpagesize()\n"
        f"        limit = has + {draw.choice((0, 1 << 20, 2 << 20))}\n"
        "        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit)); print('done')\n"
    )
    transport = target.attached.attach(Deadline(20))
    (folder,) = transport.checked("ls -d /data/local/tmp/kvfarm/bundles/*", Deadline(20)).split()
    result = transport.run(Bundle.python_argv(folder, "-c", say), Deadline(20))
    assert result.stdout == b"done\n", result


def _kill_first_process(target: Target, _: random.Random) -> None:
    """The phone dies as if its battery were pulled; its launcher lives."""
    for keeper in psutil.Process(phone_of(target).launcher_pid).children():
        for first in keeper.children():
            first.kill()


def faults(scale: Scale) -> tuple[Fault, ...]:
    again: frozenset[Outcome] = frozenset({"retried"})
    either: frozenset[Outcome] = frozenset({"survived", "retried"})

    # The real short freeze is as long as some budgets are, the real long one shorter than a program's.
    short = either if scale == REAL else frozenset[Outcome]({"survived"})
    long = either if scale == REAL else again

    def freeze(seconds: float) -> Callable[[Target, random.Random], None]:
        return lambda target, _: phone_of(target).relay.freeze(seconds)

    def end(number: signal.Signals) -> Callable[[Target, random.Random], None]:
        return lambda target, _: runner_of(target).send_signal(number)

    return (
        Fault("adbd killed mid-shell", "shell", _kill_adbd_in_an_answer, either),
        Fault("adbd killed mid-push", "push", _kill_adbd_in_a_push, again),
        Fault("adbd killed mid-frame", "frame", _kill_adbd_in_a_frame, again),
        Fault(f"link frozen {scale.short_freeze_s:g} s", "cell", freeze(scale.short_freeze_s), short, 0.5),
        Fault(f"link frozen {scale.long_freeze_s:g} s", "frame", freeze(scale.long_freeze_s), long),
        Fault("reboot", "cell", _reboot, either, 0.5, loses_data=True),
        Fault("adb server killed", "cell", _kill_adb_server, either, 0.5),
        Fault(
            "storage full",
            "push",
            _fill,
            frozenset({"infrastructure"}),
            undo=lambda target: phone_of(target).fill_storage(None),
            needs_storage=True,
        ),
        Fault("bit flip in a push", "push", _flip, either),
        Fault("runner killed", "frame", end(signal.SIGKILL), again),
        Fault("runner stopped", "frame", end(signal.SIGSTOP), again),
        Fault("runner out of memory", "frame", _starve, again),
        Fault(
            "unplugged for good", "cell", lambda t, _: phone_of(t).unplug(), frozenset({"quarantined"}), 0.5
        ),
        Fault("phone died", "cell", _kill_first_process, either, 0.5, loses_data=True),
        Fault(
            "launcher killed",
            "cell",
            lambda t, _: os.kill(phone_of(t).launcher_pid, signal.SIGKILL),
            either,
            0.5,
            loses_data=True,
        ),
    )
