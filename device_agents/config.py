"""Which devices a lab host owns; read from farm.toml by the harness, plain data here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceConfig:
    """One attached device.

    kind: "host" (this machine). threads: intra-op threads for recipes that leave it open;
    None leaves it to the engine. options: what only this kind of device understands.
    """

    name: str
    kind: str = "host"
    threads: int | None = None
    options: dict[str, str] = field(default_factory=dict)
