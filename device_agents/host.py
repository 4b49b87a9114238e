"""The Device that is this machine."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from device_agents import messages
from device_agents.api import DeviceIdentity, Finding, Transport, Vitals
from device_agents.blobs import BlobStore, parse_manifest
from device_agents.deadline import Deadline
from device_agents.errors import DeployFailed, InfrastructureError
from device_agents.local import LocalTransport
from device_agents.recording.logger import script
from device_agents.recording.record import Plan, Recording
from device_agents.recording.remote import ShellRecording
from device_agents.remote_session import Budgets, RunnerClient, RunnerSession
from device_agents.vitals import read_vitals
from kvengine.artifact import MANIFEST
from kvengine.process import process_environment
from kvengine.recipe import SessionRecipe

# -P: the folder that we happen to run in must not shadow the standard library.
RUNNER_ARGV = (sys.executable, "-P", "-m", "device_agents.runner")


class HostDevice:
    """This machine as a device, through a runner process as on any other.

    root: the device's own folder; artifacts live there. store: to share one with the lab agent,
    on whose disk this device is. bytes_moved: copied by all deploys so far.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        transport: Transport | None = None,
        *,
        store: BlobStore | None = None,
        runner_argv: Sequence[str] = RUNNER_ARGV,
        budgets: Budgets | None = None,
    ) -> None:
        self._name = name
        self._root = root
        self._transport = transport or LocalTransport()
        self._store = store or BlobStore(root)
        self._runner_argv = runner_argv
        self._budgets = budgets or Budgets()
        self.bytes_moved = 0

    @property
    def name(self) -> str:
        return self._name

    def identity(self, deadline: Deadline) -> DeviceIdentity:
        """As a runner started for this question tells it."""
        client = RunnerClient(self._transport.open_stream(self._runner_argv, {}))
        try:
            within = Deadline(min(deadline.remaining, self._budgets.hello_s))
            reply, _ = client.call(messages.Hello(), messages.HelloReply, within)
        finally:
            client.close(Deadline(self._budgets.close_s))
        return reply.probe.identity(self._name, "host")

    def claim(self, deadline: Deadline) -> dict[str, str]:
        """Nothing on a host is ours to change."""
        return {}

    def release(self, deadline: Deadline) -> None:
        """As ``claim``."""

    def vitals(self, deadline: Deadline) -> Vitals:
        deadline.check(f"{self._name}: vitals")
        return read_vitals()

    def diagnose(self, deadline: Deadline) -> tuple[Finding, ...]:
        """Whether it is busy; whether a runner starts, and how fast."""
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        busy = Finding("load", "ok", f"{load:.1f} on {cores} cores")
        if load > cores:
            busy = Finding("load", "note", f"{load:.1f} on {cores} cores", "measurements will be noisy")
        began = time.monotonic()
        try:
            found = self.identity(deadline).runtime
        except InfrastructureError as error:
            return (busy, Finding("runner", "fix", str(error), "try: python -m device_agents.runner"))
        took_s, version = time.monotonic() - began, found.get("onnxruntime", "?")
        return (busy, Finding("runner", "ok", f"starts in {took_s:.1f} s, onnxruntime {version}"))

    def deploy(self, folder: Path, deadline: Deadline) -> str:
        """See Device.deploy. Blobs are checked by sha256 after copying, and again if touched since.

        Raises:
            DeployFailed: no manifest, a blob unlike its sha256, no space. DeadlineExceeded: late;
            the next deploy goes on from there.
        """
        try:
            manifest = parse_manifest((folder / MANIFEST).read_text())
        except OSError as error:
            raise DeployFailed(f"sought {MANIFEST} in {folder}: {error}") from error
        missing = self._store.missing(manifest)
        self._store.check_space(sum(blob.size - blob.present for blob in missing))
        blobs = {blob.sha256: blob for blob in manifest.blobs}
        for lack in missing:
            blob = blobs[lack.sha256]
            self.bytes_moved += self._store.add_file(blob, folder / blob.name, deadline)
        return str(self._store.link(manifest))

    def open_session(self, remote_folder: str, recipe: SessionRecipe, deadline: Deadline) -> RunnerSession:
        """In a fresh runner process, whose environment has the recipe's variables from its start."""
        stream = self._transport.open_stream(self._runner_argv, process_environment(recipe))
        return RunnerSession.open(stream, remote_folder, recipe, deadline, self._budgets)

    def start_recording(self, plan: Plan, runner: int | None, deadline: Deadline) -> Recording:
        """See Records.start_recording."""
        text = script(plan, runner, os.cpu_count() or 1, android=False)
        folder = self._root / "recording" / self._name
        return ShellRecording(self._shell, str(folder)).start(text, deadline)

    def _shell(self, text: str, deadline: Deadline, stdin: bytes) -> bytes:
        with tempfile.NamedTemporaryFile() as file:
            file.write(stdin)
            file.flush()
            argv = ["sh", "-c", f"exec <{shlex.quote(file.name)}\n{text}"]
            result = LocalTransport().run(argv, deadline)
        if result.returncode != 0:
            words = result.stderr.decode(errors="replace").strip()[-500:]
            raise InfrastructureError(f"{self._name}: recording failed ({result.returncode}): {words}")
        return result.stdout

    def close(self) -> None:
        """Nothing to stop: this machine goes on."""
