"""What is done after an infrastructure failure: try again on the same device, or set the device aside.

A check or leg that infrastructure stopped says nothing about the engine, so it is tried again once the
device answers, a few times. A device that does not answer again, or stops one check after the other, is
quarantined: what is left for it is reported at once, with the evidence, and the other devices go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from device_agents.deadline import Deadline
from device_agents.errors import (
    BundleError,
    InfrastructureError,
    LeaseNotGranted,
    NoSuchDevice,
    Unauthorized,
    UnsupportedDevice,
)
from device_agents.virtual.errors import VirtualPhoneUnavailable
from harness.errors import ClusterLost, NotFit, Quarantined, ReferenceFailed

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Trying again cannot help before a person has done something.
_LASTING = (
    UnsupportedDevice,
    Unauthorized,
    BundleError,
    NoSuchDevice,
    VirtualPhoneUnavailable,
    LeaseNotGranted,  # we have waited for as long as we may
    ClusterLost,
    NotFit,  # as before
)
_LINE = 300  # characters of an error that a row keeps of each retry


@dataclass(frozen=True)
class RecoveryPolicy:
    """retries: further tries of one check or leg. answer_s: a device has so long to answer again before
    each. lost_in_a_row: a device is quarantined after so many checks or legs lost one after the other."""

    retries: int = 2
    answer_s: float = 180.0  # a phone takes a minute and more to boot
    lost_in_a_row: int = 2
    pause_s: float = 0.5  # between two questions whether it answers
    restart_after_s: float = 60.0  # a device that has not answered for so long is started anew, if it can be


class Recovery:
    """Of all devices of one run; different devices may be used from different threads.

    probe: asks a device for a sign of life, under a deadline of its own; raises InfrastructureError.
    on_quarantine: called once for each device that is set aside, with its name and the evidence: a sentence,
    and in further lines what was seen there, as it was. on_sick: called as on_quarantine, but only where the
    device itself is at fault, so that no other run should get it either.
    on_retry: called before each further try, with the device's name and the reason.
    restart: starts a device that does not answer anew, for a reason; says how, "" if nothing can. Called once
    while a device is waited for. revive: cuts the power of a device that does not answer, with the reason,
    and says what was done, "" for nothing; may raise InfrastructureError.
    """

    def __init__(
        self,
        probe: Callable[[str], object],
        policy: RecoveryPolicy | None = None,
        on_quarantine: Callable[[str, str], None] = lambda device, evidence: None,
        on_retry: Callable[[str, str], None] = lambda device, reason: None,
        revive: Callable[[str, str], str] = lambda device, reason: "",
        on_sick: Callable[[str, str], None] = lambda device, evidence: None,
        restart: Callable[[str, str], str] = lambda device, reason: "",
    ) -> None:
        self._probe = probe
        self._policy = policy or RecoveryPolicy()
        self._on_quarantine = on_quarantine
        self.on_retry = on_retry
        self._revive = revive
        self._on_sick = on_sick
        self._restart = restart
        self._lost: dict[str, int] = {}  # checks and legs lost in a row
        self._evidence: dict[str, str] = {}

    @property
    def quarantined(self) -> dict[str, str]:
        """The sentence by device."""
        return dict(self._evidence)

    def recall(self, device: str, evidence: str) -> None:
        """The device was set aside earlier in the same run, by another process."""
        self._evidence[device] = evidence

    def attempt(self, device: str, work: Callable[[], T], retries: list[str], *, once: bool = False) -> T:
        """``work()``, again after an infrastructure failure; ``retries`` gets the reason of each further try.

        once: there is another device to try it on, so it is not tried again on this one.

        Raises:
            Quarantined: the device has been set aside; ``work`` is not called.
            InfrastructureError: the last one, when tries are used up or the device is set aside by it.
            What else ``work`` raises, at once: that is an answer of the engine.
        """
        if evidence := self._evidence.get(device):
            raise Quarantined(f"quarantined: {evidence}")
        while True:
            try:
                found = work()
            except (ReferenceFailed, ClusterLost):
                raise  # not this device's doing
            except InfrastructureError as error:
                self._consider(device, error, retries, once)
            except Exception:
                self._lost.pop(device, None)
                raise
            else:
                self._lost.pop(device, None)
                return found

    # -- inside ---------------------------------------------------------------------------

    def _consider(self, device: str, error: InfrastructureError, retries: list[str], once: bool) -> None:
        """Returns when ``work`` may be tried again, else raises ``error``."""
        if isinstance(error, _LASTING):
            self._set_aside(device, _first_line(error), error, sick=False)
            raise error
        if once or len(retries) >= self._policy.retries:
            lost = self._lost[device] = self._lost.get(device, 0) + 1
            if lost >= self._policy.lost_in_a_row:
                said = f"{lost} checks or legs lost in a row, the last by {one_line(error)}"
                self._set_aside(device, said, error)
            raise error
        try:
            seconds = self._await_answer(device)
            done = ""
        except ClusterLost:
            raise
        except InfrastructureError as silence:
            done, seconds = self._revived(device, error, silence)
        retries.append(f"{one_line(error)} ({done}answered again after {seconds:.1f} s)")
        self.on_retry(device, retries[-1])

    def _revived(
        self, device: str, error: InfrastructureError, silence: InfrastructureError
    ) -> tuple[str, float]:
        """What brought it back, and the seconds it took; else it is set aside, and ``error`` raised."""
        said = f"it stopped answering, and did not answer again within {self._policy.answer_s:g} s"
        seen, done = [error, silence], ""
        try:
            done = self._revive(device, f"{said}: {one_line(silence)}")
            if done:
                return f"{done}, ", self._await_answer(device)
        except ClusterLost:
            raise
        except InfrastructureError as failed:
            said += f"; {done or 'not revived'}: {one_line(failed)}"
            seen.append(failed)
        self._set_aside(device, said, *seen)
        raise error

    def _await_answer(self, device: str) -> float:
        """Seconds until the device answered. Raises the last InfrastructureError when it is late."""
        began, deadline, pause = time.monotonic(), Deadline(self._policy.answer_s), threading.Event()
        patience = Deadline(min(self._policy.restart_after_s, self._policy.answer_s / 2))
        restarted = False
        while True:
            try:
                self._probe(device)
                return time.monotonic() - began
            except InfrastructureError as error:
                if isinstance(error, _LASTING) or deadline.remaining <= self._policy.pause_s:
                    raise
                if patience.expired and not restarted:
                    restarted = True
                    if how := self._restart(device, one_line(error)):
                        _log.warning("%s: %s, for it does not answer: %s", device, how, error)
            pause.wait(self._policy.pause_s)

    def _set_aside(self, device: str, sentence: str, *errors: InfrastructureError, sick: bool = True) -> None:
        self._evidence[device] = sentence
        # What adb and shells said is for who looks into it, and no sentence.
        details = [f"{type(error).__name__}: {error}" for error in errors if str(error) != sentence]
        evidence = "\n".join([sentence, *details])
        _log.error("%s is quarantined: %s", device, evidence)
        self._on_quarantine(device, evidence)
        if sick:
            self._on_sick(device, evidence)


def one_line(error: BaseException) -> str:
    """The error's class and the first line of what it says."""
    return f"{type(error).__name__}: {_first_line(error)}"[:_LINE]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
