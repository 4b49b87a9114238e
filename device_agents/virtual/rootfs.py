"""The file system of a virtual phone: Debian's adbd, mksh and toybox in Android's own places.

Made once and shared, read-only, by all phones of this machine. mksh and toybox are what Android itself
uses; adbd is AOSP's. Nothing of it lies where a bundle could find glibc by accident: adbd and toybox
run through a loader of their own, as an APEX of Android's has its own libraries.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.local import LocalTransport
from device_agents.scratch import MAKING, owned_folder
from device_agents.virtual.debian import unpack_packages
from device_agents.virtual.errors import VirtualPhoneUnavailable
from device_agents.virtual.layout import APEX, GROUPS, LIBRARIES, QEMU, SERVICES_SOCKET
from device_agents.virtual.profile import Abi

ANDROID_TOOLS = "android-platform-tools"  # the source package of adb and adbd
_NATIVE: dict[str, Abi] = {"x86_64": "x86_64", "aarch64": "arm64-v8a"}
_LOCK_POLL_S = 0.1

_TOYBOX = f"""#!/system/bin/sh
# The real toybox, through its own loader.
name=${{0##*/}}
[ "$name" = toybox ] || set -- "$name" "$@"
exec {LIBRARIES}/LOADER --library-path {LIBRARIES} --argv0 toybox {APEX}/bin/toybox "$@"
"""
_SERVICE_CLIENT = f"""#!/system/bin/sh
# Asks the phone's services, as Android's getprop and dumpsys ask by property area and binder.
nc="{LIBRARIES}/LOADER --library-path {LIBRARIES} --argv0 toybox {APEX}/bin/toybox nc"
{{
  print -n "$(( $# + 1 ))\\0"
  for word in "${{0##*/}}" "$@"; do print -nr -- "$word"; print -n '\\0'; done
}} | $nc -U /{SERVICES_SOCKET} | {{
  IFS=' ' read -r code stream || {{ print -ru2 -- "${{0##*/}}: no answer from the virtual phone"; exit 255; }}
  [ "$stream" = err ] && exec >&2
  toybox cat
  exit "$code"
}}
"""
# The kernel says x86_64 also when the phone is an arm64 one.
_UNAME_ARM = """#!/system/bin/sh
[ "$*" = -m ] && { print aarch64; exit; }
exec toybox uname "$@"
"""
_SERVICE_COMMANDS = ("getprop", "setprop", "settings", "dumpsys", "cmd", "svc")
_ETC = {
    "passwd": "root::0:0:::/system/bin/sh\nsystem::1000:1000:::/system/bin/sh\n"
    "shell::2000:2000::/:/system/bin/sh\n",
    "group": "root::0:\nsystem::1000:\nshell::2000:\n" + "".join(f"{k}::{v}:\n" for k, v in GROUPS.items()),
    "hosts": "127.0.0.1 localhost\n::1 ip6-localhost\n",
}


def default_cache() -> Path:
    """.kvfarm in the current folder, as for everything else that kvfarm keeps."""
    return Path(".kvfarm").resolve()


def native_abi() -> Abi:
    """Raises VirtualPhoneUnavailable on a machine that is neither x86_64 nor aarch64."""
    machine = platform.machine()
    if machine not in _NATIVE:
        raise VirtualPhoneUnavailable(f"virtual phones need an x86_64 or aarch64 machine; this is {machine}")
    return _NATIVE[machine]


def prepared(abi: Abi, cache: Path) -> Path | None:
    """What ``prepare`` gives, if it is in the cache. Raises VirtualPhoneUnavailable."""
    place = _place(abi, cache)
    return place if place.is_dir() else None


def packages(abi: Abi) -> tuple[str, ...]:
    """What a phone of ``abi`` is made of: names of Debian packages. Raises VirtualPhoneUnavailable."""
    emulated = abi != native_abi()
    return ("adbd", "mksh", "toybox", *(("qemu-user-static",) if emulated else ()))


def _place(abi: Abi, cache: Path) -> Path:
    """Raises VirtualPhoneUnavailable: this machine cannot run that ABI."""
    if abi != native_abi() and abi != "arm64-v8a":
        raise VirtualPhoneUnavailable(f"a virtual phone of ABI {abi} does not run on {platform.machine()}")
    texts = (_TOYBOX, _SERVICE_CLIENT, _UNAME_ARM, _SERVICE_COMMANDS, _ETC)
    recipe = repr((packages(abi), abi, texts))
    return cache / "virtual" / f"rootfs-{abi}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def prepare(abi: Abi, cache: Path, deadline: Deadline) -> Path:
    """The folder with ``system`` and ``apex`` for phones of ``abi``; made when the cache has none.

    The first time that takes packages from the machine's archive: 11 MB, and 63 MB more for qemu.

    Raises:
        VirtualPhoneUnavailable: this machine cannot get or run the parts. DeadlineExceeded.
    """
    emulated = abi != native_abi()
    done = _place(abi, cache)
    if done.is_dir():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(done.with_suffix(".lock"), deadline):
        if not done.is_dir():
            with owned_folder(MAKING, done.parent) as work:
                unpacked, root = Path(work) / "unpacked", Path(work) / "root"
                files = unpack_packages(packages(abi), ANDROID_TOOLS, unpacked, deadline)
                _build(unpacked, root, abi, emulated, deadline)
                (root / "packages").write_text("\n".join(files) + "\n")
                root.rename(done)
    return done


@contextmanager
def _exclusive(path: Path, deadline: Deadline) -> Iterator[None]:
    """One process at a time. Raises DeadlineExceeded."""
    pause = threading.Event()
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                deadline.check("another process makes the virtual phone's file system; waiting for it")
                pause.wait(_LOCK_POLL_S)
        yield


def _build(unpacked: Path, root: Path, abi: Abi, emulated: bool, deadline: Deadline) -> None:
    system, apex = root / "system" / "bin", root / APEX.lstrip("/")
    (apex / "bin").mkdir(parents=True)
    (apex / "lib64").mkdir()
    system.mkdir(parents=True)
    loader = _one(unpacked, "lib/*/ld-linux-*.so.*", "usr/lib/*/ld-linux-*.so.*")
    adbd = _one(unpacked, "usr/lib/android-sdk/platform-tools/adbd", "usr/sbin/adbd")
    toybox = _one(unpacked, "usr/bin/toybox", "bin/toybox")
    shell = _one(unpacked, "usr/lib/*-linux-musl/bin/mksh")
    shutil.copy2(loader, apex / "lib64" / loader.name)
    for program, name in ((adbd, "adbd"), (toybox, "toybox")):
        shutil.copy2(program, apex / "bin" / name)
        for library in _libraries(program, loader, unpacked, deadline):
            shutil.copy2(library, apex / "lib64" / library.name)
    shutil.copy2(shell, system / "sh")
    _script(system / "toybox", _TOYBOX.replace("LOADER", loader.name))
    for applet in _applets(toybox, loader, apex / "lib64", deadline):
        (system / applet).symlink_to("toybox")
    for command in _SERVICE_COMMANDS:
        (system / command).unlink(missing_ok=True)
        _script(system / command, _SERVICE_CLIENT.replace("LOADER", loader.name))
    etc = root / "system" / "etc"
    etc.mkdir()
    for name, text in _ETC.items():
        (etc / name).write_text(text)
    if emulated:
        (system / "uname").unlink()
        _script(system / "uname", _UNAME_ARM)
        qemu = root / QEMU.lstrip("/")
        qemu.parent.mkdir()
        shutil.copy2(_one(unpacked, "usr/bin/qemu-aarch64-static", "usr/bin/qemu-aarch64"), qemu)
    for path in (root, *root.rglob("*")):  # the shell user reads all of it, whatever our umask was
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))


def _one(unpacked: Path, *patterns: str) -> Path:
    """The first file that matches. Raises VirtualPhoneUnavailable, naming what was sought."""
    for pattern in patterns:
        for path in sorted(unpacked.glob(pattern)):
            if path.is_file():
                return path
    raise VirtualPhoneUnavailable(
        f"sought {' or '.join(patterns)} in the packages of this release, found neither; use another lab host"
    )


def _search_path(unpacked: Path) -> str:
    folders = {path.parent for top in ("lib", "usr/lib") for path in (unpacked / top).rglob("*.so.*")}
    return ":".join(sorted(map(str, folders)))


def _libraries(program: Path, loader: Path, unpacked: Path, deadline: Deadline) -> list[Path]:
    """What ``program`` loads, by the loader's own answer: lines of "name => path (address)"."""
    argv = [str(loader), "--library-path", _search_path(unpacked), "--list", str(program)]
    listed = LocalTransport().run(argv, deadline)
    words = [line.split() for line in listed.stdout.decode().splitlines()]
    found = [(line[0], Path(line[2])) for line in words if len(line) >= 3 and line[1] == "=>"]
    strangers = [name for name, path in found if not path.is_relative_to(unpacked)]
    if listed.returncode != 0 or strangers:
        raise VirtualPhoneUnavailable(
            f"{program.name} of this release lacks libraries: "
            f"{', '.join(strangers) or listed.stderr.decode(errors='replace').strip()}"
        )
    return [path.parent / name for name, path in found]


def _applets(toybox: Path, loader: Path, libraries: Path, deadline: Deadline) -> list[str]:
    argv = [str(loader), "--library-path", str(libraries), "--argv0", "toybox", str(toybox)]
    listed = LocalTransport().run(argv, deadline)
    names = listed.stdout.decode().split()
    if listed.returncode != 0 or "cat" not in names:
        raise VirtualPhoneUnavailable(
            f"toybox of this release does not run here: {listed.stderr.decode(errors='replace').strip()}"
        )
    return [name for name in names if name != "toybox"]


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
