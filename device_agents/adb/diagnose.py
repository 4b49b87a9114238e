"""What is wrong with an Android device, and what to do about it; nothing is left on it but our folder, empty.

One row a function: answers in, a Finding out. Sources: AOSP BatteryService.java ("UPDATES STOPPED" after
`dumpsys battery unplug`; `reset` ends it), ThermalManagerService.java ("IsStatusOverride" after
`cmd thermalservice override-status`; `reset` ends it).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping

from device_agents.adb.facts import Facts, read_facts
from device_agents.adb.settings import left_changed
from device_agents.adb.shell_text import ask
from device_agents.adb.store import free_bytes
from device_agents.adb.transport import AdbTransport
from device_agents.api import Finding
from device_agents.bundle.lock import ABIS
from device_agents.deadline import Deadline
from device_agents.errors import DeviceUnreachable, InfrastructureError, Unauthorized, UnsupportedDevice
from device_agents.recording.answers import QUESTIONS, parse_gauge, parse_vitals

NEEDED_BYTES = 1 << 30  # a bundle, and a 1B model's artifact in int4
LOW_BATTERY = 20.0  # percent; many phones save power below
SKEW_S = 5.0
_LOOK_S = 15.0  # for each question; a healthy phone needs 0.1 s

Attach = Callable[[Deadline], AdbTransport]


def diagnose(attach: Attach, root: str, deadline: Deadline) -> tuple[Finding, ...]:
    """Everything there is to say, or what stands before it. root: our folder on the device.

    Never raises InfrastructureError.
    """
    try:
        transport = attach(deadline)
        began = time.monotonic()
        transport.checked("true", _within(deadline))
    except InfrastructureError as error:
        return (_unreachable(error),)
    took_ms = 1e3 * (time.monotonic() - began)
    findings = [Finding("reachable", "ok", f"{transport.serial}, shell v2, {took_ms:.0f} ms")]
    looks: dict[str, Callable[[Deadline], list[Finding]]] = {
        "ABI": lambda within: [_abi(read_facts(transport, within))],
        "state": lambda within: _state(transport, root, within),
        "clock": lambda within: [_clock(transport, within)],
        "settings": lambda within: [_settings(left_changed(transport, root, within))],
    }
    for what, look in looks.items():
        try:
            findings += look(_within(deadline))
        except InfrastructureError as error:
            findings.append(Finding(what, "fix", str(error), "see that it is awake, and ask again"))
            break  # a device that went away would be waited for once more by each of the others
    return tuple(findings)


def _within(deadline: Deadline) -> Deadline:
    return Deadline(min(deadline.remaining, _LOOK_S))


def _unreachable(error: InfrastructureError) -> Finding:
    if isinstance(error, Unauthorized):
        do = "unlock it and accept this computer's key"
        return Finding("authorized", "fix", "no: it does not trust this lab host", do)
    if isinstance(error, UnsupportedDevice):
        return Finding("shell v2", "fix", str(error), "take a device with Android 7 or newer")
    # Our errors say what was found; what to do.
    found, _, do = str(error).partition("; ")
    if isinstance(error, DeviceUnreachable):
        found = found.rpartition(": ")[2]
        do = "plug it in, see that it is awake and its debugging on; wireless: `kvfarm connect` it"
    return Finding("reachable", "fix", found, do or "see `adb devices`")


def _abi(facts: Facts) -> Finding:
    found = f"{facts.abi}, {facts.os}, {facts.model}" + (f" ({facts.simulated})" if facts.simulated else "")
    if facts.abi in ABIS:
        return Finding("ABI", "ok", found)
    return Finding("ABI", "fix", found, f"kvfarm runs on {' and '.join(ABIS)}; take another device")


def _state(transport: AdbTransport, root: str, deadline: Deadline) -> list[Finding]:
    folder = shlex.quote(root)
    probe = f"{folder}/.runs-$$"
    questions = {
        "df": f"d={folder}; while [ ! -d $d ]; do d=${{d%/*}}; done; df -k $d/. | tail -n 1",
        # By its path: the kernel, and not our shell, has to start it.
        "runs": (
            f"{{ mkdir -p {folder} && printf '#!%s\\necho runs\\n' $(command -v sh) >{probe} && "
            f"chmod 755 {probe} && {probe}; }} 2>&1; rm -f {probe}"
        ),
        "mounts": "cat /proc/mounts",
        "real": f"readlink -f {folder}",
        "selinux": "getenforce",
        "suspended": "getprop power.battery_input.suspended",
        **{name: QUESTIONS[name] for name in ("battery", "thermal")},
    }
    answers = ask(transport, questions, deadline)
    return [space(answers, root), runs(answers, root), battery(answers), thermal(answers)]


def space(answers: Mapping[str, str], root: str) -> Finding:
    free = free_bytes(answers["df"].split())
    if free < 0:
        return Finding("space", "note", f"df says nothing of {root}", "")
    found = f"{free / 2**30:.1f} GiB free for {root}"
    if free >= NEEDED_BYTES:
        return Finding("space", "ok", found)
    return Finding("space", "fix", found, f"free {NEEDED_BYTES / 2**30:.0f} GiB on the device")


def runs(answers: Mapping[str, str], root: str) -> Finding:
    said = answers["runs"]
    if said == "runs":
        return Finding("executes", "ok", f"programs in {root}")
    reason = said.splitlines()[-1][:200] if said else "nothing could be written there"
    do = "name another folder: options.root in farm.toml"
    if noexec := noexec_mount(answers["mounts"], answers["real"] or root):
        return Finding("executes", "fix", f"no: {root} is mounted noexec ({reason}; {noexec})", do)
    selinux = answers["selinux"].lower()
    if selinux == "enforcing":
        do += "; its vendor's SELinux may forbid it anywhere: see `adb logcat -b events | grep avc`"
    return Finding("executes", "fix", f"no: {reason}" + (f"; SELinux is {selinux}" if selinux else ""), do)


def noexec_mount(mounts: str, folder: str) -> str:
    """The line of the mount that ``folder`` is on, the last and longest of /proc/mounts, if it is noexec."""
    found, at = "", ""
    for line in mounts.splitlines():
        words = line.split()
        # <=: of those in one place the last is on top.
        if (
            len(words) >= 4
            and len(at) <= len(words[1])
            and f"{folder}/".startswith(words[1].rstrip("/") + "/")
        ):
            found, at = line, words[1]
    return found if "noexec" in (found.split() or ["", "", "", ""])[3].split(",") else ""


def battery(answers: Mapping[str, str]) -> Finding:
    gauge = parse_gauge(answers["battery"])
    if gauge.stopped:
        return Finding(
            "battery", "fix", "UPDATES STOPPED: it tells old values", "adb shell dumpsys battery reset"
        )
    if answers["suspended"] in ("1", "true"):
        found, do = "power.battery_input.suspended is set", "energy will be `unsupported`; reboot it"
        return Finding("battery", "note", found, do)
    if gauge.percent is None:
        return Finding("battery", "note", "tells no charge", "energy will be `unsupported`")
    found = f"{gauge.percent:.0f} %" + ("" if gauge.celsius is None else f", {gauge.celsius:.1f} °C")
    if gauge.percent < LOW_BATTERY:
        return Finding("battery", "fix", found, "charge it: it may save power")
    if gauge.charging or gauge.plugged:
        return Finding("battery", "note", f"{found}, plugged in", "unplug it to measure energy")
    return Finding("battery", "ok", found)


def thermal(answers: Mapping[str, str]) -> Finding:
    if "IsStatusOverride: true" in answers["thermal"]:
        return Finding("thermal", "fix", "its status is overridden", "adb shell cmd thermalservice reset")
    status = parse_vitals(answers, time.time()).thermal_status
    if status is None:
        return Finding("thermal", "note", "tells no status", "heat will be seen in its sensors alone")
    if status:
        return Finding("thermal", "fix", f"status {status}: it throttles", "let it cool down")
    return Finding("thermal", "ok", "status 0")


def _clock(transport: AdbTransport, deadline: Deadline) -> Finding:
    before = time.time()
    said = transport.checked("date +%s", deadline).strip()
    return clock(said, before, time.time())


def clock(said: str, before: float, after: float) -> Finding:
    """``said`` between ``before`` and ``after``, Unix times, s; the device tells whole seconds."""
    if not said.isdigit():
        return Finding("clock", "note", f"tells {said[:40]!r}", "")
    early, late = int(said) - after, int(said) + 1 - before
    skew = max(0.0, early) if early > 0 else min(0.0, late)
    if abs(skew) <= SKEW_S:
        return Finding("clock", "ok", f"within {SKEW_S:.0f} s of the lab host's")
    way = "ahead of" if skew > 0 else "behind"
    return Finding(
        "clock", "note", f"{abs(skew):,.0f} s {way} the lab host's", "turn on automatic date and time"
    )


def _settings(changed: str) -> Finding:
    if not changed:
        return Finding("settings", "ok", "none left changed")
    names = ", ".join(sorted({line.split()[0] for line in changed.splitlines() if line.strip()}))
    do = "unless a run has it now: one was killed, and the next puts them back first"
    return Finding("settings", "note", f"changed by a run: {names}", do)
