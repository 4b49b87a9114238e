"""An artifact: the exported graph, its weights and artifact.json, addressed by sha256."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from kvengine.codec import DecodeError, decode, encode
from kvengine.contract import Contract
from kvengine.errors import ArtifactError
from kvengine.plan import LayerPlan
from kvengine.recipe import ExportRecipe
from kvengine.sanity import check_manifest
from kvengine.spec import ModelSpec

MANIFEST = "artifact.json"
MODEL = "model.onnx"
_CHUNK = 1 << 22
_LARGEST_MANIFEST = 1 << 24  # bytes; real ones have some kilobytes


@dataclass(frozen=True)
class Blob:
    """One file of an artifact, named relative to its folder."""

    name: str
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Manifest:
    """artifact.json. ``checkpoint_sha256`` is over config.json and every safetensors file.

    plan: what each layer's cache is, as spec and recipe together say it.
    calibration: how int8/int4 cache scales were found (empty for float caches); the
    scales themselves are initializers of the graph.
    versions: of kvfarm, onnx and onnxruntime that exported it.
    contract: how to drive the graph, where somebody else exported it; None for kvfarm's own.
    extras: files of the artifact that no device needs: the tokenizer, the graph for onnxruntime-genai.
    """

    spec: ModelSpec
    recipe: ExportRecipe
    plan: tuple[LayerPlan, ...]
    blobs: tuple[Blob, ...]
    checkpoint: str  # the checkpoint folder's name
    checkpoint_sha256: str
    calibration: dict[str, str]
    versions: dict[str, str]
    contract: Contract | None = None
    extras: tuple[Blob, ...] = ()
    format: Literal["kvfarm-artifact/1"] = "kvfarm-artifact/1"

    def to_json(self) -> str:
        return self._json

    # Asked several times for each session that is opened.
    @cached_property
    def _json(self) -> str:
        return json.dumps(encode(self), indent=1, sort_keys=True) + "\n"

    @cached_property
    def id(self) -> str:
        """sha256 of the manifest, which holds the sha256 of everything else."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An artifact on this disk."""

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    def extra(self, name: str) -> Path | None:
        """The path of an extra, checked now; None if the artifact has no such file.

        Raises:
            ArtifactError: it is missing, truncated or altered. (A device has no extras.)
        """
        blob = next((blob for blob in self.manifest.extras if blob.name == name), None)
        if blob is None:
            return None
        _check(self.folder / name, blob, verify=True)
        return self.folder / name

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> Artifact:
        """Read ``folder``/artifact.json and check every blob.

        verify: compare sha256 (about 1 s per GB) and not just presence and size.

        Raises:
            ArtifactError: no or unreadable manifest, or one that makes no sense; a missing, truncated or
                altered blob.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            if path.stat().st_size > _LARGEST_MANIFEST:
                raise ArtifactError(f"{path}: sought at most {_LARGEST_MANIFEST:,} bytes, found more")
            manifest = decode(Manifest, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ArtifactError(
                f"sought {MANIFEST} in {folder}, found none; export one with "
                f"`kvfarm export CHECKPOINT -o {folder}`"
            ) from None
        except (DecodeError, ValueError, OSError, RecursionError) as error:
            raise ArtifactError(f"{path} is not a manifest of format kvfarm-artifact/1: {error}") from error
        check_manifest(manifest)
        for blob in manifest.blobs:
            _check(folder / blob.name, blob, verify)
        return cls(folder, manifest)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _check(path: Path, blob: Blob, verify: bool) -> None:
    if not path.is_file():
        raise ArtifactError(f"sought blob {blob.name} at {path}, found none; export or deploy again")
    size = path.stat().st_size
    if size != blob.size:
        raise ArtifactError(
            f"blob {blob.name}: sought {blob.size:,} bytes, found {size:,} "
            f"({'truncated' if size < blob.size else 'too long'}); export or deploy again"
        )
    if verify and (found := sha256_of(path)) != blob.sha256:
        raise ArtifactError(
            f"blob {blob.name} was altered: sought sha256 {blob.sha256[:16]}…, "
            f"found {found[:16]}…; export or deploy again"
        )
