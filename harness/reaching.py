"""Addresses of Ray's head node, and whether one answers there."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass

from device_agents.errors import DeadlineExceeded, InfrastructureError

CONNECT_S = 5.0
# RFC 9113: the client's preface and its empty SETTINGS frame; a frame's header is length (3 bytes), type, ...
_SETTINGS = 4
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
_FRAME_HEADER_BYTES = 9


@dataclass(frozen=True)
class Address:
    """Of a server. host: a name or an address, without brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, what: str) -> Address:
        """Of HOST:PORT. Raises InfrastructureError: it is not; ``what`` could not be done."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdigit() or "/" in host:
            raise InfrastructureError(f"{what}: sought HOST:PORT of its head node")
        return cls(host.strip("[]"), int(port))

    @property
    def loopback(self) -> bool:
        """Whether it is this machine talking to itself."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine talking to itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_answers(what: str, address: Address) -> None:
    """That something there speaks gRPC, as Ray's head node does: a server of HTTP/2 begins with SETTINGS.

    Ray itself would try for minutes.

    Raises:
        DeadlineExceeded: it takes the connection and says nothing. InfrastructureError: nobody is there, or
            another kind of server.
    """
    try:
        with socket.create_connection((address.host, address.port), CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return  # it begins otherwise, and by itself
            connection.settimeout(CONNECT_S)
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(_FRAME_HEADER_BYTES, socket.MSG_WAITALL)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{what}: something takes connections there and says nothing for {CONNECT_S:g} s; sought the "
            "head node of a Ray cluster, see `ray status` there"
        ) from error
    except OSError as error:
        raise InfrastructureError(f"{what}: nothing answers there ({error})") from error
    if len(answer) < _FRAME_HEADER_BYTES or answer[3] != _SETTINGS:
        raise InfrastructureError(
            f"{what}: what answers there is no Ray: sought a gRPC server, found {answer!r}; "
            "correct the address"
        )
