"""The Device behind adb: an Android phone, unrooted, with nothing on it but our folder."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agents import messages
from device_agents.adb import settings
from device_agents.adb.android_vitals import read_android_vitals
from device_agents.adb.diagnose import diagnose, noexec_mount
from device_agents.adb.facts import Facts, read_facts
from device_agents.adb.locks import holding
from device_agents.adb.shell_text import ask
from device_agents.adb.shell_v2 import ShellStream
from device_agents.adb.store import LIMIT_BYTES, ROOT, PhoneFile, PhoneStore
from device_agents.adb.transport import AdbTransport
from device_agents.api import DeviceIdentity, Finding, Vitals
from device_agents.blobs import parse_manifest
from device_agents.bundle.model import Bundle
from device_agents.config import DeviceSettings
from device_agents.deadline import Deadline
from device_agents.errors import (
    AdbFailure,
    DeadlineExceeded,
    DeployFailed,
    DeviceUnreachable,
    RunnerDied,
    UnsupportedDevice,
)
from device_agents.recording.logger import script
from device_agents.recording.record import Plan, Recording
from device_agents.recording.remote import ShellRecording
from device_agents.remote_session import Budgets, RunnerClient, RunnerSession
from kvengine.artifact import MANIFEST
from kvengine.errors import ArtifactError
from kvengine.recipe import SessionRecipe

_log = logging.getLogger(__name__)

_FACTS_S = 20.0
_DIAGNOSE_S = 20.0
# What a shell or a kernel says of a file that it does not execute.
_NOT_EXECUTED = re.compile(r"permission denied|exec format|not executable|cannot execute|can't execute", re.I)

Attach = Callable[[Deadline], AdbTransport]
"""Makes the device reachable, if need be, and says how; the same transport as long as nothing changed."""


class AndroidDevice:
    """An Android device.

    attach: called before every use. bundle_for: gives the runtime bundle for an ABI (Android's name).
    root: our folder on the device; limit_bytes: what it may weigh. wanted: settings while it is in use.
    detach: called by ``close``.
    """

    def __init__(
        self,
        name: str,
        attach: Attach,
        bundle_for: Callable[[str], Bundle],
        *,
        root: str = ROOT,
        limit_bytes: int = LIMIT_BYTES,
        wanted: DeviceSettings | None = None,
        budgets: Budgets | None = None,
        detach: Callable[[], None] | None = None,
    ) -> None:
        self._name = name
        self._attach = attach
        self._bundle_for = bundle_for
        self._root = root
        self._limit = limit_bytes
        self._settings = wanted or DeviceSettings()
        self._budgets = budgets or Budgets()
        self._detach = detach
        self._starting = threading.Lock()  # held while the bundle is brought and tried, maybe for minutes
        self._lock = threading.Lock()  # guards what follows
        self._transport: AdbTransport | None = None
        self._store: PhoneStore | None = None
        self._facts: Facts | None = None
        self._bundle_folder = ""  # once it is there and was seen to start
        self._deployed: dict[str, tuple[PhoneFile, ...]] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def bytes_moved(self) -> int:
        """Payload of all deploys so far, over the present transport."""
        return self._store.bytes_moved if self._store else 0

    def facts(self, deadline: Deadline) -> Facts:
        """What the device says of itself; asked once."""
        transport = self._reach(deadline)
        with holding(self._lock, deadline, self._name):
            if self._facts is None:
                self._facts = read_facts(transport, Deadline(min(deadline.remaining, _FACTS_S)))
            return self._facts

    def identity(self, deadline: Deadline) -> DeviceIdentity:
        """From the device's properties, and from a runner started for this question.

        Raises:
            UnsupportedDevice: it cannot run the engine. BundleError, DeployFailed, RunnerDied,
            DeviceUnreachable, DeadlineExceeded.
        """
        facts = self.facts(deadline)
        client = RunnerClient(self._start({}, deadline))
        try:
            with self._looking_again():
                within = Deadline(min(deadline.remaining, self._budgets.hello_s))
                reply, _ = client.call(messages.Hello(), messages.HelloReply, within)
        finally:
            client.close(Deadline(self._budgets.close_s))
        probed = reply.probe.identity(self._name, "android", facts.simulated)
        return dataclasses.replace(
            probed,
            model=facts.model,
            soc=facts.soc or probed.soc,
            abi=facts.abi,
            os=facts.os,
            build=facts.fingerprint or probed.build,
            cores=facts.cores or probed.cores,
            ram_bytes=facts.ram_bytes or probed.ram_bytes,
            serial=facts.serial,
            api_level=facts.api,
            abis=facts.abis,
            clusters=facts.clusters,
            thermal_sensors=tuple(dict.fromkeys((*facts.thermal_sensors, *facts.thermal_zones))),
            battery=facts.battery,
        )

    def claim(self, deadline: Deadline) -> dict[str, str]:
        return settings.apply(self._reach(deadline), self._root, self._settings, deadline)

    def release(self, deadline: Deadline) -> None:
        settings.restore(self._reach(deadline), self._root, deadline)

    def reboot(self, deadline: Deadline) -> None:
        """See restarting.Reboots. The phone may end the connection before it has answered."""
        transport = self._reach(deadline)
        try:
            done = transport.run(("reboot",), deadline)
        except (DeviceUnreachable, DeadlineExceeded) as error:
            _log.info("%s: told to reboot, and gone: %s", self._name, error)
            return
        if done.returncode:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()[:200]
            raise AdbFailure(f"{self._name} does not reboot (exit code {done.returncode}): {said}")

    def vitals(self, deadline: Deadline) -> Vitals:
        return read_android_vitals(self._reach(deadline), deadline)

    def diagnose(self, deadline: Deadline) -> tuple[Finding, ...]:
        return diagnose(self._reach, self._root, deadline)

    def deploy(self, folder: Path, deadline: Deadline) -> str:
        """See Device.deploy and PhoneStore.deploy."""
        try:
            text = (folder / MANIFEST).read_bytes()
            manifest = parse_manifest(text.decode())
        except (OSError, UnicodeDecodeError) as error:
            raise DeployFailed(f"sought {MANIFEST} in {folder}: {error}") from error
        own = PhoneFile(MANIFEST, hashlib.sha256(text).hexdigest(), len(text), folder / MANIFEST)
        files = (own, *(PhoneFile(b.name, b.sha256, b.size, folder / b.name) for b in manifest.blobs))
        remote = self._phone_store(deadline).deploy(f"artifacts/{manifest.id}", files, deadline)
        with self._lock:
            self._deployed[remote] = files
        return remote

    def open_session(self, remote_folder: str, recipe: SessionRecipe, deadline: Deadline) -> RunnerSession:
        """In a fresh runner process, whose environment has the recipe's variables from its start.

        Raises:
            KvEngineError: the engine refused the artifact or the recipe.
            DeployFailed: the artifact was damaged on the device; deploy it again. Otherwise as ``identity``.
        """
        stream = self._start(recipe.environment, deadline)
        try:
            with self._looking_again():
                return RunnerSession.open(stream, remote_folder, recipe, deadline, self._budgets)
        except ArtifactError as error:
            # A worn-out flash is the lab's trouble and not the engine's.
            with self._lock:
                files = self._deployed.get(remote_folder, ())
            damaged = self._phone_store(deadline).altered(files, deadline) if files else []
            if damaged:
                self._bundle_folder = ""  # its folder went with the damaged blobs
                raise DeployFailed(
                    f"{self._name}: {', '.join(damaged)} changed on the device since the last deploy; "
                    "deploy again, and suspect its storage"
                ) from error
            raise

    def start_recording(self, plan: Plan, runner: int | None, deadline: Deadline) -> Recording:
        """See Records.start_recording. Nothing goes over adb until it is stopped."""
        transport = self._reach(deadline)
        text = script(plan, runner, self.facts(deadline).cores, android=True)

        def shell(command: str, within: Deadline, stdin: bytes) -> bytes:
            result = transport.shell(command, within, [stdin] if stdin else ())
            if result.returncode != 0:
                words = result.stderr.decode(errors="replace").strip()[-500:]
                raise AdbFailure(f"{self._name}: recording failed ({result.returncode}): {words}")
            return result.stdout

        return ShellRecording(shell, f"{self._root}/recording").start(text, deadline)

    def close(self) -> None:
        """Stop what was started to reach the device, e.g. a virtual phone. Sessions end before."""
        with self._lock:
            self._transport = None
            if self._detach is not None:
                self._detach()

    # -- inside ---------------------------------------------------------------------------

    def _reach(self, deadline: Deadline) -> AdbTransport:
        with holding(self._lock, deadline, self._name):
            transport = self._attach(deadline)
            if transport is not self._transport:
                self._transport = transport
                self._bundle_folder = ""  # it may be another phone, or the same one emptied
                self._store = PhoneStore(transport, self._root, self._limit)
            return transport

    def _phone_store(self, deadline: Deadline) -> PhoneStore:
        self._reach(deadline)
        assert self._store is not None
        return self._store

    def _start(self, environment: dict[str, str], deadline: Deadline) -> ShellStream:
        """A runner process, which has not answered yet."""
        transport = self._reach(deadline)
        with holding(self._starting, deadline, self._name):
            if not self._bundle_folder:
                folder = self._deploy_bundle(deadline)
                self._prove(transport, folder)
                self._bundle_folder = folder
            folder = self._bundle_folder
        return transport.open_stream(Bundle.runner_argv(folder), environment)

    @contextmanager
    def _looking_again(self) -> Iterator[None]:
        """A runner that dies at its start may have lost its bundle (somebody emptied /data/local/tmp)."""
        try:
            yield
        except RunnerDied:
            self._bundle_folder = ""
            raise

    def _deploy_bundle(self, deadline: Deadline) -> str:
        facts = self.facts(deadline)
        bundle = self._bundle_for(facts.abi)
        if bundle.abi not in facts.abis:
            raise UnsupportedDevice(
                f"{self._name}: a bundle for {bundle.abi} on a device that runs {', '.join(facts.abis)}"
            )
        files = [PhoneFile(b.name, b.sha256, b.size, bundle.path(b)) for b in bundle.files]
        return self._phone_store(deadline).deploy(f"bundles/{bundle.id}", files, deadline)

    def _prove(self, transport: AdbTransport, folder: str) -> None:
        """The bundle's Python starts here.

        Raises:
            UnsupportedDevice: the device does not execute it; says what is known of the reason.
            RunnerDied: it starts and fails.
        """
        deadline = Deadline(_DIAGNOSE_S)
        result = transport.run(Bundle.python_argv(folder, "-c", "pass"), deadline)
        if result.returncode == 0:
            return
        words = (result.stderr + result.stdout).decode(errors="replace").strip()[-500:]
        if result.returncode not in (126, 127) and not _NOT_EXECUTED.search(words):
            raise RunnerDied(
                f"{self._name}: the bundle's Python ends with exit code {result.returncode}\nit said: {words}"
            )
        facts = self.facts(deadline)
        questions = {"mounts": "cat /proc/mounts", "real": f"readlink -f {shlex.quote(folder)}"}
        answers = ask(transport, questions, deadline)
        noexec = noexec_mount(answers["mounts"], answers["real"] or folder)
        selinux = {True: "enforcing", False: "not enforcing", None: "unknown"}[facts.enforcing]
        hint = f"it is mounted noexec ({noexec})" if noexec else f"SELinux is {selinux}"
        raise UnsupportedDevice(
            f"{self._name} ({facts.model}, {facts.abi}) does not execute programs in {folder}: {hint}; name "
            f"another folder: options.root in farm.toml\nits shell said: {words}"
        )
