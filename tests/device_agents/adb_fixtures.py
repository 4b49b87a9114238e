"""A fake phone for the adb tests; imported by them, for pytest finds fixtures only by name."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.adb.connection import AdbServer
from device_agents.adb.transport import AdbTransport
from device_agents.bundle import Abi, Bundle, BundleBlob, BundleManifest
from tests.device_agents.conftest import FAKE_RUNNER, GRACE_S
from tests.device_agents.fake_adb import SERIAL, FakeAdb

REPOSITORY = Path(__file__).parent.parent.parent
PROPERTIES = {
    "ro.product.cpu.abi": "x86_64",
    "ro.product.cpu.abilist": "x86_64,x86",
    "ro.product.manufacturer": "Google",
    "ro.product.model": "Pixel 8",
    "ro.soc.manufacturer": "Google",
    "ro.soc.model": "Tensor G3",
    "ro.build.version.release": "15",
    "ro.build.version.sdk": "35",
    "ro.build.fingerprint": "google/shiba/shiba:15/AP4A/1:user/release-keys",
    "ro.serialno": SERIAL,
}


def set_properties(commands: Path, properties: dict[str, str]) -> None:
    text = "".join(f"[{name}]: [{value}]\n" for name, value in properties.items())
    (commands / "properties").write_text(text)
    add_command(commands, "getprop", f"cat {commands}/properties")


def add_command(commands: Path, name: str, script: str) -> None:
    """From now on the phone's shell finds this before any other ``name``."""
    path = commands / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    folder = tmp_path / "commands"
    folder.mkdir()
    set_properties(folder, PROPERTIES)
    return folder


@pytest.fixture
def adb(commands: Path) -> Iterator[FakeAdb]:
    with FakeAdb(commands) as server:
        yield server


@pytest.fixture
def phone(adb: FakeAdb) -> AdbTransport:
    return AdbTransport(AdbServer(adb.port, start=False), SERIAL, reach_s=5.0, grace_s=GRACE_S)


def make_bundle(folder: Path, run_sh: str = "", abi: Abi = "x86_64") -> Bundle:
    """A bundle whose run.sh starts the fake runner on this machine's Python."""
    runner = " ".join(FAKE_RUNNER)
    contents = {
        "run.sh": run_sh
        or f'export PYTHONPATH={REPOSITORY}{os.pathsep}$PYTHONPATH\n[ "$1" = -c ] || exec {runner}\n'
        f'exec {sys.executable} "$@"\n',
        "lib/data file.txt": "found beside the program",
    }
    blobs = []
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        blobs.append(BundleBlob(name, digest, len(text.encode()), 0o755))
    manifest = BundleManifest(abi, "user", {}, tuple(blobs))
    (folder / "bundle.json").write_text(manifest.to_json())
    return Bundle.open(folder)
