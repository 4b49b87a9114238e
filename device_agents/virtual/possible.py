"""Whether virtual phones are possible on this machine: namespaces, and the parts they are made of."""

from __future__ import annotations

import sys
from pathlib import Path

from device_agents.api import Finding
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.local import LocalTransport
from device_agents.virtual import debian, rootfs
from device_agents.virtual.errors import VirtualPhoneUnavailable
from device_agents.virtual.phone import ALLOW
from device_agents.virtual.profile import Abi

# A process of its own, for it cannot leave them again; without threads, which unshare(2) does not allow.
# Ubuntu's AppArmor lets everybody make a user namespace, and then mount nothing in it.
_PROGRAM = """
import sys
from device_agents.virtual.launcher import enter_namespaces
from device_agents.virtual.namespaces import isolate_mounts
try:
    as_root = enter_namespaces()
    isolate_mounts()
except OSError as error:
    sys.exit(error.strerror)
print("as root" if as_root else "in a user namespace")
"""


def why_not(abi: Abi, cache: Path, deadline: Deadline) -> str:
    """What keeps this machine from having virtual phones of ``abi``, and what to do; "" if nothing does."""
    found = (namespaces(deadline), parts(abi, cache, True, deadline))
    return "; ".join(f"{each.found}: {each.do}" for each in found if each.state == "fix")


def namespaces(deadline: Deadline) -> Finding:
    """Whether this machine lets a phone have namespaces of its own, and as whom."""
    argv = (sys.executable, "-P", "-S", "-c", _PROGRAM)
    try:
        done = LocalTransport().run(argv, deadline)
    except InfrastructureError as error:
        return Finding("namespaces", "fix", str(error), ALLOW)
    words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    said = words[-1] if words else "no reason given"
    if done.returncode:
        return Finding("namespaces", "fix", f"not allowed: {said}", ALLOW)
    return Finding("namespaces", "ok", said)


def parts(abi: Abi, cache: Path, ask_archive: bool, deadline: Deadline) -> Finding:
    """Whether the phone's file system is in ``cache``, or, with ask_archive, can be had."""
    what, later = f"parts for {abi}", "the first virtual phone fetches them, or `kvfarm phones up`"
    try:
        place = rootfs.prepared(abi, cache)
        if place is not None:
            return Finding(what, "ok", f"{', '.join(rootfs.packages(abi))} in {place}")
        debian.require_tools()
        if not ask_archive:
            return Finding(what, "note", "not fetched yet", later)
        debian.require_offered(rootfs.packages(abi), rootfs.ANDROID_TOOLS, deadline)
    except VirtualPhoneUnavailable as error:
        return Finding(what, "fix", str(error), "see that `apt-get update` works, or use another lab host")
    except InfrastructureError as error:
        return Finding(what, "fix", str(error), "see that `apt-get update` works on this machine")
    return Finding(what, "ok", f"not fetched yet; this machine's archive has them, adbd too; {later}")
