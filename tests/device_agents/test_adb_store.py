"""PhoneStore: what the phone has is not sent again, what arrives is checked, what is not needed goes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from device_agents.adb import store as store_module
from device_agents.adb.store import PhoneFile, PhoneStore
from device_agents.adb.transport import AdbTransport
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeadlineExceeded, DeployFailed, InfrastructureError, NoSpace
from tests.device_agents.adb_fixtures import adb, add_command, commands, phone
from tests.device_agents.conftest import wait_for
from tests.device_agents.fake_adb import FakeAdb

__all__ = ["adb", "commands", "phone"]  # fixtures

CONTENTS = {"model.onnx": b"graph" * 10, "lib/a file.so": b"code" * 100, "empty": b""}
WEIGHT = sum(map(len, CONTENTS.values()))
ONE = f"artifacts/{'1' * 64}"
TWO = f"artifacts/{'2' * 64}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data local tmp" / "kvfarm"


@pytest.fixture
def phone_store(phone: AdbTransport, root: Path) -> PhoneStore:
    return PhoneStore(phone, str(root))


def sources(folder: Path, contents: dict[str, bytes]) -> list[PhoneFile]:
    files = []
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files.append(PhoneFile(name, hashlib.sha256(data).hexdigest(), len(data), path))
    return files


def found(folder: str | Path) -> dict[str, bytes]:
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".blobs"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def blob(root: Path, data: bytes) -> Path:
    return root / "blobs" / hashlib.sha256(data).hexdigest()


def test_a_folder_arrives_whole(phone_store: PhoneStore, root: Path, tmp_path: Path) -> None:
    remote = phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))
    assert remote == f"{root}/{ONE}"
    assert found(remote) == CONTENTS
    assert phone_store.bytes_moved == WEIGHT
    assert os.access(f"{remote}/lib/a file.so", os.X_OK)
    assert list((root / "incoming").iterdir()) == []


def test_a_second_deploy_moves_nothing_and_costs_one_command(
    adb: FakeAdb, phone: AdbTransport, root: Path, tmp_path: Path
) -> None:
    files = sources(tmp_path / "source", CONTENTS)
    PhoneStore(phone, str(root)).deploy(ONE, files, Deadline(20))
    adb.services.clear()
    again = PhoneStore(phone, str(root))  # as another run, which remembers nothing
    assert found(again.deploy(ONE, files, Deadline(20))) == CONTENTS
    assert again.bytes_moved == 0
    assert len(adb.services) == 1


def test_only_blobs_that_the_phone_lacks_move(phone_store: PhoneStore, tmp_path: Path) -> None:
    phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))
    phone_store.bytes_moved = 0
    other = {**CONTENTS, "model.onnx": b"another"}
    assert found(phone_store.deploy(TWO, sources(tmp_path / "other", other), Deadline(20))) == other
    assert phone_store.bytes_moved == len(b"another")


def test_the_same_content_under_two_names_moves_once(phone_store: PhoneStore, tmp_path: Path) -> None:
    twins = {"a": b"same", "b": b"same"}
    assert found(phone_store.deploy(ONE, sources(tmp_path / "source", twins), Deadline(20))) == twins
    assert phone_store.bytes_moved == 4


@pytest.mark.parametrize("refused", ["hard links", "all links"])
def test_without_hard_links_there_are_symbolic_ones_or_copies(
    phone_store: PhoneStore, commands: Path, root: Path, tmp_path: Path, refused: str
) -> None:
    # As SELinux does it: ln: cannot create hard link: Permission denied.
    condition = '[ "$1" = -s ] && exec /bin/ln "$@"' if refused == "hard links" else ":"
    add_command(commands, "ln", f"{condition}\necho 'ln: Permission denied' >&2; exit 1")
    remote = phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))
    assert found(remote) == CONTENTS
    assert Path(remote, "model.onnx").is_symlink() == (refused == "hard links")
    assert blob(root, CONTENTS["model.onnx"]).stat().st_nlink == 1


@pytest.mark.parametrize("damage", [b"Graph" * 10, b"graph", b""])
def test_a_blob_that_somebody_wrote_to_is_sent_again(
    phone_store: PhoneStore, root: Path, tmp_path: Path, damage: bytes
) -> None:
    files = sources(tmp_path / "source", CONTENTS)
    phone_store.deploy(ONE, files, Deadline(20))
    phone_store.bytes_moved = 0
    path = blob(root, CONTENTS["model.onnx"])
    path.chmod(0o755)
    path.write_bytes(damage)
    assert found(phone_store.deploy(ONE, files, Deadline(20))) == CONTENTS
    assert phone_store.bytes_moved == len(CONTENTS["model.onnx"])


def test_a_flipped_bit_on_the_way_is_sent_again(
    adb: FakeAdb, phone_store: PhoneStore, tmp_path: Path
) -> None:
    adb.flip = 1
    files = sources(tmp_path / "source", CONTENTS)
    assert found(phone_store.deploy(ONE, files, Deadline(20))) == CONTENTS
    assert phone_store.bytes_moved == WEIGHT + len(CONTENTS["model.onnx"])


def test_a_source_unlike_its_sha256_is_never_adopted(
    phone_store: PhoneStore, root: Path, tmp_path: Path
) -> None:
    files = sources(tmp_path / "source", CONTENTS)
    files[0].source.write_bytes(b"Graph" * 10)
    with pytest.raises(DeployFailed, match=r"model.onnx: sought sha256 .* in 3 pushes"):
        phone_store.deploy(ONE, files, Deadline(20))
    assert not blob(root, CONTENTS["model.onnx"]).exists()
    assert not (root / ONE).exists()
    assert list((root / "incoming").iterdir()) == []


def test_an_interrupted_push_goes_on_where_it_stopped(
    adb: FakeAdb, phone_store: PhoneStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_RESUME_BYTES", 1 << 20)
    contents = {"weights": os.urandom(8 << 20), "small": b"s"}
    files = sources(tmp_path / "source", contents)
    append = store_module._pieces

    def cable_pulled(source: Path, start: int, count: object) -> object:
        arriving = root / "incoming" / files[0].sha256
        for number, piece in enumerate(append(source, start, count)):  # type: ignore[arg-type]
            if number == 64:
                wait_for(lambda: arriving.exists() and arriving.stat().st_size > 1 << 20)
                adb.hang_up()
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_pieces", cable_pulled)
        with pytest.raises(InfrastructureError):
            phone_store.deploy(ONE, files, Deadline(20))
    phone_store.bytes_moved = 0
    assert found(phone_store.deploy(ONE, files, Deadline(20))) == contents
    assert 0 < phone_store.bytes_moved < (8 << 20) - (1 << 20)


def test_a_wrong_beginning_is_not_gone_on_with(
    phone_store: PhoneStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_RESUME_BYTES", 100)
    contents = {"weights": os.urandom(1000)}
    (root / "incoming").mkdir(parents=True)
    (root / "incoming" / hashlib.sha256(contents["weights"]).hexdigest()).write_bytes(bytes(300))
    files = sources(tmp_path / "source", contents)
    assert found(phone_store.deploy(ONE, files, Deadline(20))) == contents
    assert phone_store.bytes_moved == 700 + 1000


def test_space_is_checked_before_anything_moves(
    phone_store: PhoneStore, commands: Path, tmp_path: Path
) -> None:
    line = "/dev/block/dm-52   115249236 115000000 200000 100% /data"
    add_command(commands, "df", f"echo Filesystem; echo '{line}'")
    with pytest.raises(NoSpace, match=f"sought {WEIGHT} bytes plus .* found 204,800,000 free"):
        phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))
    assert phone_store.bytes_moved == 0


def test_a_full_phone_in_the_middle_of_a_push_says_so(
    adb: FakeAdb, phone_store: PhoneStore, tmp_path: Path
) -> None:
    adb.sync_failure = "write failed: No space left on device"
    with pytest.raises(NoSpace):
        phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))


def test_a_full_phone_in_the_middle_of_an_append_says_so(
    phone_store: PhoneStore, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_RESUME_BYTES", 1)
    # The state is asked with cat too; only a cat that writes a file fails.
    script = '[ $# -gt 0 ] && exec /bin/cat "$@"\nhead -c 10; echo "cat: No space left on device" >&2; exit 1'
    add_command(commands, "cat", script)
    with pytest.raises(NoSpace, match="writing blob"):
        phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))


def test_over_its_limit_the_longest_unused_goes(phone: AdbTransport, root: Path, tmp_path: Path) -> None:
    small = PhoneStore(phone, str(root), limit_bytes=2500)
    shared = b"s" * 100
    for number in (1, 2):
        contents = {"own": bytes([number]) * 1000, "shared": shared}
        small.deploy(f"artifacts/{str(number) * 64}", sources(tmp_path / str(number), contents), Deadline(20))
    for number, age in ((1, 100), (2, 200)):
        os.utime(root / f"artifacts/{str(number) * 64}", (age, age))
    three = {"own": bytes([3]) * 1000, "shared": shared}
    small.deploy(f"artifacts/{'3' * 64}", sources(tmp_path / "3", three), Deadline(20))
    assert {path.name[0] for path in (root / "artifacts").iterdir()} == {"2", "3"}
    assert not blob(root, bytes([1]) * 1000).exists()
    assert blob(root, shared).exists()


def test_use_makes_a_folder_young(phone: AdbTransport, root: Path, tmp_path: Path) -> None:
    small = PhoneStore(phone, str(root), limit_bytes=2500)
    files = {n: sources(tmp_path / str(n), {"own": bytes([n]) * 1000}) for n in (1, 2, 3)}
    for number in (1, 2):
        small.deploy(f"artifacts/{str(number) * 64}", files[number], Deadline(20))
        os.utime(root / f"artifacts/{str(number) * 64}", (number, number))
    small.deploy(f"artifacts/{'1' * 64}", files[1], Deadline(20))
    small.deploy(f"artifacts/{'3' * 64}", files[3], Deadline(20))
    assert {path.name[0] for path in (root / "artifacts").iterdir()} == {"1", "3"}


def test_what_is_about_to_be_used_is_not_collected(phone: AdbTransport, root: Path, tmp_path: Path) -> None:
    small = PhoneStore(phone, str(root), limit_bytes=2500)
    bundle = f"bundles/{'b' * 64}"
    small.deploy(bundle, sources(tmp_path / "bundle", {"python": b"p" * 900}), Deadline(20))
    shared = b"s" * 1000
    small.deploy(ONE, sources(tmp_path / "1", {"shared": shared, "own": b"1" * 500}), Deadline(20))
    for folder, age in ((bundle, 1), (ONE, 2)):
        os.utime(root / folder, (age, age))
    small.bytes_moved = 0
    two = {"shared": shared, "own": b"2" * 500}
    assert found(small.deploy(TWO, sources(tmp_path / "2", two), Deadline(20))) == two
    assert small.bytes_moved == 500
    assert (root / bundle).exists()
    assert not (root / ONE).exists()


def test_damage_is_found_by_hash_and_forgotten(phone_store: PhoneStore, root: Path, tmp_path: Path) -> None:
    files = sources(tmp_path / "source", CONTENTS)
    phone_store.deploy(ONE, files, Deadline(20))
    assert phone_store.altered(files, Deadline(20)) == []
    path = blob(root, CONTENTS["model.onnx"])
    stat = path.stat()
    path.chmod(0o755)
    path.write_bytes(b"Graph" * 10)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a worn-out flash does it
    assert phone_store.altered(files, Deadline(20)) == ["model.onnx"]
    assert found(phone_store.deploy(ONE, files, Deadline(20))) == CONTENTS


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../b", "a//b", "new\nline", " space", ""])
def test_a_name_that_leaves_its_folder_is_refused(
    adb: FakeAdb, phone_store: PhoneStore, tmp_path: Path, name: str
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    file = PhoneFile(name, hashlib.sha256(b"x").hexdigest(), 1, tmp_path / "source")
    with pytest.raises(DeployFailed, match="sought the path of a file"):
        phone_store.deploy(ONE, [file], Deadline(20))
    assert adb.services == []


def test_a_late_deploy_is_late(phone_store: PhoneStore, tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(0))


def test_a_phone_that_talks_nonsense_is_an_adb_failure(
    phone_store: PhoneStore, commands: Path, tmp_path: Path
) -> None:
    add_command(commands, "df", "echo Dateisystem Gesamt Benutzt")
    with pytest.raises(AdbFailure, match="cannot make sense"):
        phone_store.deploy(ONE, sources(tmp_path / "source", CONTENTS), Deadline(20))
