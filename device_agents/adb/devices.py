"""Android devices as farm.toml describes them, and virtual phones, which the agent itself starts.

Options of a device of kind "android":

    serial     as `adb devices` says, or ADDRESS:PORT for a wireless one
    adb_port   of the adb server; default $ANDROID_ADB_SERVER_PORT, else 5037
    root       our folder on the device; default /data/local/tmp/kvfarm
    runtime    a folder on the lab host with a Python and onnxruntime in place of ours
    virtual    "true": start a virtual phone instead of looking for a device; then also
    abi        of the virtual phone; default that of this machine
    profile    the model it plays; default device_agents.virtual.profile.DEFAULT
    latency_ms added to its link in each direction, as of a slow network; default 0
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from device_agents.adb.android import AndroidDevice
from device_agents.adb.connection import AdbServer
from device_agents.adb.store import ROOT
from device_agents.adb.transport import AdbTransport
from device_agents.bundle import Abi, Bundle, build
from device_agents.bundle.lock import ABIS, parse_abi
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, InfrastructureError, NoSuchDevice, UnsupportedDevice
from device_agents.virtual import VirtualPhone, load_profile
from device_agents.virtual.adb import PrivateAdbServer
from device_agents.virtual.profile import DEFAULT as DEFAULT_PROFILE
from device_agents.virtual.rootfs import native_abi

OPTIONS = frozenset({"serial", "adb_port", "root", "runtime", "virtual", "abi", "profile", "latency_ms"})
_ONLY_VIRTUAL = {"abi", "profile", "latency_ms"}
_MOST_LATENCY_MS = 10_000.0
_LIST_S = 5.0

_log = logging.getLogger(__name__)
_building = threading.Lock()  # several devices want the same bundle at the same moment


def make_android(config: DeviceConfig, lab_root: Path) -> AndroidDevice:
    """The device of ``config``; nothing is started or asked yet.

    lab_root: the agent's folder; bundles are kept beside it, virtual phones live in it.

    Raises:
        NoSuchDevice: options that make no sense together.
    """
    options = config.options
    virtual = options.get("virtual", "") == "true"
    unknown = options.keys() - (OPTIONS if virtual else OPTIONS - _ONLY_VIRTUAL)
    if unknown or options.get("virtual", "true") != "true" or (virtual and "serial" in options):
        raise NoSuchDevice(
            f"device {config.name!r}: its options make no sense: {options}; an android device takes serial, "
            'adb_port, root and runtime, or virtual = "true" with abi, profile and latency_ms'
        )
    runtime = Path(options["runtime"]) if "runtime" in options else None
    root = options.get("root", ROOT)
    bundle_for = _bundle_source(lab_root.parent / "bundles", runtime)
    if virtual:
        phone = AttachedPhone(config, lab_root / "phones")
        return AndroidDevice(
            config.name, phone.attach, bundle_for, root=root, wanted=config.settings, detach=phone.detach
        )
    return AndroidDevice(config.name, _attached(config), bundle_for, root=root, wanted=config.settings)


def _attached(config: DeviceConfig) -> Callable[[Deadline], AdbTransport]:
    """How to reach a device that is there already."""
    port = config.options.get("adb_port", "")
    server = AdbServer(int(port)) if port.isdigit() else AdbServer.default()
    serial = config.options.get("serial", "")
    transport = AdbTransport(server, serial) if serial else None

    def attach(deadline: Deadline) -> AdbTransport:
        if transport is not None:
            return transport
        known = server.query("host:devices", Deadline(min(deadline.remaining, _LIST_S))).split()[::2]
        raise AdbFailure(
            f'device {config.name!r} has no serial; add options = {{ serial = "..." }} to farm.toml; '
            f"adb knows {', '.join(known) or 'no device'}"
        )

    return attach


def _bundle_source(folder: Path, runtime: Path | None) -> Callable[[str], Bundle]:
    def bundle_for(abi: str) -> Bundle:
        if abi not in ABIS:
            raise UnsupportedDevice(f"sought a device of ABI {' or '.join(ABIS)}, found {abi}")
        with _building:
            return _bundle(parse_abi(abi), folder, runtime)

    return bundle_for


@cache
def _bundle(abi: Abi, folder: Path, runtime: Path | None) -> Bundle:
    return build(abi, folder) if runtime is None else Bundle.from_runtime(runtime, folder, abi)


def _latency_s(config: DeviceConfig) -> float:
    """Raises NoSuchDevice."""
    text = config.options.get("latency_ms", "0")
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= _MOST_LATENCY_MS:
        raise NoSuchDevice(
            f"device {config.name!r}: latency_ms: sought 0 to {_MOST_LATENCY_MS:g} ms, found {text!r}"
        )
    return found / 1e3


class AttachedPhone:
    """A virtual phone with an adb server of its own, so that nothing it suffers reaches another device.

    Both are ours to keep up: for a phone that has died a new one is plugged in, as a person would. One
    that was unplugged on purpose stays away. storage: see VirtualPhone. reach_s: see AdbTransport.
    """

    def __init__(
        self, config: DeviceConfig, folder: Path, *, storage: int = 0, reach_s: float = 10.0
    ) -> None:
        self._config, self._storage, self._reach_s = config, storage, reach_s
        self._latency_s = _latency_s(config)
        self._folder = folder
        self._server: PrivateAdbServer | None = None
        self._phone: VirtualPhone | None = None
        self._transport: AdbTransport | None = None

    def attach(self, deadline: Deadline) -> AdbTransport:
        """Start what does not run. Calls take turns (AndroidDevice).

        Raises:
            VirtualPhoneUnavailable, VirtualPhoneFailed, AdbFailure, DeadlineExceeded.
        """
        if self._phone is not None and self._phone.dead:
            _log.warning("the virtual phone %s died; a new one takes its place", self._config.name)
            self.detach()
        if self._transport is not None and self._server_answers(deadline):
            return self._transport
        try:
            phone = self._phone = self._phone or self._new_phone()
            address = phone.start(deadline)
            server = self._server = PrivateAdbServer()
            port = server.start(deadline)
            server.connect(address, deadline)
        except BaseException:
            self.detach()
            raise
        server_of_it = AdbServer(port, start=False)
        self._transport = AdbTransport(server_of_it, address, reach_s=self._reach_s)
        return self._transport

    @property
    def phone(self) -> VirtualPhone | None:
        """The one that is plugged in now."""
        return self._phone

    @property
    def server(self) -> PrivateAdbServer | None:
        """Its adb server."""
        return self._server

    def detach(self) -> None:
        phone, self._phone = self._phone, None
        try:
            if phone is not None:
                phone.stop()
        finally:
            self._stop_server()

    def _new_phone(self) -> VirtualPhone:
        options = self._config.options
        profile = load_profile(options.get("profile", DEFAULT_PROFILE))
        abi = parse_abi(options["abi"]) if "abi" in options else native_abi()
        self._folder.mkdir(parents=True, exist_ok=True)
        return VirtualPhone(
            self._config.name,
            profile,
            abi,
            self._folder,
            storage=self._storage,
            latency_s=self._latency_s,
        )

    def _server_answers(self, deadline: Deadline) -> bool:
        """Without it: it is stopped, for it may hang as well."""
        assert self._transport is not None
        try:
            self._transport.server.query("host:version", Deadline(min(deadline.remaining, _LIST_S)))
        except InfrastructureError as error:
            _log.warning("the adb server of %s is started again: %s", self._config.name, error)
            self._stop_server()
            return False
        return True

    def _stop_server(self) -> None:
        self._transport = None
        server, self._server = self._server, None
        if server is not None:
            server.stop()
