"""A damaged artifact is refused with the blob's name, before onnxruntime sees it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvengine.artifact import Artifact
from kvengine.errors import ArtifactError
from kvengine.recipe import ExportRecipe
from tests.conftest import ExportTiny


@pytest.fixture
def copy(export_tiny: ExportTiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export_tiny(ExportRecipe()).folder, tmp_path / "artifact"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (Path.unlink, "found none"),
    (truncate, "truncated"),
    (flip_one_bit, "was altered"),
]


def test_a_whole_artifact_opens(copy: Path, export_tiny: ExportTiny) -> None:
    assert Artifact.open(copy).id == export_tiny(ExportRecipe()).id


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_blob_is_named(copy: Path, damage: Callable[[Path], None], words: str) -> None:
    for blob in Artifact.open(copy).manifest.blobs:
        whole = (copy / blob.name).read_bytes()
        damage(copy / blob.name)
        with pytest.raises(ArtifactError, match=rf"{blob.name}.*{words}|{words}.*{blob.name}"):
            Artifact.open(copy)
        (copy / blob.name).write_bytes(whole)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "kvfarm-artifact/9"}', "\x00"])
def test_an_unreadable_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "artifact.json").write_text(text)
    with pytest.raises(ArtifactError, match="kvfarm-artifact/1"):
        Artifact.open(copy)


def test_a_folder_without_artifact_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="kvfarm export"):
        Artifact.open(tmp_path)
