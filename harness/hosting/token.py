"""The lab's token: who shows it may use the cluster, who does not is refused by every server of it.

Ray checks it in each gRPC call and HTTP request (RAY_AUTH_MODE=token, Ray 2.50 and newer). Whoever has it
can run code on every lab host, so it lives in a file that only its owner may read, or in the variable
RAY_AUTH_TOKEN; it is no option of a command, for every user sees those of every process.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from device_agents import scratch
from harness.errors import NotAuthenticated

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_MOST_BYTES = 4096


def default_path() -> Path:
    """Where kvfarm keeps it; RAY_AUTH_TOKEN_PATH names another file."""
    named = os.environ.get(PATH)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(named) if named else Path(folder) / "kvfarm" / "token"


def create(path: Path) -> bool:
    """A new token in ``path``, which only its owner may read; False: there is one already, and it stays.

    Raises:
        NotAuthenticated: the one that is there cannot be used. OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        check(path)
        return False
    with open(file, "w") as out:
        out.write(secrets.token_hex(32))  # 256 bits, as Ray's own
    return True


def check(path: Path) -> None:
    """That a token is in ``path`` and a secret.

    Raises:
        NotAuthenticated: it is not there, empty, or others may read it.
    """
    try:
        found = path.stat()
        text = path.read_text().strip() if found.st_size <= _MOST_BYTES else ""
    except OSError as error:
        raise NotAuthenticated(
            f"sought the lab's token in {path}: {error.strerror}; copy that file from the lab's head, let "
            f"{PATH} name another, or put the token into {TOKEN}. A cluster without a token: {MODE}=disabled"
        ) from error
    except UnicodeDecodeError:
        text = ""
    if not text or text.split() != [text]:
        raise NotAuthenticated(
            f"sought one word, the lab's token, in {path}; copy the file from the head again"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise NotAuthenticated(
            f"others may read the lab's token in {path} (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"`chmod 600 {path}`, and make another if somebody may have"
        )


def show(path: Path | None = None) -> None:
    """From now on this process and those that it starts show the token, and want to be shown it.

    Nothing where RAY_AUTH_MODE=disabled says that the cluster has none.

    Raises:
        NotAuthenticated: there is none that can be used.
    """
    if os.environ.get(MODE, "token").lower() != "token":
        return
    if not os.environ.get(TOKEN):
        path = path or default_path()
        check(path)
        os.environ[PATH] = str(path.absolute())
    os.environ[MODE] = "token"
    _read_again()


def source() -> str:
    """Where our token is from, for people; never the token."""
    if os.environ.get(MODE, "token").lower() != "token":
        return f"{MODE} says that we have none"
    return f"that of {TOKEN}" if os.environ.get(TOKEN) else f"that in {default_path()}"


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """While the body runs, for a private Ray: a token of its own in ``folder``, known to our children alone.

    Ray would write one into the user's home that others can read. What the user has set stays; what another
    private Ray has set ends with that.
    """
    before = {name: os.environ.get(name) for name in (MODE, TOKEN, PATH)}
    path = before[PATH]
    if before[TOKEN] or (before[MODE] and not path) or (path and scratch.RAY not in path):
        yield
        return
    create(folder / "token")
    os.environ |= {MODE: "token", PATH: str(folder / "token")}
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    """Ray keeps what it has read of the environment."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
