"""Have the user's own adb server forget virtual phones that have ended: it would list them as offline.

Standard library only, for the launcher; a server that does not run is not started.
Wire format: AOSP packages/modules/adb, SERVICES.TXT.
"""

from __future__ import annotations

import contextlib
import os
import socket

_DEFAULT_PORT = 5037
_WAIT_S = 1.0
_MOST = 1 << 12


def forget(port: int) -> None:
    """The phone that was at ``port`` of this machine. Never raises, for it is gone either way."""
    for host in ("127.0.0.1", "localhost"):  # as whoever connected it may have called it
        service = f"host:disconnect:{host}:{port}".encode()
        with contextlib.suppress(OSError, ValueError):
            server = int(os.environ.get("ANDROID_ADB_SERVER_PORT", _DEFAULT_PORT))
            with socket.create_connection(("127.0.0.1", server), _WAIT_S) as connection:
                connection.sendall(b"%04x%s" % (len(service), service))
                connection.recv(_MOST)  # whether it knew the phone is all one


def forget_if_gone(port: int) -> None:
    """As ``forget``, unless somebody listens at ``port``, for then it is another phone's by now."""
    try:
        socket.create_connection(("127.0.0.1", port), _WAIT_S).close()
    except ConnectionRefusedError:
        forget(port)
    except OSError:
        pass
