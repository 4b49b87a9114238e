"""The head of a cluster that is not there, for tests of what lab hosts do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from harness.hosting.head import Head, versions
from harness.hosting.records import HostDevice, HostRecord
from harness.reaching import Address

ADDRESS = Address("192.0.2.1", 6379)


class Store:
    """Ray's store of keys, and its nodes, as far as Head uses them."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.nodes = {"n1"}
        self.away = False

    def _answer(self) -> None:
        if self.away:
            raise RuntimeError("no route\nand a long tail")

    def internal_kv_get(self, key: bytes, *_: object) -> bytes | None:
        self._answer()
        return self.kept.get(key)

    def internal_kv_put(self, key: bytes, value: bytes, *_: object) -> None:
        self._answer()
        self.kept[key] = value

    def internal_kv_del(self, key: bytes, *_: object) -> None:
        self.kept.pop(key, None)

    def internal_kv_keys(self, prefix: bytes, *_: object) -> list[bytes]:
        self._answer()
        return [key for key in self.kept if key.startswith(prefix)]

    def get_all_node_info(self, *_: object) -> Mapping[Any, Any]:
        class Info:
            state = 0

        class Id(str):
            def hex(self) -> str:
                return self

        self._answer()
        return {Id(node): Info() for node in self.nodes}


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def head(store: Store) -> Head:
    return Head(ADDRESS, store)


def record(name: str, devices: dict[str, HostDevice], **more: Any) -> HostRecord:
    now = time.time()
    return HostRecord(name, "192.0.2.7", f"node of {name}", versions(), "Linux", now, now, devices, **more)
