"""The cluster's head node as hosts and people see it: versions, and a small store of JSON by key.

The store is Ray's own (GCS); it lives as long as the head does. What hosts write there is plain JSON with
a size limit, never pickled: a record of a host is read by everybody.
"""

from __future__ import annotations

import json
import sys
from typing import Any, TypeVar

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

import kvengine
from device_agents.errors import InfrastructureError
from harness.errors import NotAuthenticated, VersionMismatch
from harness.hosting import token
from harness.reaching import Address, check_answers
from kvengine.codec import DecodeError, decode, encode

T = TypeVar("T")

NAMESPACE = b"kvfarm"
VERSIONS = "versions"  # of the head, by what
CALL_S = 5.0
_MOST_BYTES = 1 << 20
_METADATA = (b"CLUSTER_METADATA", b"cluster")  # ray/_common/usage/usage_constants.py
_REMEDY = {
    "kvfarm": "install the same kvfarm on both",
    "ray": "`pip install ray==<that of the head>`, see constraints.txt",
    "python": "make the environment with the head's Python, to the last digit: Ray sends code between them",
}


def versions() -> dict[str, str]:
    """What must be the same on all machines of a cluster."""
    return {"kvfarm": kvengine.__version__, "ray": ray.__version__, "python": sys.version.split()[0]}


class Head:
    """The head node at ``address``, made by ``connect``. All methods raise InfrastructureError."""

    def __init__(self, address: Address, client: GcsClient) -> None:
        self.address = address
        self._client = client

    def get(self, kind: type[T], key: str) -> T | None:
        """What is kept at ``key``; None: nothing, or no ``kind``."""
        return _decoded(kind, self._do("internal_kv_get", key.encode(), NAMESPACE, CALL_S))

    def all(self, kind: type[T], prefix: str) -> dict[str, T]:
        """What is kept at keys that begin so, by what follows; what is no ``kind`` is left out."""
        found = {}
        for key in self._do("internal_kv_keys", prefix.encode(), NAMESPACE, CALL_S):
            value = _decoded(kind, self._do("internal_kv_get", key, NAMESPACE, CALL_S))
            if value is not None:
                found[key.decode(errors="replace").removeprefix(prefix)] = value
        return found

    def put(self, key: str, value: object) -> None:
        """Keep ``value``, a dataclass or plain data."""
        text = json.dumps(encode(value)).encode()
        self._do("internal_kv_put", key.encode(), text, True, NAMESPACE, CALL_S)

    def delete(self, key: str) -> None:
        self._do("internal_kv_del", key.encode(), False, NAMESPACE, CALL_S)

    def alive(self) -> frozenset[str]:
        """Ids of the Ray nodes that the head takes for alive."""
        found = self._do("get_all_node_info", CALL_S)
        return frozenset(id_.hex() for id_, info in found.items() if info.state == 0)

    def check_versions(self) -> None:
        """Raises VersionMismatch: this machine has another Ray, Python or kvfarm than the head."""
        raw = self._do("internal_kv_get", *_METADATA, CALL_S)
        metadata = json.loads(raw) if raw else {}
        theirs = {"ray": metadata.get("ray_version"), "python": metadata.get("python_version")}
        # A head that somebody started with `ray start` tells no version of kvfarm.
        theirs |= self.get(dict[str, str], VERSIONS) or {}
        ours = versions()
        other = [name for name in ours if theirs.get(name) not in (None, ours[name])]
        if other:
            found = ", ".join(f"{name} {theirs[name]} at the head and {ours[name]} here" for name in other)
            what = "; ".join(_REMEDY[name].replace("<that of the head>", str(theirs[name])) for name in other)
            raise VersionMismatch(
                f"the cluster at {self.address.host}:{self.address.port} has {found}; {what}"
            )

    def _do(self, method: str, *arguments: Any) -> Any:
        what = f"the head node at {self.address.host}:{self.address.port}"
        try:
            return getattr(self._client, method)(*arguments)
        except AuthenticationError as error:
            raise _refused(what) from error
        except (RayError, RuntimeError, TimeoutError) as error:
            raise InfrastructureError(f"{what} does not answer: {str(error).splitlines()[0]}") from error


def connect(text: str, what: str) -> Head:
    """The head node at HOST:PORT, which takes our token and has our versions; ``what`` is done for that.

    Raises:
        NotAuthenticated, VersionMismatch. DeadlineExceeded, InfrastructureError: no head node answers there.
    """
    address = Address.parse(text, what)
    check_answers(what, address)
    token.show()
    try:
        client = GcsClient(address=f"{address.host}:{address.port}")
    except AuthenticationError as error:
        raise _refused(what) from error
    except (RayError, RuntimeError, TimeoutError) as error:
        raise InfrastructureError(f"{what}: {str(error).splitlines()[0]}") from error
    head = Head(address, client)
    head.check_versions()
    return head


def _refused(what: str) -> NotAuthenticated:
    return NotAuthenticated(
        f"{what}: it refuses our token ({token.source()}); copy the head's file there, mode 0600, "
        f"see docs/farm.md"
    )


def _decoded(kind: type[T], raw: bytes | None) -> T | None:
    if raw is None or len(raw) > _MOST_BYTES:
        return None
    try:
        return decode(kind, json.loads(raw))
    except (ValueError, DecodeError):
        return None
