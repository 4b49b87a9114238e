"""An agent's folder, which it has to itself."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from device_agents.errors import RootTaken


def lock_root(root: Path) -> IO[str]:
    """An flock, which the kernel takes back when the agent's process dies."""
    file = (root / "agent.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RootTaken(
            f"another lab agent runs on {root}; join it, stop it, or give this one another folder"
        ) from None
    return file
