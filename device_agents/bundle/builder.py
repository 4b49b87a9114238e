"""``build``: from the lock to a whole bundle, each step done once and kept.

    cache/downloads/<sha256>   checked packages
    cache/compilers/<key>/     the lab host's own CPython that makes .pyc
    cache/bases/<key>/         a bundle without our modules; they change more often than the rest
    cache/bundles/<id>/        whole bundles; files are hard links to the base's
    cache/built/<key>          the id that the same lock and sources gave last time

Nothing is locked: each build works in a folder of its own and renames it into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import kvengine
from device_agents.bundle import debian, wheels
from device_agents.bundle.compiling import Unit, compile_all, host_abi
from device_agents.bundle.contents import (
    COMPILER_DEBS,
    LIBRARIES,
    digest_of,
    keeps_dynload,
    keeps_site,
    keeps_stdlib,
    own_sources,
)
from device_agents.bundle.launcher import run_sh
from device_agents.bundle.lock import PLATFORMS, PYTHON, Abi, Lock, Package, Packages, load_lock
from device_agents.bundle.model import ENTRY, MANIFEST, Bundle, seal
from device_agents.errors import BundleError
from device_agents.scratch import MAKING, owned_folder
from kvengine.artifact import sha256_of
from kvengine.codec import encode

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_UNUSED_S = 30 * 86_400  # what nobody asked for so long is thrown away
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_FOLDERS = ("downloads", "compilers", "bases", "bundles", "built")
_STDLIB_ZIP = f"lib/python{PYTHON.replace('.', '')}.zip"


def build(abi: Abi, cache: Path, progress: Progress | None = None, *, lock: Lock | None = None) -> Bundle:
    """The bundle for ``abi``, made in ``cache`` or found there (checked, about 0.2 s).

    Needs apt-get, dpkg-deb, pip and the network the first time; then nothing but ``cache``.
    lock: default lock.json beside this module.

    Raises:
        BundleError: a package that cannot be had or is not what the lock says; no such tool.
    """
    report = progress or (lambda stage, done, total: None)
    lock = lock or load_lock()
    cache = cache.absolute()
    base_key, marker = _base_key(abi, lock), _marker(abi, lock, cache)
    with contextlib.suppress(OSError, BundleError):
        return _used(Bundle.open(cache / "bundles" / marker.read_text()))
    with making(cache) as scratch:
        _tidy(cache)
        base = _base(abi, lock, base_key, cache, scratch, report)
        tree = scratch / "bundle"
        shutil.copytree(base.folder, tree, copy_function=os.link)
        (tree / MANIFEST).unlink()  # a link to the base's
        sources = own_sources()
        units = [Unit(path, tree / "code" / f"{name}c", name) for name, path in sources.items()]
        compile_all(_compiler(lock, cache, scratch, report), host_abi(), units)
        versions = {**lock.packages(abi).versions, "kvfarm": kvengine.__version__}
        made = seal(tree, abi, "kvfarm", versions, _executable(abi))
        bundle = place(made, cache / "bundles" / made.id)
        _write(marker, bundle.id, scratch)
    return bundle


def built(abi: Abi, cache: Path) -> Bundle | None:
    """What ``build`` would find in ``cache``, if it is there. Raises BundleError: no lock."""
    cache, lock = cache.absolute(), load_lock()
    with contextlib.suppress(OSError, BundleError):
        return Bundle.open(cache / "bundles" / _marker(abi, lock, cache).read_text(), verify=False)
    return None


def lacking_debs(abi: Abi, cache: Path) -> tuple[Package, ...]:
    """Debian packages that ``build`` would have to fetch first. Raises BundleError: no lock."""
    kept = cache.absolute() / "downloads"
    return tuple(deb for deb in load_lock().packages(abi).debs if not (kept / deb.sha256).is_file())


def _marker(abi: Abi, lock: Lock, cache: Path) -> Path:
    """The file that has the id of the bundle which this lock and these sources give."""
    return cache / "built" / _key(_base_key(abi, lock), digest_of(own_sources()))


def _base_key(abi: Abi, lock: Lock) -> str:
    return _key(lock.packages(abi), _compiler_debs(lock), digest_of(_builder_sources()))


@contextlib.contextmanager
def making(cache: Path) -> Iterator[Path]:
    """A folder to work in, gone afterwards, in a cache that has all its folders.

    Raises:
        BundleError: for every OSError inside: no space, no right to write.
    """
    try:
        for name in _FOLDERS:
            (cache / name).mkdir(parents=True, exist_ok=True)
        with owned_folder(MAKING, cache) as folder:
            yield Path(folder)
    except OSError as error:
        raise BundleError(f"cannot make the bundle in {cache}: {error}") from error


def place(made: Bundle, target: Path) -> Bundle:
    """Rename a finished bundle to ``target``; one that is there already and whole stays."""
    for _ in range(3):  # somebody else may place the same meanwhile
        with contextlib.suppress(BundleError):
            return _used(Bundle.open(target))
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):
            made.folder.rename(target)
    return Bundle.open(target)


def _executable(abi: Abi) -> tuple[str, ...]:
    return (ENTRY, "bin/python3", f"lib/{PLATFORMS[abi].loader}")


def _compiler_debs(lock: Lock) -> Packages:
    debs = lock.packages(host_abi()).debs
    return Packages(tuple(deb for deb in debs if deb.name in COMPILER_DEBS), ())


def _compiler(lock: Lock, cache: Path, scratch: Path, report: Progress) -> Path:
    """The unpacked Python that compiles; its folder appears by rename, hence whole."""
    packages = _compiler_debs(lock)
    target = cache / "compilers" / _key(packages)
    if not target.is_dir():
        files = _fetch(host_abi(), packages, cache, scratch, report)
        for package in packages.debs:
            debian.unpack(files[package.name], scratch / "compiler")
        with contextlib.suppress(OSError):  # another build was faster
            (scratch / "compiler").rename(target)
    os.utime(target)
    return target


def _base(abi: Abi, lock: Lock, key: str, cache: Path, scratch: Path, report: Progress) -> Bundle:
    target = cache / "bases" / key
    with contextlib.suppress(BundleError):
        return _used(Bundle.open(target))
    packages = lock.packages(abi)
    files = _fetch(abi, packages, cache, scratch, report)
    compiler = _compiler(lock, cache, scratch, report)
    debs, site, tree = scratch / "debs", scratch / "site", scratch / "base"
    for done, deb in enumerate(packages.debs):
        report("unpacking", done, len(files))
        debian.unpack(files[deb.name], debs)
    for done, wheel in enumerate(packages.wheels, len(packages.debs)):
        report("unpacking", done, len(files))
        _unzip(files[wheel.name], site)
    report("unpacking", len(files), len(files))
    _lay_out(abi, debs, site, tree, scratch / "stdlib", compiler, report)
    return place(seal(tree, abi, "kvfarm", packages.versions, _executable(abi)), target)


def _lay_out(
    abi: Abi, debs: Path, site: Path, tree: Path, stdlib: Path, compiler: Path, report: Progress
) -> None:
    """The bundle's folders, out of unpacked packages."""
    known, library = PLATFORMS[abi], debs / f"usr/lib/python{PYTHON}"
    _copy(debs / f"usr/bin/python{PYTHON}", tree / "bin/python3", debs)
    for name in (known.loader, *LIBRARIES):
        folders = (debs / "lib" / known.triplet, debs / "usr/lib" / known.triplet)
        _copy(
            next((f / name for f in folders if (f / name).exists()), folders[1] / name),
            tree / "lib" / name,
            debs,
        )
    for path in sorted((library / "lib-dynload").iterdir()):
        if keeps_dynload(path.name):
            _copy(path, tree / f"lib/python{PYTHON}/lib-dynload" / path.name, debs)
    names = {path: path.relative_to(library).as_posix() for path in _plain_files(library)}
    units = [Unit(path, stdlib / f"{name}c", name) for path, name in names.items() if keeps_stdlib(name)]
    for path in _plain_files(site):
        if not keeps_site(name := path.relative_to(site).as_posix()):
            continue
        if path.suffix == ".py":
            units.append(Unit(path, tree / "site" / f"{name}c", name))
        else:
            _copy(path, tree / "site" / name, site)
    compile_all(compiler, host_abi(), units, lambda done, total: report("compiling", done, total))
    _zip(stdlib, tree / _STDLIB_ZIP)
    (tree / ENTRY).write_text(run_sh(abi))


def _fetch(abi: Abi, packages: Packages, cache: Path, scratch: Path, report: Progress) -> dict[str, Path]:
    """Every package's file, by name; what is not in the cache is downloaded and checked.

    Raises:
        BundleError: see debian.download and wheels.download; a file of another sha256.
    """
    everything = (*packages.debs, *packages.wheels)
    kept = {package.name: cache / "downloads" / package.sha256 for package in everything}

    def lacking(some: tuple[Package, ...]) -> tuple[Package, ...]:
        return tuple(package for package in some if not _is(kept[package.name], package))

    def keep(some: tuple[Package, ...], arrived: Path) -> None:
        found = {sha256_of(path): path for path in arrived.iterdir() if path.is_file()}
        for package in some:
            if package.sha256 not in found:
                names = ", ".join(sorted(path.name for path in found.values()))
                raise BundleError(
                    f"{package.name} {package.version}: sought sha256 {package.sha256[:16]}…, the mirror "
                    f"gave another file ({names}); if it really changed there: kvfarm bundle --relock"
                )
            found[package.sha256].replace(kept[package.name])

    known = PLATFORMS[abi]
    if debs := lacking(packages.debs):
        report(f"fetching Debian packages for {abi}", 0, 1)
        folder = Path(tempfile.mkdtemp(dir=scratch))
        debian.download(known.debian, debs, folder, scratch)
        keep(debs, folder)
        report(f"fetching Debian packages for {abi}", 1, 1)
    if wanted := lacking(packages.wheels):
        report(f"fetching wheels for {abi}", 0, 1)
        folder = Path(tempfile.mkdtemp(dir=scratch))
        wheels.download(known.machine, wanted, folder)
        keep(wanted, folder)
        report(f"fetching wheels for {abi}", 1, 1)
    return kept


def _is(path: Path, package: Package) -> bool:
    return path.is_file() and path.stat().st_size == package.size and sha256_of(path) == package.sha256


def _unzip(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except (zipfile.BadZipFile, OSError) as error:
        raise BundleError(f"cannot unpack the wheel {wheel}: {error}") from error


def _zip(folder: Path, target: Path) -> None:
    """All files below ``folder``, stored, sorted, of one date."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in _plain_files(folder):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_TIME)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, path.read_bytes())


def _plain_files(folder: Path) -> list[Path]:
    """Sorted; without links, of which Debian's Python has one, into this machine's /etc."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _copy(source: Path, target: Path, root: Path) -> None:
    """Follows links that stay below ``root``. Raises BundleError for others and for what is not there."""
    real = source.resolve()
    if not real.is_file() or not real.is_relative_to(root.resolve()):
        raise BundleError(f"sought {source.relative_to(root)} in the unpacked packages, found none")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(real, target)


def _builder_sources() -> dict[str, Path]:
    folder = Path(__file__).parent
    return {path.name: path for path in folder.glob("*.py")}


def _key(*parts: Packages | str) -> str:
    return hashlib.sha256(json.dumps([encode(part) for part in parts]).encode()).hexdigest()


def _write(path: Path, text: str, scratch: Path) -> None:
    part = scratch / path.name
    part.write_text(text)
    part.replace(path)


def _used(bundle: Bundle) -> Bundle:
    """Its folder's time is when it was last wanted."""
    with contextlib.suppress(OSError):
        os.utime(bundle.folder)
    return bundle


def _tidy(cache: Path) -> None:
    """Throw away what was not used for a long time, and what killed builds left."""
    folders = [*(cache / "bundles").iterdir(), *(cache / "bases").iterdir(), *(cache / "compilers").iterdir()]
    for folder in [*folders, *cache.glob(".making-*")]:
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > (_UNUSED_S if folder in folders else 86_400):
                shutil.rmtree(folder, ignore_errors=True)
