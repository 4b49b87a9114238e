"""Whether this machine lets a virtual phone have its namespaces; run as a process, which enters them."""

from __future__ import annotations

import shutil
import sys

from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.local import LocalTransport
from device_agents.virtual.launcher import enter_namespaces

_ROOT, _USER = "as root", "in a user namespace"


def namespaces(deadline: Deadline) -> tuple[bool, str]:
    """Whether it does, and how; else the reason."""
    argv = (sys.executable, "-P", "-S", "-m", "device_agents.virtual.possible")
    try:
        done = LocalTransport().run(argv, deadline)
    except InfrastructureError as error:
        return False, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr).decode(errors="replace").split("\n")
    return done.returncode == 0, next((line for line in reversed(lines) if line.strip()), "no reason given")


def archive() -> str:
    """Why the parts cannot be taken from this machine's archive; "" when they can be sought there."""
    missing = [tool for tool in ("apt-get", "apt-config", "dpkg-deb") if shutil.which(tool) is None]
    return f"there is no {', '.join(missing)} here" if missing else ""


def main() -> None:
    try:
        sys.stdout.write(f"{_ROOT if enter_namespaces() else _USER}\n")
    except OSError as error:
        sys.exit(f"{error.strerror or error}")


if __name__ == "__main__":
    main()
