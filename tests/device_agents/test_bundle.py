"""The parts of the bundle that need neither network nor packages."""

from __future__ import annotations

import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from device_agents import messages
from device_agents.bundle import ENTRY, MANIFEST, Bundle, contents
from device_agents.bundle.elf import machine_of
from device_agents.bundle.launcher import run_sh
from device_agents.bundle.lock import ABIS, PLATFORMS, Lock, load_lock, parse_abi
from device_agents.bundle.model import seal
from device_agents.deadline import Deadline
from device_agents.errors import BundleError
from device_agents.remote_session import RunnerClient
from device_agents.streams import ProcessStream
from tests.test_rooms import ON_THE_PHONE

ROOT = Path(__file__).parents[2]
SHELL = "/bin/sh"


# The lock


@pytest.mark.parametrize("abi", ABIS)
def test_the_lock_pins_every_package(abi: str) -> None:
    packages = load_lock().packages(parse_abi(abi))
    assert sorted(p.name for p in packages.debs) == sorted(contents.DEBS)
    assert sorted(p.name for p in packages.wheels) == sorted(contents.WHEELS)
    assert all(package.size > 0 and package.version for package in (*packages.debs, *packages.wheels))


def test_phones_run_the_versions_that_hosts_run() -> None:
    constraints = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for packages in load_lock().abis.values():
        for wheel in packages.wheels:
            assert wheel.version == constraints[wheel.name], f"{wheel.name}: run kvfarm bundle --relock"


def test_a_lock_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_text(load_lock().to_json())
    assert load_lock(path) == load_lock()


@pytest.mark.parametrize(
    ("altered", "complaint"),
    [
        (lambda text: text.replace("lock/1", "lock/2"), "no lock of format"),
        (lambda text: text.replace('"bookworm"', '"trixie"'), "for Debian trixie"),
        (lambda text: text.replace('"sha256": "', '"sha256": "x'), "is no sha256"),
        (lambda text: text.replace('"debs"', '"deps"'), "no lock of format"),
        (lambda text: text[:100], "no lock of format"),
    ],
)
def test_a_spoilt_lock_is_refused(altered: Callable[[str], str], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_text(altered(load_lock().to_json()))
    with pytest.raises(BundleError, match=complaint):
        load_lock(path)


def test_without_a_lock_or_an_abi_in_it_one_is_told_to_relock(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="bundle --relock"):
        load_lock(tmp_path / "lock.json")
    with pytest.raises(BundleError, match="bundle --relock"):
        Lock({}).packages("x86_64")


def test_an_unknown_abi_is_refused() -> None:
    with pytest.raises(BundleError, match="armeabi-v7a"):
        parse_abi("armeabi-v7a")


# What goes in


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("os.py", True),
        ("unittest/case.py", True),
        ("unittest/test/test_case.py", False),
        ("test/support/__init__.py", False),
        ("turtle.py", False),
        ("config-3.11-x86_64-linux-gnu/python-config.py", False),
        ("encodings/utf_8.py", True),
    ],
)
def test_of_the_standard_library(name: str, kept: bool) -> None:
    assert contents.keeps_stdlib(name) == kept


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("_ctypes.cpython-311-x86_64-linux-gnu.so", True),
        ("_json.cpython-311-aarch64-linux-gnu.so", True),
        ("_ssl.cpython-311-x86_64-linux-gnu.so", False),
        ("_hashlib.cpython-311-x86_64-linux-gnu.so", False),
        ("_ctypes_test.cpython-311-x86_64-linux-gnu.so", False),
    ],
)
def test_of_the_extension_modules(name: str, kept: bool) -> None:
    assert contents.keeps_dynload(name) == kept


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("numpy/__init__.py", True),
        ("numpy/testing/__init__.py", True),
        ("numpy/_core/tests/test_umath.py", False),
        ("numpy/_core/_multiarray_umath.cpython-311-x86_64-linux-gnu.so", True),
        ("numpy/_core/_multiarray_tests.cpython-311-x86_64-linux-gnu.so", False),
        ("numpy/__init__.pyi", False),
        ("numpy-2.4.6.dist-info/RECORD", False),
        ("numpy-2.4.6.dist-info/licenses/LICENSE.txt", True),
        ("numpy.libs/libscipy_openblas64_-0.so", True),
        ("onnxruntime/capi/libonnxruntime.so.1.32.0", False),
        ("onnxruntime/capi/onnxruntime_pybind11_state.cpython-311-x86_64-linux-gnu.so", True),
        ("onnxruntime/capi/libonnxruntime_providers_shared.so", True),
        ("onnxruntime/transformers/optimizer.py", False),
    ],
)
def test_of_the_wheels(name: str, kept: bool) -> None:
    assert contents.keeps_site(name) == kept


def test_of_our_own_modules_go_those_that_may_run_on_the_phone() -> None:
    assert set(contents.ON_DEVICE) == set(ON_THE_PHONE)
    assert "kvengine/engine.py" in contents.own_sources()
    assert not [name for name in contents.own_sources() if "export" in name]


def test_our_modules_need_nothing_that_stays_behind(tmp_path: Path) -> None:
    """The runner and the engine import with only the bundle's modules, numpy and onnxruntime."""
    for name, source in contents.own_sources().items():
        target = tmp_path / "code" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in contents.own_sources()]
    origins = f"{{m.__file__ for n, m in sys.modules.items() if n in {modules!r}}}"
    script = f"import {', '.join(modules)}, sys; print(*{origins})"
    site = str(Path(numpy.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", script],
        env={"PYTHONPATH": f"{tmp_path / 'code'}:{site}", "ORT_DISABLE_TELEMETRY": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())
    assert len(done.stdout.split()) == len(modules)


# A bundle on the disk


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


FILES = {"run.sh": "#!/bin/sh", "lib/a.so": "library", "site/numpy/__init__.pyc": "code"}


def sealed(
    folder: Path, files: dict[str, str] | None = None, executable: tuple[str, ...] = ("run.sh",)
) -> Bundle:
    return seal(tree(folder, FILES if files is None else files), "x86_64", "kvfarm", {}, executable)


def test_the_same_files_are_the_same_bundle(tmp_path: Path) -> None:
    first = sealed(tmp_path / "first")
    other = tree(tmp_path / "other", dict(reversed(FILES.items())))
    (other / "lib/a.so").chmod(0o600)
    os.utime(other / "run.sh", (1, 1))
    assert sealed(other).id == first.id
    assert (other / MANIFEST).read_bytes() == (first.folder / MANIFEST).read_bytes()
    for blob in first.files:
        status, again = first.path(blob).stat(), (other / blob.name).stat()
        assert (status.st_mtime, status.st_mode) == (again.st_mtime, again.st_mode)
        assert stat.S_IMODE(status.st_mode) == blob.mode == (0o755 if blob.name == "run.sh" else 0o644)


@pytest.mark.parametrize(
    ("files", "executable"),
    [
        ({**FILES, "lib/a.so": "Library"}, ("run.sh",)),
        ({**FILES, "lib/b.so": "library"}, ("run.sh",)),
        ({"run.sh": FILES["run.sh"]}, ("run.sh",)),
        (FILES, ("run.sh", "lib/a.so")),
    ],
)
def test_other_files_are_another_bundle(
    files: dict[str, str], executable: tuple[str, ...], tmp_path: Path
) -> None:
    assert sealed(tmp_path / "a", files, executable).id != sealed(tmp_path / "b").id


def test_a_bundle_is_found_again(tmp_path: Path) -> None:
    bundle = sealed(tmp_path)
    assert Bundle.open(tmp_path) == bundle
    assert bundle.manifest.size == sum(len(text) for text in FILES.values())


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "lib/a.so").unlink(), "lacks lib/a.so"),
        (lambda folder: (folder / "lib/a.so").write_text("librar"), "found 6 bytes"),
        (lambda folder: (folder / "lib/a.so").write_text("Library"), "found 7 bytes of"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "no manifest of format"),
        (lambda folder: (folder / MANIFEST).unlink(), "found none"),
    ],
)
def test_a_spoilt_bundle_is_refused(spoil: Callable[[Path], object], complaint: str, tmp_path: Path) -> None:
    sealed(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BundleError, match=complaint):
        Bundle.open(tmp_path)


def test_links_and_odd_names_are_no_part_of_a_bundle(tmp_path: Path) -> None:
    tree(tmp_path / "linked", FILES)
    (tmp_path / "linked/passwd").symlink_to("/etc/passwd")
    tree(tmp_path / "odd", {"a\nb": ""})
    for name in ("linked", "odd"):
        with pytest.raises(BundleError, match="plain files"):
            seal(tmp_path / name, "x86_64", "kvfarm", {}, ())


# run.sh


@pytest.fixture
def startable(tmp_path: Path) -> Path:
    """A bundle whose loader only says how it was started."""
    folder = tree(tmp_path / "a bundle", {ENTRY: run_sh("x86_64")})
    loader = folder / "lib" / PLATFORMS["x86_64"].loader
    loader.parent.mkdir()
    loader.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nprintf 'and\\n'\nexec /usr/bin/env\n")
    loader.chmod(0o755)
    return folder


def start(
    folder: Path, *arguments: str, cwd: Path = Path("/"), **environment: str
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that the loader was given."""
    argv = Bundle.python_argv(os.path.relpath(folder, cwd) if cwd != Path("/") else str(folder), *arguments)
    assert argv[0] == "sh"
    done = subprocess.run(
        [SHELL, *argv[1:]], env=environment, cwd=cwd, capture_output=True, text=True, timeout=10, check=True
    )
    before, after = done.stdout.split("and\n", 1)
    return before.splitlines(), dict(line.split("=", 1) for line in after.splitlines())


def test_run_sh_starts_python_through_the_bundles_own_loader(startable: Path) -> None:
    arguments, environment = start(
        startable, "-m", "device_agents.runner", "two words", LD_PRELOAD="", HOME="/"
    )
    python = f"{startable}/bin/python3"
    loading = ["--inhibit-cache", "--library-path", f"{startable}/lib", "--argv0", python, python]
    assert arguments == [*loading, "-S", "-m", "device_agents.runner", "two words"]
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment["PYTHONHOME"] == str(startable)
    assert environment["PYTHONPATH"] == f"{startable}/code:{startable}/site"
    assert environment["HOME"] == environment["TMPDIR"] == str(startable)
    assert environment["LC_ALL"] == "C.UTF-8"
    assert "LD_PRELOAD" not in environment


def test_run_sh_works_from_any_folder_and_takes_places_to_write(startable: Path, tmp_path: Path) -> None:
    arguments, environment = start(
        startable, cwd=tmp_path, KV_HOME="/h o", TMPDIR="/t", PYTHONPATH="/elsewhere"
    )
    assert arguments[2] == f"{tmp_path}/a bundle/lib"
    assert (environment["HOME"], environment["TMPDIR"]) == ("/h o", "/t")
    assert "/elsewhere" not in environment["PYTHONPATH"]
    assert start(startable, cwd=startable)[0][2] == f"{startable}/./lib"


def test_run_sh_starts_through_an_emulator_where_there_is_one(startable: Path) -> None:
    arguments, environment = start(startable, KV_EMU="/usr/bin/env EMULATED=yes")
    assert environment["EMULATED"] == "yes"
    assert arguments[0] == "--inhibit-cache"


# A user's own runtime


def elf(machine: int) -> bytes:
    return struct.pack("<4sBBB9xHH", b"\x7fELF", 2, 1, 1, 3, machine) + bytes(44)


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """This very Python as a user's runtime."""
    script = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    folder = tree(tmp_path / "runtime", {ENTRY: script, "lib/libx.so.1": ""})
    (folder / "lib/libx.so.1").write_bytes(elf(183))
    (folder / "lib/libx.so").symlink_to("libx.so.1")
    return folder


def test_what_machine_a_binary_is_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, machine in (
        (elf(183), "aarch64"),
        (elf(62), "x86_64"),
        (elf(40), "arm"),
        (b"#!/bin/sh\n" * 9, None),
    ):
        path.write_bytes(content)
        assert machine_of(path) == machine
    path.write_bytes(b"")
    assert machine_of(path) is None


def test_a_users_runtime_runs_our_runner(runtime: Path, tmp_path: Path) -> None:
    bundle = Bundle.from_runtime(runtime, tmp_path / "cache")
    assert bundle.abi == "arm64-v8a"
    assert bundle.manifest.runtime == "user"
    names = {blob.name for blob in bundle.files}
    assert {"run.sh", "runtime/run.sh", "runtime/lib/libx.so", "code/device_agents/runner.py"} < names
    assert Bundle.from_runtime(runtime, tmp_path / "cache") == bundle
    script = "import os; print(os.environ['ORT_DISABLE_TELEMETRY'], 'KVFARM' in os.environ)"
    asked = Bundle.python_argv(str(bundle.folder), "-c", script)
    done = subprocess.run(
        [SHELL, *asked[1:]], env={"KVFARM": ""}, capture_output=True, timeout=10, check=True
    )
    assert done.stdout == b"1 True\n"
    argv = Bundle.runner_argv(str(bundle.folder))
    assert argv == ("sh", f"{bundle.folder}/run.sh", "-m", "device_agents.runner")
    client = RunnerClient(ProcessStream([SHELL, *argv[1:]], {}))
    try:
        reply, _ = client.call(messages.Hello(), messages.HelloReply, Deadline(30))
    finally:
        client.close(Deadline(5))
    assert reply.probe.runtime["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    Bundle.open(bundle.folder)


def test_a_users_runtime_needs_an_entry_and_one_abi(runtime: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(BundleError, match=r"sought .*run\.sh"):
        Bundle.from_runtime(tmp_path, cache)
    with pytest.raises(BundleError, match="sought binaries for x86_64, found arm64-v8a"):
        Bundle.from_runtime(runtime, cache, "x86_64")
    (runtime / "python").write_bytes(elf(62))
    with pytest.raises(BundleError, match="found arm64-v8a, x86_64"):
        Bundle.from_runtime(runtime, cache)
    only_entry = tree(tmp_path / "only", {ENTRY: 'exec /data/local/tmp/python/bin/python3 "$@"\n'})
    with pytest.raises(BundleError, match="then say --abi"):
        Bundle.from_runtime(only_entry, cache)
    assert Bundle.from_runtime(only_entry, cache, "arm64-v8a").abi == "arm64-v8a"


@pytest.mark.parametrize(("target", "complaint"), [(".", "circle"), ("nowhere", "dead link")])
def test_a_link_that_cannot_be_followed_is_told(
    target: str, complaint: str, runtime: Path, tmp_path: Path
) -> None:
    (runtime / "lib/odd").symlink_to(target)
    with pytest.raises(BundleError, match=complaint):
        Bundle.from_runtime(runtime, tmp_path / "cache")
