"""What a fault may leave behind: processes, ports, settings, files. All looked at from outside."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import psutil

from device_agents.virtual.adb import find_adb
from tests.device_agents.virtual_support import listening, tree
from tests.soak.phones import PhoneAtWork

_SECONDS = 20
# Everything that may lie in the shell user's folder while nothing is under way. What a broken push left in
# incoming waits to be resumed, and is the first to go when room is needed (device_agents.adb.store).
_BELONGS = re.compile(
    r"kvfarm(/\.links|/(blobs|incoming|artifacts|bundles)|/(blobs|incoming|artifacts|bundles)/[0-9a-f]{64})?"
)
_STATE = """\
for space in global system secure; do settings list $space | sort; done
dumpsys battery | grep UPDATES
cat /sys/devices/system/cpu/cpufreq/policy*/scaling_max_freq
exit 0
"""


def adb(phone: PhoneAtWork, script: str) -> str:
    """stdout of ``script`` on the phone, by the real adb client."""
    server, made = phone.attached.server, phone.attached.phone
    assert server is not None
    assert made is not None
    command = [*find_adb(), "-P", str(server.port), "-s", made.address, "shell", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    return result.stdout


def settings_of(phone: PhoneAtWork) -> str:
    return adb(phone, _STATE)


def on_the_phone(phone: PhoneAtWork, settings: str) -> list[str]:
    """What should not be on a phone at rest. settings: as they were at first."""
    found = []
    listed = adb(phone, "ps -A -o PID,ARGS").splitlines()
    # PID 1 is the phone's init, which is forked from our launcher.
    runners = [line for line in listed if "python" in line and line.split()[0] != "1"]
    found += [f"a process on {phone.name}: {line}" for line in runners]
    files = adb(phone, "cd /data/local/tmp && find . -mindepth 1 -maxdepth 3").splitlines()
    names = [line.removeprefix("./") for line in files]
    found += [f"a file on {phone.name}: {name}" for name in names if not _BELONGS.fullmatch(name)]
    now = settings_of(phone)
    if now != settings:
        found.append(f"a setting of {phone.name}: {sorted(set(now.split()) ^ set(settings.split()))}")
    return found


def marked(mark: str) -> dict[int, str]:
    """Living processes, ours excepted, that carry ``mark`` in their environment, with their command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def on_the_host(phones: list[PhoneAtWork], mark: str, ports_before: set[str]) -> list[str]:
    """Processes and ports that belong to no phone that is plugged in. Other phones may be at work."""
    wanted: set[int] = set()
    ports = set(ports_before)
    for phone in phones:
        made, server = phone.attached.phone, phone.attached.server
        if made is not None and server is not None:
            wanted |= tree(made.launcher_pid) | tree(server.pid)
            ports |= {made.address, f"127.0.0.1:{server.port}"}
    ours = tree(os.getpid())
    found = [
        f"an orphan: {pid} {command}" for pid, command in marked(mark).items() if pid not in ours | wanted
    ]
    launchers = [pid for pid in ours if _is_ours(pid)]
    found += [f"a process of no phone: {pid}" for pid in launchers if pid not in wanted]
    found += [f"a port: {address}" for address in listening(ours) - ports]
    return found


def _is_ours(pid: int) -> bool:
    try:
        line = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
    return "device_agents.virtual.launcher" in line or "virtual/keeper.py" in line
