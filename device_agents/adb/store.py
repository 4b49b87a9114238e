"""Blobs and folders on the device, content-addressed, as ``device_agents.blobs`` has them on a host.

    root/blobs/<sha256>           whole and checked; its time is _STAMP, so any later write shows
    root/incoming/<sha256>        still arriving or not yet checked
    root/artifacts/<id>/ ...      links to blobs, and .blobs, their sha256; a folder appears by rename
    root/bundles/<id>/ ...

The device's own sha256sum checks every blob. Everything happens in few, large shell commands, for
each costs 20 ms and more; lists travel by stdin, for adb limits a command to 64 KiB.
Scripts are for mksh and toybox, and run in any POSIX shell.
"""

from __future__ import annotations

import logging
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from device_agents.adb.locks import holding
from device_agents.adb.sync import SyncSession
from device_agents.adb.transport import AdbTransport
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeployFailed, NoSpace

ROOT = "/data/local/tmp/kvfarm"
# Left free, for a phone without any space left misbehaves in other ways than refusing us.
FREE_RESERVE_BYTES = 256 << 20
LIMIT_BYTES = 16 << 30
_ATTEMPTS = 3  # a blob that arrives with a wrong sha256 is sent again
# From this size on a blob is appended to what has arrived, so an interrupted push goes on where it
# stopped; smaller ones travel by sync, many over one connection, and start anew.
_RESUME_BYTES = 8 << 20
_PIECE = 1 << 16
_STAMP = 1_000_000_000  # Unix time, s
_STAMP_UTC = "200109090146.40"  # the same for `touch -t`, the only form that old Androids know
_FOLDER = re.compile(r"(artifacts|bundles)/[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)

# links: "ln" where hard links are allowed, else "ln -s" (SELinux lets `shell` make those), else "cp".
_STATE = """\
mkdir -p {root}/blobs {root}/incoming {root}/artifacts {root}/bundles && cd {root} || exit 1
if [ ! -s .links ]; then
  rm -f .probe .link; : > .probe
  if ln .probe .link 2>/dev/null; then how=ln
  elif ln -s "$PWD/.probe" .link 2>/dev/null; then how='ln -s'
  else how=cp; fi
  rm -f .probe .link; echo "$how" > .links
fi
echo "links $(cat .links)"
echo "free $(df -k . | tail -n 1)"
if [ -f {folder}/.blobs ]; then touch {folder}; echo laid; fi
find blobs incoming -type f -exec stat -c '%s %Y %n' {{}} +
"""
_CHECK = "cd {root}/incoming && xargs sha256sum"
_ADOPT = (
    'cd {root}/incoming && xargs sh -c \'chmod 755 "$@" && TZ=UTC touch -t {stamp} "$@" '
    '&& mv -f "$@" ../blobs/\' sh'
)
_LAY_OUT = """\
cd {root} || exit 1
new={folder}.$$.part; rm -rf {folder} {folder}.*.part; mkdir -p $new || exit 1
how=$(cat .links)
while read -r sha name; do
  if [ "$sha" = folder ]; then mkdir -p "$new/$name"
  else echo "$sha" >&3; $how "$PWD/blobs/$sha" "$new/$name"; fi || exit 1
done 3> $new/.blobs
mv $new {folder}
"""
_FORGET = "cd {root} && xargs rm -rf"
_USERS = """\
cd {root} || exit 1
for folder in artifacts/* bundles/*; do
  [ -f "$folder/.blobs" ] && echo "folder $(stat -c %Y "$folder") $folder" && cat "$folder/.blobs"
done
exit 0
"""


@dataclass(frozen=True)
class PhoneFile:
    """One file of a folder. name: its path there. source: on the lab host."""

    name: str
    sha256: str
    size: int  # bytes
    source: Path


@dataclass(frozen=True)
class _State:
    links: str
    free: int  # bytes
    laid: bool  # the folder asked about is there
    whole: dict[str, int]  # sha256 to bytes, of checked blobs
    altered: frozenset[str]  # blobs that somebody wrote to
    arriving: dict[str, int]  # sha256 to bytes so far


class PhoneStore:
    """The folder ``root`` on one device; calls take turns. bytes_moved: payload of all deploys so far."""

    def __init__(self, transport: AdbTransport, root: str = ROOT, limit_bytes: int = LIMIT_BYTES) -> None:
        self.root = root
        self.bytes_moved = 0
        self._transport = transport
        self._limit = limit_bytes
        self._bundles: set[str] = set()  # every runner of this device needs them
        self._turn = threading.Lock()

    def deploy(self, folder: str, files: Sequence[PhoneFile], deadline: Deadline) -> str:
        """Bring ``files`` to ``folder`` ("artifacts/ID" or "bundles/ID"); only blobs it lacks move.

        Returns its full path on the device. One that is there already costs one command.

        Raises:
            NoSpace: checked before anything moves. DeployFailed: a blob keeps arriving with a wrong
            sha256, a source cannot be read. DeviceUnreachable, DeadlineExceeded: late; the next deploy
            goes on from there. AdbFailure: the device refused a command.
        """
        _check_names(folder, files)
        with holding(self._turn, deadline, self._transport.serial):
            state = self._state(folder, deadline)
            if state.altered:
                state = self._forget_altered(state, folder, deadline)
            blobs = {file.sha256: file for file in files}
            lacking = [blob for blob in blobs.values() if state.whole.get(blob.sha256) != blob.size]
            if folder.startswith("bundles/"):
                self._bundles.add(folder)
            if lacking:
                self._make_room(state, lacking, {folder, *self._bundles}, set(blobs), deadline)
                self._bring(lacking, state.arriving, deadline)
            if lacking or not state.laid:
                self._lay_out(folder, files, deadline)
        return f"{self.root}/{folder}"

    def altered(self, files: Sequence[PhoneFile], deadline: Deadline) -> list[str]:
        """Names of those ``files`` whose blobs on the device are missing or not what they were; they are
        forgotten, so that the next deploy brings them again."""
        with holding(self._turn, deadline, self._transport.serial):
            script = f"cd {self._root}/blobs && xargs sha256sum; exit 0"
            found = _hashes(self._transport.checked(script, deadline, _lines(f.sha256 for f in files)))
            wrong = {file.sha256 for file in files if found.get(file.sha256) != file.sha256}
            if wrong:
                self._forget(wrong, deadline)
        return sorted(file.name for file in files if file.sha256 in wrong)

    # -- inside ---------------------------------------------------------------------------

    @property
    def _root(self) -> str:
        return shlex.quote(self.root)

    def _state(self, folder: str, deadline: Deadline) -> _State:
        text = self._transport.checked(_STATE.format(root=self._root, folder=shlex.quote(folder)), deadline)
        links, free, laid = "", -1, False
        whole: dict[str, int] = {}
        altered: set[str] = set()
        arriving: dict[str, int] = {}
        for line in text.splitlines():
            words = line.split()
            match words:
                case ["links", *how]:
                    links = " ".join(how)
                case ["free", *columns]:
                    free = free_bytes(columns)
                case ["laid"]:
                    laid = True
                case [size, time, path] if size.isdigit():
                    place, _, sha256 = path.partition("/")
                    if place == "incoming":
                        arriving[sha256] = int(size)
                    elif time == str(_STAMP):
                        whole[sha256] = int(size)
                    else:
                        altered.add(sha256)
        if links not in ("ln", "ln -s", "cp") or free < 0:
            raise AdbFailure(f"{self._transport.serial}: cannot make sense of {self.root}: {text[:300]!r}")
        return _State(links, free, laid, whole, frozenset(altered), arriving)

    def _forget_altered(self, state: _State, folder: str, deadline: Deadline) -> _State:
        names = ", ".join(sorted(sha256[:16] for sha256 in state.altered))
        _log.warning("%s: blobs %s were written to; they are sent again", self._transport.serial, names)
        self._forget(state.altered, deadline)
        return self._state(folder, deadline)

    def _forget(self, blobs: Iterable[str], deadline: Deadline) -> None:
        """Remove blobs, and every folder, for any may link to them; folders cost no transfer."""
        paths = [*(f"blobs/{sha256}" for sha256 in blobs), "artifacts", "bundles"]
        self._transport.checked(_FORGET.format(root=self._root), deadline, _lines(paths))

    def _make_room(
        self,
        state: _State,
        lacking: Sequence[PhoneFile],
        keep_folders: set[str],
        keep_blobs: set[str],
        deadline: Deadline,
    ) -> None:
        """Raises NoSpace unless ``lacking`` fits, after collecting what is unused the longest."""
        needed = sum(max(0, blob.size - state.arriving.get(blob.sha256, 0)) for blob in lacking)
        if state.links == "cp":
            needed *= 2
        excess = max(
            sum(state.whole.values()) + needed - self._limit, needed + FREE_RESERVE_BYTES - state.free
        )
        freed = self._collect(excess, state, keep_folders, keep_blobs, deadline) if excess > 0 else 0
        if state.free + freed < needed + FREE_RESERVE_BYTES:
            raise NoSpace(
                f"{self._transport.serial}: sought {needed:,} bytes plus {FREE_RESERVE_BYTES:,} in reserve, "
                f"found {state.free + freed:,} free at {self.root}; free some space on the device"
            )

    def _collect(
        self, excess: int, state: _State, keep_folders: set[str], keep_blobs: set[str], deadline: Deadline
    ) -> int:
        """Remove folders, longest unused first, and blobs that no folder uses; returns bytes freed."""
        users = self._users(deadline)
        removed: list[str] = [f"incoming/{sha256}" for sha256 in state.arriving.keys() - keep_blobs]
        freed = sum(state.arriving[path.partition("/")[2]] for path in removed)

        def unused() -> set[str]:
            return state.whole.keys() - keep_blobs - {sha for _, blobs in users.values() for sha in blobs}

        for folder in sorted(users.keys() - keep_folders, key=lambda name: users[name][0]):
            if freed + sum(state.whole[sha256] for sha256 in unused()) >= excess:
                break
            del users[folder]
            removed.append(folder)
        gone = unused()
        removed += [f"blobs/{sha256}" for sha256 in sorted(gone)]
        if removed:
            self._transport.checked(_FORGET.format(root=self._root), deadline, _lines(removed))
        return freed + sum(state.whole[sha256] for sha256 in gone)

    def _users(self, deadline: Deadline) -> dict[str, tuple[int, set[str]]]:
        """Each folder's time of last use and its blobs."""
        found: dict[str, tuple[int, set[str]]] = {}
        blobs: set[str] = set()
        for line in self._transport.checked(_USERS.format(root=self._root), deadline).splitlines():
            match line.split():
                case ["folder", time, name]:
                    blobs = set()
                    found[name] = (int(time), blobs)
                case [sha256]:
                    blobs.add(sha256)
        return found

    def _bring(self, lacking: Sequence[PhoneFile], arriving: dict[str, int], deadline: Deadline) -> None:
        """Push, check and adopt; blobs with a wrong sha256 again from their start."""
        for attempt in range(1, _ATTEMPTS + 1):
            self._push(lacking, arriving if attempt == 1 else {}, deadline)
            lacking = self._adopt(lacking, deadline)
            if not lacking:
                return
            names = ", ".join(blob.name for blob in lacking)
            _log.warning("%s: %s arrived with a wrong sha256", self._transport.serial, names)
        raise DeployFailed(
            f"{self._transport.serial}: {names}: sought sha256 {lacking[0].sha256[:16]}…, found another in "
            f"{_ATTEMPTS} pushes; is the file on the lab host whole? else suspect cable or storage"
        )

    def _push(self, blobs: Sequence[PhoneFile], arriving: dict[str, int], deadline: Deadline) -> None:
        small = [blob for blob in blobs if blob.size < _RESUME_BYTES]
        if small:
            with self._transport.open_sync(deadline) as connection:
                session = SyncSession(connection)
                for blob in small:
                    target = f"{self.root}/incoming/{blob.sha256}"
                    self.bytes_moved += session.send(blob.source, target, 0o644, deadline)
        for blob in blobs:
            if blob.size >= _RESUME_BYTES:
                start = arriving.get(blob.sha256, 0)
                self._append(blob, start if start <= blob.size else 0, deadline)

    def _append(self, blob: PhoneFile, start: int, deadline: Deadline) -> None:
        def count(size: int) -> None:
            self.bytes_moved += size

        redirect = ">>" if start else ">"
        script = f"exec cat {redirect} {self._root}/incoming/{shlex.quote(blob.sha256)}"
        result = self._transport.shell(script, deadline, _pieces(blob.source, start, count))
        if result.returncode == 0:
            return
        words = result.stderr.decode(errors="replace").strip()
        kind = NoSpace if "No space left" in words else DeployFailed
        full = ", its storage is full" if kind is NoSpace else ""
        raise kind(
            f"{self._transport.serial}: writing blob {blob.name} failed{full}\nits shell said: {words[-300:]}"
        )

    def _adopt(self, blobs: Sequence[PhoneFile], deadline: Deadline) -> list[PhoneFile]:
        """Give those whose sha256 is right their place; returns the others, which are removed."""
        names = [blob.sha256 for blob in blobs]
        text = self._transport.checked(_CHECK.format(root=self._root), deadline, _lines(names))
        found = _hashes(text)
        good = [sha256 for sha256 in names if found.get(sha256) == sha256]
        bad = [blob for blob in blobs if found.get(blob.sha256) != blob.sha256]
        if bad:
            paths = _lines(f"incoming/{blob.sha256}" for blob in bad)
            self._transport.checked(_FORGET.format(root=self._root), deadline, paths)
        if good:
            script = _ADOPT.format(root=self._root, stamp=_STAMP_UTC)
            self._transport.checked(script, deadline, _lines(good))
        return bad

    def _lay_out(self, folder: str, files: Sequence[PhoneFile], deadline: Deadline) -> None:
        parents = {str(parent) for file in files for parent in Path(file.name).parents} - {"."}
        lines = [
            *(f"folder {parent}" for parent in sorted(parents)),
            *(f"{f.sha256} {f.name}" for f in files),
        ]
        script = _LAY_OUT.format(root=self._root, folder=shlex.quote(folder))
        try:
            self._transport.checked(script, deadline, _lines(lines))
        except AdbFailure as error:
            if "No space left" in str(error):
                raise NoSpace(str(error)) from error
            raise


def _pieces(source: Path, start: int, count: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            file.seek(start)
            while piece := file.read(_PIECE):
                yield piece
                count(len(piece))
    except OSError as error:
        raise DeployFailed(f"cannot read {source}: {error}") from error


def _lines(lines: Iterable[str]) -> Iterator[bytes]:
    text = "".join(f"{line}\n" for line in lines).encode()
    return (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))


def _hashes(text: str) -> dict[str, str]:
    """File name to sha256, as sha256sum prints them."""
    pairs = (line.split(maxsplit=1) for line in text.splitlines())
    return {pair[1].lstrip("*"): pair[0] for pair in pairs if len(pair) == 2}


def free_bytes(columns: Sequence[str]) -> int:
    """From the last line of ``df -k``: device, size, used, available, used in percent, mount point.

    -1 for anything else.
    """
    try:
        percent = next(i for i, column in enumerate(columns) if column.endswith("%"))
        return int(columns[percent - 1]) * 1024
    except (StopIteration, ValueError, IndexError):
        return -1


def _check_names(folder: str, files: Sequence[PhoneFile]) -> None:
    if not _FOLDER.fullmatch(folder):
        raise DeployFailed(f"sought artifacts/ID or bundles/ID, found {folder[:80]!r}")
    for file in files:
        parts = file.name.split("/")
        # Spaces are fine inside: names travel one a line, and the shell's `read` takes off those around.
        if {"", ".", ".."} & set(parts) or not file.name.isprintable() or file.name != file.name.strip():
            raise DeployFailed(f"sought the path of a file within its folder, found {file.name[:80]!r}")
        if not _SHA256.fullmatch(file.sha256):
            raise DeployFailed(f"sought 64 hexadecimal digits of a sha256, found {file.sha256[:80]!r}")
