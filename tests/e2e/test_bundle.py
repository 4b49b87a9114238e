"""Bundles made from the real packages, and the runner out of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from device_agents import messages
from device_agents.bundle import Abi, Bundle, build, lock
from device_agents.bundle.compiling import host_abi
from device_agents.bundle.elf import machine_of
from device_agents.deadline import Deadline
from device_agents.remote_session import RunnerClient, RunnerSession
from device_agents.streams import ProcessStream
from harness import cli
from harness.recipes import parse_recipe
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from kvengine.program import Decode, Generate, Prefill, Program
from kvengine.recipe import SessionRecipe
from tests.conftest import ExportTiny

LIMIT_BYTES = 35_000_000  # compressed
RECIPE = SessionRecipe(threads=1)
PROGRAM = Program(64, (Prefill(tuple(range(1, 30)), chunk=7), Decode((3, 4)), Generate(5, 5)))
QEMU = "qemu-aarch64-static"
# qemu 7.2 shows the guest this machine's x86 /proc/cpuinfo, and onnxruntime crashes when it
# reads an ARM's features from it. A file below QEMU_LD_PREFIX takes the place of the real one.
CPUINFO = """\
processor	: 0
BogoMIPS	: 38.40
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x1
CPU part	: 0xd0b
CPU revision	: 0
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def own(cache: Path) -> Bundle:
    """Of this machine's own ABI."""
    return build(host_abi(), cache)


@pytest.fixture(scope="module")
def arm64(cache: Path) -> Bundle:
    return build("arm64-v8a", cache)


@pytest.fixture(scope="module")
def artifact(export_tiny: ExportTiny) -> Artifact:
    return export_tiny(parse_recipe("hybrid").export)


class Started:
    """A runner from a bundle, with an environment of its own, as ``env -i`` gives."""

    def __init__(self, bundle: Bundle, folder: Path, **environment: str) -> None:
        self.home, self.tmp = folder / "home", folder / "tmp"
        self.home.mkdir()
        self.tmp.mkdir()
        places = {"KV_HOME": str(self.home), "TMPDIR": str(self.tmp)}
        argv = ("/bin/sh", *Bundle.runner_argv(str(bundle.folder))[1:])
        self.stream = ProcessStream(argv, {**places, **environment})

    def libraries(self) -> set[str]:
        """Files that the runner has mapped to execute, or that are named like a library."""
        lines = Path(f"/proc/{self.stream.pid}/maps").read_text().splitlines()
        mapped = [(words[1], words[5]) for line in lines if len(words := line.split(None, 5)) == 6]
        return {name for rights, name in mapped if name[0] == "/" and ("x" in rights or ".so" in name)}


@pytest.fixture
def started(own: Bundle, tmp_path: Path) -> Iterator[Started]:
    runner = Started(own, tmp_path)
    yield runner
    runner.stream.close()


def test_the_runner_needs_nothing_but_its_bundle(own: Bundle, started: Started, artifact: Artifact) -> None:
    session = RunnerSession.open(started.stream, str(artifact.folder), RECIPE, Deadline(60))
    try:
        found = session.run_program(PROGRAM)
        libraries = started.libraries()
    finally:
        session.close()
    assert any("onnxruntime_pybind11_state" in name for name in libraries)
    assert any("openblas" in name for name in libraries)
    assert [name for name in libraries if not name.startswith(f"{own.folder}/")] == []
    with contextlib.closing(LocalEngine.open(artifact.folder, RECIPE)) as here:
        for ours, theirs in zip(here.run_program(PROGRAM), found, strict=True):
            assert ours.tokens == theirs.tokens
            np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


def test_a_run_leaves_no_file_not_even_telemetry(own: Bundle, started: Started, artifact: Artifact) -> None:
    session = RunnerSession.open(started.stream, str(artifact.folder), RECIPE, Deadline(60))
    session.run_program(PROGRAM)
    session.close()
    assert list(started.home.rglob("*")) == []
    assert list(started.tmp.rglob("*")) == []
    present = {path.relative_to(own.folder).as_posix() for path in own.folder.rglob("*") if path.is_file()}
    assert present == {"bundle.json", *(blob.name for blob in own.files)}
    Bundle.open(own.folder)


def test_onnxruntime_writes_no_telemetry_even_without_kvengine(own: Bundle, tmp_path: Path) -> None:
    """kvengine would switch it off too; here run.sh has to. On is what the wheels come as."""
    argv = ("/bin/sh", *Bundle.python_argv(str(own.folder), "-c", "import onnxruntime")[1:])
    places = {"KV_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    subprocess.run(argv, env=places, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []


def test_the_bundle_says_the_versions_that_run(own: Bundle, started: Started) -> None:
    client = RunnerClient(started.stream)
    try:
        reply, _ = client.call(messages.Hello(), messages.HelloReply, Deadline(60))
    finally:
        client.close(Deadline(5))
    running, said = reply.probe.runtime, own.manifest.versions
    assert running["onnxruntime"] == said["onnxruntime"]
    assert running["numpy"] == said["numpy"]
    assert said["python3.11-minimal"].startswith(f"{running['python']}-")
    assert said["kvfarm"] == running["kvengine"]


def test_a_second_build_is_instant(own: Bundle, cache: Path) -> None:
    began = time.monotonic()
    again = build(own.abi, cache)
    assert again == own
    assert time.monotonic() - began < 1.0


def test_the_same_inputs_give_the_same_bytes_anywhere(
    own: Bundle, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "another" / "cache"
    shutil.copytree(cache / "downloads", elsewhere / "downloads", copy_function=os.link)
    # Nothing may be fetched now, and little of the environment may matter.
    monkeypatch.setenv("PATH", os.pathsep.join([_without_apt(tmp_path), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    before = os.umask(0o077)
    try:
        again = build(own.abi, elsewhere)
    finally:
        os.umask(before)
    differing = {blob.name for blob in set(own.files) ^ set(again.files)}
    assert differing == set()
    assert again.id == own.id
    assert _tar(again) == _tar(own)


def _without_apt(folder: Path) -> str:
    program = folder / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 100\n")
    program.chmod(0o755)
    return str(program.parent)


def _tar(bundle: Bundle) -> str:
    """sha256 of the files' names, modes, times and contents."""
    fixed = ("--owner=0", "--group=0")
    # Not the folders: they say when they were made.
    files = "\n".join(blob.name for blob in bundle.files)
    script = f"tar -C '{bundle.folder}' {' '.join(fixed)} -cf - -T - | sha256sum"
    done = subprocess.run(
        ("sh", "-c", script), input=files, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_an_altered_bundle_is_made_again(own: Bundle, cache: Path) -> None:
    victim = own.folder / "site/numpy/__init__.pyc"
    victim.chmod(0o600)
    victim.write_bytes(b"no code")
    again = build(own.abi, cache)
    assert again.id == own.id
    Bundle.open(again.folder)


@pytest.mark.parametrize("abi", lock.ABIS)
def test_a_bundle_is_small_and_holds_no_source_and_nothing_of_this_machine(
    abi: Abi, cache: Path, tmp_path: Path
) -> None:
    bundle = build(abi, cache)
    assert [blob.name for blob in bundle.files if blob.name.endswith(".py")] == []
    names = "|".join(
        re.escape(str(p)) for p in (cache, Path.home(), Path(__file__).parents[2]) if len(p.parts) > 2
    )
    ours = [bundle.path(blob) for blob in bundle.files if blob.name.endswith((".pyc", ".zip", ".sh"))]
    assert [path for path in ours if re.search(names.encode(), path.read_bytes())] == []
    assert _compressed_bytes(bundle.folder, tmp_path) < LIMIT_BYTES


def _compressed_bytes(folder: Path, tmp_path: Path) -> int:
    """As tar, by zstd level 10, or by xz where there is no zstd."""
    program = ("zstd", "-10", "-T0") if shutil.which("zstd") else ("xz", "-1", "-T0")
    packed = tmp_path / "packed"
    command = f"tar -C '{folder}' -cf - . | {' '.join(program)} -c > '{packed}'"
    subprocess.run(("sh", "-c", command), check=True, timeout=120, stderr=subprocess.DEVNULL)
    return packed.stat().st_size


@pytest.mark.parametrize("abi", lock.ABIS)
def test_every_binary_is_for_the_abi_and_for_16_kb_pages(abi: Abi, cache: Path) -> None:
    bundle = build(abi, cache)
    binaries = [bundle.path(blob) for blob in bundle.files if machine_of(bundle.path(blob))]
    assert len(binaries) > 40
    assert {machine_of(path) for path in binaries} == {lock.PLATFORMS[abi].machine}
    if abi == "arm64-v8a":  # Android 15 on ARM may have pages of 16 KB
        assert {path.name for path in binaries if _load_alignment(path) < 1 << 14} == set()


def _load_alignment(path: Path) -> int:
    """The least p_align of the LOAD segments (ELF-64: program headers of 56 bytes, from e_phoff)."""
    data = path.read_bytes()
    (offset,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * size) for i in range(count)]
    return min(int(header[7]) for header in headers if header[0] == 1)


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU} here; apt-get install qemu-user-static")
def test_the_arm64_runner_runs_under_qemu(arm64: Bundle, artifact: Artifact, tmp_path: Path) -> None:
    root = tmp_path / "arm"
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(CPUINFO)
    emulator = {"KV_EMU": str(shutil.which(QEMU)), "QEMU_LD_PREFIX": str(root)}
    runner = Started(arm64, tmp_path, **emulator)
    try:
        session = RunnerSession.open(runner.stream, str(artifact.folder), RECIPE, Deadline(120))
        found = session.run_program(PROGRAM)
        outside = {name for name in runner.libraries() if not name.startswith(f"{arm64.folder}/")}
        session.close()
    finally:
        runner.stream.close()
    assert {Path(name).name for name in outside} <= {QEMU}
    assert list(runner.home.rglob("*")) == list(runner.tmp.rglob("*")) == []
    with contextlib.closing(LocalEngine.open(artifact.folder, RECIPE)) as here:
        for ours, theirs in zip(here.run_program(PROGRAM), found, strict=True):
            # Another instruction set sums in another order.
            np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-3, atol=1e-3)


def test_the_command(
    own: Bundle,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / ".kvfarm").mkdir()
    (tmp_path / ".kvfarm/bundles").symlink_to(cache)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["bundle", "--abi", own.abi, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["id"], said["abi"], said["runtime"]) == (own.id, own.abi, "kvfarm")
    assert said["files"] == len(own.files)
    assert Bundle.open(Path(said["bundle"])).id == own.id
    assert cli.run(["bundle", "--abi", "mips"]) == 2
    assert "arm64-v8a, x86_64" in capsys.readouterr().err
    assert cli.run(["bundle"]) == 2
    assert "--abi" in capsys.readouterr().err
