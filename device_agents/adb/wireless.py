"""Phones without a cable: ``adb connect`` and ``adb pair``, believed only where the phone itself answers.

What the adb client sends is AOSP's packages/modules/adb client/commandline.cpp: ``host:connect:ADDRESS``
and ``host:pair:CODE:ADDRESS``. We send the same, so that the code is in no process list and every wait
has a deadline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from device_agents.adb.connection import AdbServer, AdbSocket, adb_errors
from device_agents.adb.transport import AdbTransport
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeadlineExceeded, DeviceUnreachable

DEFAULT_PORT = 5555  # of `adb tcpip`; wireless debugging shows one of its own
_PROBE = "echo kvfarm-$((6 * 7)); getprop ro.product.model"
_PROBE_S = 10.0
_GUID = re.compile(r"\[guid=([^\]]+)\]")
_CODE = re.compile(r"\S{1,64}")


@dataclass(frozen=True)
class Connected:
    """A phone that answered. serial: what to write into farm.toml."""

    serial: str
    model: str


def connect(server: AdbServer, address: str, deadline: Deadline) -> Connected:
    """Have ``server`` connect to ADDRESS[:PORT] and see that a shell answers there.

    The server says "connected" of a phone that is gone or does not trust us, so its word counts for
    nothing but the reason of a failure.

    Raises:
        DeviceUnreachable: no shell answers; with what the server said. Unauthorized. AdbFailure: no
        adb server, or no address. DeadlineExceeded.
    """
    serial = serial_of(address)
    said = server.connect(serial, deadline).strip()
    transport = AdbTransport(server, serial, reach_s=_PROBE_S)
    try:
        lines = transport.checked(_PROBE, Deadline(min(deadline.remaining, _PROBE_S))).splitlines()
    except (DeviceUnreachable, DeadlineExceeded) as error:
        raise DeviceUnreachable(
            f"no shell answers at {serial}: {error}; adb said: {said}; is its debugging on, is this the port "
            "that it shows, and was it paired (`kvfarm pair`)?"
        ) from error
    if lines[:1] != ["kvfarm-42"]:
        raise AdbFailure(f"{serial}: sought a shell, found {' '.join(lines)[:200]!r}")
    return Connected(serial, lines[1].strip() if len(lines) > 1 else "")


def serial_of(address: str) -> str:
    """HOST:PORT of ADDRESS[:PORT], as adb names a phone without a cable. Raises AdbFailure."""
    return _address(address, DEFAULT_PORT)


def check_pairing_address(text: str) -> None:
    """Before anybody is asked for a code. Raises AdbFailure: no HOST:PORT."""
    _address(text, None)


def pair(server: AdbServer, address: str, code: str, deadline: Deadline) -> str:
    """Make this computer known to the phone at ADDRESS:PORT, which shows ``code``; returns its name.

    Only the server can say whether that worked; ``connect`` then proves it, at another port.

    Raises:
        AdbFailure: it did not; with what the server said. DeadlineExceeded.
    """
    target = _address(address, None)
    if not _CODE.fullmatch(code) or ":" in code:
        raise AdbFailure("sought the pairing code that the phone shows, six digits, found something else")
    # Not `query`, which names its request in errors.
    with server.open(f"pairing with {target}", deadline) as connection:
        connection.command(f"host:pair:{code}:{target}", deadline)
        said = _outcome(connection, deadline).strip()
    if not said.startswith("Successfully paired"):
        raise AdbFailure(
            f"{target} was not paired: {said or 'adb said nothing'}; the phone's pairing dialog must be open "
            "and shows an address and a code for this alone"
        )
    guid = _GUID.search(said)
    return guid[1] if guid else target


def _outcome(connection: AdbSocket, deadline: Deadline) -> str:
    """What a pairing came to.

    After the request's OKAY older servers send a string alone, whose first word says it (AOSP services.cpp,
    pair_service); 34 and 36 were seen to send FAIL before it.
    """
    head = connection.receive(4, deadline)
    if head in (b"OKAY", b"FAIL"):
        return connection.block(deadline)
    with adb_errors(connection.what, deadline):
        size = int(head, 16)
    return connection.receive(size, deadline).decode(errors="replace")


def _address(text: str, port: int | None) -> str:
    """HOST:PORT, with ``port`` where none is given. Raises AdbFailure."""
    host, colon, number = text.rpartition(":")
    if text.endswith("]") or not colon:  # an IPv6 address without a port ends in its bracket
        host, number = text, str(port or "")
    if not host or re.search(r"[\s,]", host) or not number.isdigit() or not 0 < int(number) < 65536:
        raise AdbFailure(f"sought an address such as 192.0.2.7:37123, found {text!r}")
    return f"{host}:{number}"
