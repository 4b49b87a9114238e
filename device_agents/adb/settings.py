"""What a phone is put into while it is leased, read back, and put back afterwards.

Before anything is changed the values found are written to a journal in our folder on the device.
Whoever claims the device next finds it there if the last user was killed, and puts them back first.

Sources: AOSP Settings.Global.STAY_ON_WHILE_PLUGGED_IN and Settings.System.SCREEN_BRIGHTNESS(_MODE),
ConnectivityService's and PowerManagerShellCommand's help; Android's "fixed-performance mode" page,
which also says that clocks may still fall when the device gets hot.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from device_agents.adb.shell_text import ask
from device_agents.adb.transport import AdbTransport
from device_agents.config import DeviceSettings
from device_agents.deadline import Deadline
from device_agents.errors import SettingFailed

JOURNAL = "settings-before"
_LINE = re.compile(r"([a-z_]+) ([\w.+-]{1,64})")
_UNSET = "null"  # what `settings get` says of a key that nobody has put
_STAY_ON_ALL = "15"  # BatteryManager.BATTERY_PLUGGED_AC | USB | WIRELESS | DOCK


@dataclass(frozen=True)
class _Knob:
    """One value of the phone. get: a command that prints it. put: a command, with {} for the value.

    delete: what puts back a value that was not set.
    """

    get: str
    put: str
    delete: str = ""


def _setting(space: str, key: str) -> _Knob:
    name = f"{space} {key}"
    return _Knob(f"settings get {name}", f"settings put {name} {{}}", f"settings delete {name}")


# In the order in which they are put; they are put back in the opposite one.
_KNOBS: dict[str, _Knob] = {
    "stay_on": _setting("global", "stay_on_while_plugged_in"),
    "brightness_mode": _setting("system", "screen_brightness_mode"),
    "brightness": _setting("system", "screen_brightness"),
    "airplane": _Knob(
        "settings get global airplane_mode_on",
        "[ {} = 1 ] && on=enable || on=disable; cmd connectivity airplane-mode $on",
    ),
    # Android has no way to ask for the mode; it is off unless somebody has put it on since boot.
    "fixed_performance": _Knob("echo false", "cmd power set-fixed-performance-mode-enabled {}"),
}
_CLOCKS = "cat /sys/devices/system/cpu/cpufreq/policy*/scaling_max_freq"


def apply(transport: AdbTransport, root: str, settings: DeviceSettings, deadline: Deadline) -> dict[str, str]:
    """Put back what an earlier use left changed, then set ``settings``; says what each came to.

    root: our folder on the device.

    Raises:
        SettingFailed: refused, or read back otherwise; nothing is left changed. AdbFailure, DeadlineExceeded.
    """
    wanted = _wanted(settings)
    if "airplane" in wanted and _over_the_air(transport.serial):
        raise SettingFailed(
            f"{transport.serial} is reached through its wireless network, which airplane mode cuts; take "
            "`airplane` out of its settings in farm.toml, or attach it by USB"
        )
    restore(transport, root, deadline)
    if not wanted:
        return {}
    found = ask(transport, {**{name: _KNOBS[name].get for name in wanted}, "clocks": _CLOCKS}, deadline)
    clocks = found.pop("clocks")
    _write_journal(transport, root, found, deadline)
    try:
        _put(transport, wanted, deadline)
        return _read_back(transport, wanted, clocks, deadline)
    except SettingFailed:
        restore(transport, root, deadline)
        raise


def restore(transport: AdbTransport, root: str, deadline: Deadline) -> None:
    """Put back what the journal has, if there is one. Raises as ``apply``; the journal then stays."""
    path = shlex.quote(f"{root}/{JOURNAL}")
    text = transport.checked(f"[ ! -e {path} ] || cat {path}", deadline)
    if not text:
        return
    lines = [_LINE.fullmatch(line.strip()) for line in text.splitlines()]
    before = {found[1]: found[2] for found in lines if found}
    changed = [name for name in reversed(_KNOBS) if name in before]
    _put(transport, {name: before[name] for name in changed}, deadline)
    readable = [name for name in changed if name != "fixed_performance"]
    now = ask(transport, {name: _KNOBS[name].get for name in readable}, deadline)
    for name in readable:
        if not _same(now[name], before[name]):
            raise SettingFailed(
                f"{transport.serial}: sought to put {name} back to {before[name]}, found {now[name]} "
                "afterwards; put it back by hand"
            )
    transport.checked(f"rm -f {path}", deadline)


def left_changed(transport: AdbTransport, root: str, deadline: Deadline) -> str:
    """What an earlier use left changed, as "name value" lines; "" for nothing."""
    path = shlex.quote(f"{root}/{JOURNAL}")
    return transport.checked(f"[ ! -e {path} ] || cat {path}", deadline).strip()


def _wanted(settings: DeviceSettings) -> dict[str, str]:
    """Values by knob, in the order of _KNOBS."""
    wanted = {}
    if settings.stay_on:
        wanted["stay_on"] = _STAY_ON_ALL
    if settings.brightness is not None:
        wanted |= {"brightness_mode": "0", "brightness": str(settings.brightness)}
    if settings.airplane:
        wanted["airplane"] = "1"
    if settings.fixed_performance:
        wanted["fixed_performance"] = "true"
    return wanted


def _over_the_air(serial: str) -> bool:
    """ADDRESS:PORT, and not this machine's own."""
    address, colon, _ = serial.rpartition(":")
    return bool(colon) and address not in ("127.0.0.1", "localhost", "[::1]")


def _write_journal(transport: AdbTransport, root: str, found: Mapping[str, str], deadline: Deadline) -> None:
    lines = [f"{name} {value}" for name, value in found.items()]
    if strange := [line for line in lines if not _LINE.fullmatch(line)]:
        raise SettingFailed(
            f"{transport.serial}: sought the present value of {strange[0].partition(' ')[0]}, found "
            f"{strange[0]!r}; without it nothing could be put back"
        )
    path = f"{root}/{JOURNAL}"
    part = shlex.quote(path + ".part")
    script = (
        f"mkdir -p {shlex.quote(root)} && cat > {part} && {{ fsync {part} 2>/dev/null || sync; }} && "
        f"mv {part} {shlex.quote(path)}"
    )
    transport.checked(script, deadline, stdin=["\n".join([*lines, ""]).encode()])


def _put(transport: AdbTransport, values: Mapping[str, str], deadline: Deadline) -> None:
    """In one command, in the order of ``values``, up to the first that is refused."""
    script = "".join(
        f"said=$({_command(name, values[name])} 2>&1) || {{ echo {name} $said; exit 1; }}\n"
        for name in values
    )
    done = transport.shell(script, deadline)
    if done.returncode:
        name, _, said = (done.stdout + done.stderr).decode(errors="replace").strip().partition(" ")
        raise SettingFailed(
            f"{transport.serial}: the device does not take {name} {values.get(name, '')}: {said[:300]}; "
            "take it out of its settings in farm.toml"
        )


def _command(name: str, value: str) -> str:
    knob = _KNOBS[name]
    return knob.delete if value == _UNSET and knob.delete else knob.put.format(shlex.quote(value))


def _read_back(
    transport: AdbTransport, wanted: Mapping[str, str], clocks: str, deadline: Deadline
) -> dict[str, str]:
    questions = {name: _KNOBS[name].get for name in wanted if name != "fixed_performance"}
    now = ask(transport, {**questions, "clocks": _CLOCKS}, deadline)
    clocks_now = now.pop("clocks")
    for name, value in now.items():
        if value != wanted[name]:
            raise SettingFailed(
                f"{transport.serial}: sought {name} {wanted[name]}, found {value} after it was accepted; "
                "take it out of farm.toml"
            )
    if "fixed_performance" in wanted:
        now["fixed_performance"] = f"on, {_clock_change(clocks, clocks_now)}"
    return now


def _clock_change(before: str, after: str) -> str:
    """The only sign of fixed-performance mode that an unrooted phone gives."""
    if not before.split():
        return "accepted; the device does not show its clocks"
    if before == after:
        return "accepted; no highest clock changed"
    return f"highest clocks {_megahertz(before)} to {_megahertz(after)} MHz"


def _megahertz(text: str) -> str:
    return "/".join(str(int(word) // 1000) if word.isdigit() else "?" for word in text.split())


def _same(found: str, before: str) -> bool:
    return found == before or {found, before} == {_UNSET, "0"}
