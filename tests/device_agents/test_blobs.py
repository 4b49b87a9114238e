"""BlobStore: a blob is there whole and right, or it is not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from device_agents import blobs
from device_agents.blobs import BlobStore, parse_manifest
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, DeployFailed
from kvengine.artifact import Artifact, Blob, Manifest
from tests.device_agents.conftest import make_artifact, make_manifest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: BlobStore, data: bytes) -> Blob:
    store.write(sha256(data), 0, data)
    store.commit(sha256(data))
    return Blob("blob", sha256(data), len(data))


def link(store: BlobStore, at: float, **contents: bytes) -> Manifest:
    """An artifact of blobs, last used at Unix time ``at``."""
    manifest = make_manifest({f"{name}.bin": data for name, data in contents.items()})
    for data in contents.values():
        put(store, data)
    os.utime(store.link(manifest), (at, at))
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store")


def test_a_blob_arrives_in_chunks_and_counts_only_when_committed(store: BlobStore) -> None:
    data = b"abcdefgh"
    blob = Blob("blob", sha256(data), 8)
    assert store.write(blob.sha256, 0, b"abcd") == 4
    assert store.write(blob.sha256, 4, b"efgh") == 8
    assert not store.has(blob)
    assert store.commit(blob.sha256).read_bytes() == data
    assert store.has(blob)
    store.commit(blob.sha256)  # again: nothing to do


def test_a_chunk_may_be_sent_again_but_never_leave_a_hole(store: BlobStore) -> None:
    name = sha256(b"abcdef")
    store.write(name, 0, b"abcd")
    assert store.write(name, 2, b"cdef") == 6
    with pytest.raises(DeployFailed, match="a chunk at 9, but 6 bytes are here"):
        store.write(name, 9, b"x")
    with pytest.raises(DeployFailed, match="a chunk at -1"):
        store.write(name, -1, b"x")
    assert store.commit(name).read_bytes() == b"abcdef"


def test_offset_zero_starts_anew(store: BlobStore) -> None:
    name = sha256(b"new")
    store.write(name, 0, b"something longer")
    store.write(name, 0, b"new")
    assert store.commit(name).read_bytes() == b"new"


def test_what_has_another_sha256_is_thrown_away(store: BlobStore) -> None:
    name = sha256(b"right")
    store.write(name, 0, b"wrong")
    with pytest.raises(DeployFailed, match="found 5 bytes of"):
        store.commit(name)
    assert store.partial_size(name) == 0
    with pytest.raises(DeployFailed, match="nothing of it has arrived"):
        store.commit(name)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 60 + "/../"]
)
def test_only_a_sha256_names_a_blob(store: BlobStore, name: str) -> None:
    for call in (lambda: store.write(name, 0, b""), lambda: store.commit(name), lambda: store.path(name)):
        with pytest.raises(DeployFailed, match="64 hexadecimal digits"):
            call()


@pytest.mark.parametrize("damage", ["truncated", "altered", "longer"])
def test_a_damaged_blob_is_found_and_removed(store: BlobStore, damage: str) -> None:
    blob = put(store, b"a blob")
    path = store.path(blob.sha256)
    path.write_bytes({"truncated": b"a b", "altered": b"A blob", "longer": b"a blob."}[damage])
    assert not store.has(blob)
    assert not path.exists()


def test_a_store_from_an_earlier_run_is_checked_before_it_is_believed(store: BlobStore) -> None:
    blob = put(store, b"a blob")
    store.path(blob.sha256).write_bytes(b"A blob")
    assert not BlobStore(store.root).has(blob)


def test_missing_names_each_blob_once_with_what_is_there_of_it(store: BlobStore) -> None:
    contents = {"a.bin": b"aaaa", "b.bin": b"bbbbbb", "c.bin": b"bbbbbb", "d.bin": b"d"}
    put(store, b"d")
    store.write(sha256(b"bbbbbb"), 0, b"bb")
    found = {m.sha256: (m.size, m.present) for m in store.missing(make_manifest(contents))}
    assert found == {sha256(b"aaaa"): (4, 0), sha256(b"bbbbbb"): (6, 2)}


def test_link_lays_out_an_artifact_that_opens(store: BlobStore) -> None:
    manifest = link(store, 1, model=b"graph", weights=b"numbers")
    folder = store.root / "artifacts" / manifest.id
    assert Artifact.open(folder).manifest == manifest
    assert (folder / "model.bin").samefile(store.path(sha256(b"graph")))


def test_link_repairs_a_damaged_folder(store: BlobStore) -> None:
    manifest = link(store, 1, model=b"graph", weights=b"numbers")
    folder = store.root / "artifacts" / manifest.id
    (folder / "model.bin").unlink()
    (folder / "model.bin").write_bytes(b"other")
    (folder / "artifact.json").write_text("{")
    store.link(manifest)
    assert Artifact.open(folder).manifest == manifest


def test_link_follows_a_blob_that_was_replaced(store: BlobStore) -> None:
    """The folder's hard link still led to the damaged file."""
    manifest = link(store, 1, model=b"graph")
    store.path(sha256(b"graph")).write_bytes(b"grapH")
    assert [m.sha256 for m in store.missing(manifest)] == [sha256(b"graph")]
    put(store, b"graph")
    assert Artifact.open(store.link(manifest)).manifest == manifest


def test_link_without_all_blobs_is_refused(store: BlobStore) -> None:
    manifest = make_manifest({"a.bin": b"a"})
    with pytest.raises(DeployFailed, match=r"no blob a\.bin here"):
        store.link(manifest)
    assert not (store.root / "artifacts" / manifest.id).exists()


def test_add_file_goes_on_where_it_stopped(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abcdefgh")
    blob = Blob("blob", sha256(b"abcdefgh"), 8)
    store.write(blob.sha256, 0, b"abcde")
    assert store.add_file(blob, source, Deadline(10)) == 3
    assert store.has(blob)


def test_add_file_starts_anew_when_the_old_beginning_was_wrong(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abcdefgh")
    blob = Blob("blob", sha256(b"abcdefgh"), 8)
    store.write(blob.sha256, 0, b"XXXXX")
    assert store.add_file(blob, source, Deadline(10)) == 3 + 8
    assert store.has(blob)


def test_add_file_ends_at_its_deadline(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(DeadlineExceeded, match="copying blob"):
        store.add_file(Blob("blob", sha256(b"x"), 1), tmp_path / "source", Deadline(0))


def test_an_empty_blob_is_a_blob(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"")
    blob = Blob("blob", sha256(b""), 0)
    store.add_file(blob, tmp_path / "source", Deadline(10))
    assert store.has(blob)


def test_a_full_disk_is_refused_before_anything_is_written(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "FREE_RESERVE_BYTES", 1 << 60)
    with pytest.raises(DeployFailed, match="free; delete something there"):
        store.write(sha256(b"x"), 0, b"x")
    assert store.partial_size(sha256(b"x")) == 0


# -- eviction --------------------------------------------------------------------------------


def test_gc_evicts_the_longest_unused_artifact_first(store: BlobStore) -> None:
    old, new = link(store, 100, a=b"aaaa"), link(store, 200, b=b"bbbb")
    assert store.gc(5) == 4
    assert not (store.root / "artifacts" / old.id).exists()
    assert not store.path(sha256(b"aaaa")).exists()
    Artifact.open(store.root / "artifacts" / new.id)


def test_use_makes_an_artifact_young_again(store: BlobStore) -> None:
    old, new = link(store, 100, a=b"aaaa"), link(store, 200, b=b"bbbb")
    store.link(old)
    store.gc(5)
    assert [folder.name for folder in (store.root / "artifacts").iterdir()] == [old.id]
    assert not store.path(new.blobs[0].sha256).exists()


def test_gc_does_nothing_below_the_limit(store: BlobStore) -> None:
    manifest = link(store, 100, a=b"aaaa")
    assert store.gc(4) == 0
    Artifact.open(store.root / "artifacts" / manifest.id)


def test_gc_keeps_blobs_that_another_artifact_shares(store: BlobStore) -> None:
    link(store, 100, a=b"aaaa", shared=b"ssss")
    new = link(store, 200, b=b"bbbb", shared=b"ssss")
    assert store.gc(8) == 4
    Artifact.open(store.root / "artifacts" / new.id)


def test_gc_keeps_what_it_is_told_to(store: BlobStore) -> None:
    old = link(store, 100, a=b"aaaa")
    new = link(store, 200, b=b"bbbb")
    loose = put(store, b"cccc")
    assert store.gc(0, keep={old.id, loose.sha256}) == 4
    Artifact.open(store.root / "artifacts" / old.id)
    assert store.has(loose)
    assert not (store.root / "artifacts" / new.id).exists()


def test_gc_keeps_a_wanted_blob_of_an_unwanted_artifact(store: BlobStore) -> None:
    old = link(store, 100, a=b"aaaa")
    store.gc(0, keep={sha256(b"aaaa")})
    assert not (store.root / "artifacts" / old.id).exists()
    assert store.has(Blob("a", sha256(b"aaaa"), 4))


def test_gc_does_not_trip_over_what_vanishes_while_it_looks(store: BlobStore) -> None:
    """An upload that gets its name meanwhile; a link to nowhere is what is listed and cannot be looked at."""
    (store.root / "blobs" / f"{'a' * 64}.part").symlink_to("nowhere")
    assert store.gc(0) == 0


def test_gc_evicts_abandoned_uploads(store: BlobStore) -> None:
    store.write(sha256(b"abandoned"), 0, b"aban")
    assert store.gc(0) == 4
    assert store.partial_size(sha256(b"abandoned")) == 0


# -- manifests -------------------------------------------------------------------------------


def test_a_manifest_round_trips(tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path, {"a.bin": b"a"})
    assert parse_manifest(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "/a", "..", ".", ".hidden", "", "artifact.json", "a\0b", "a\n", "-rf"]
)
def test_a_blob_cannot_leave_its_folder(name: str) -> None:
    document = json.loads(make_manifest({"a.bin": b"a"}).to_json())
    document["blobs"][0]["name"] = name
    with pytest.raises(DeployFailed, match="sought a plain file name"):
        parse_manifest(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "other/1"}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(DeployFailed, match="no manifest"):
        parse_manifest(text)


def test_a_manifest_names_no_blob_twice_and_no_blob_is_negative() -> None:
    document = json.loads(make_manifest({"a.bin": b"a", "b.bin": b"b"}).to_json())
    document["blobs"][1]["name"] = "a.bin"
    with pytest.raises(DeployFailed, match="twice"):
        parse_manifest(json.dumps(document))
    document["blobs"][1] |= {"name": "b.bin", "size": -1}
    with pytest.raises(DeployFailed, match="-1 bytes"):
        parse_manifest(json.dumps(document))
