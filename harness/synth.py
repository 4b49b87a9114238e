"""Checkpoints with no download: ordinary Hugging Face folders with deterministic random weights.

Random weights at the usual std of 0.02 make attention almost uniform, so that a cache that
drops, doubles or shifts a row barely shows in the logits. Here every scale is chosen by what
it does to the activations instead (see ``Scales``); tests/harness/test_synth.py holds that a
window, RoPE table or KV head map that is off by one moves the logits by > 100x the float32
tolerance, while rounding noise stays below it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from harness.errors import HarnessError
from harness.presets import PRESETS, Preset, tensors
from harness.synth_tokenizer import write_tokenizer

Progress = Callable[[int, int], None]
"""Called with bytes of weights written and bytes in all, from the thread that called ``synth``."""

WEIGHTS = "model.safetensors"
_CHUNK = 1 << 20  # elements drawn at once: 4 MiB of float32, so a worker stays near its core's cache
_WORKERS = min(4, os.cpu_count() or 1)
_DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


class SynthError(HarnessError):
    """An unknown preset, or a target folder that already holds something else."""


def synth(name: str, folder: Path, *, seed: int = 0, progress: Progress | None = None) -> Path:
    """Write the preset ``name`` into ``folder`` and return it.

    The folder appears whole or not at all. One that already holds this very preset and seed is
    left as it is. The bytes depend on the preset, the seed and numpy's generator alone, not on
    the number of threads. Peak memory is a few chunks of 4 MiB, whatever the model's size.

    Raises:
        SynthError: no such preset; or ``folder`` exists and holds something else.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise SynthError(f"sought preset {name!r}; there are {', '.join(PRESETS)}")
    folder = Path(folder)
    if _already_there(folder, preset, seed):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private to this user
        _write_json(partial / "config.json", preset.config)
        _write_json(partial / "generation_config.json", _generation_config(preset))
        write_tokenizer(partial, preset.config["vocab_size"])
        _write_weights(partial / WEIGHTS, preset, seed, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not _already_there(folder, preset, seed):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_weights(path: Path, preset: Preset, seed: int, progress: Progress | None) -> None:
    """The safetensors file, chunk by chunk.

    safetensors' own writers want every tensor in memory, so the header is written here:
    https://github.com/huggingface/safetensors#format
    """
    header, elements = _header(preset, seed)
    dtype = _DTYPES[preset.dtype][1]
    total = elements * dtype.itemsize
    with path.open("wb") as file, ThreadPoolExecutor(_WORKERS) as pool:
        file.write(header)
        file.truncate(len(header) + total)
        file.flush()
        waiting: deque[Future[int]] = deque()
        done = 0
        for chunk in _chunks(preset, seed, len(header), dtype.itemsize):
            waiting.append(pool.submit(_write_chunk, file.fileno(), chunk, dtype))
            if len(waiting) >= 4 * _WORKERS:
                done += waiting.popleft().result()
                if progress:
                    progress(done, total)
        for future in waiting:
            done += future.result()
            if progress:
                progress(done, total)


@dataclass(frozen=True)
class _Chunk:
    """Elements ``start``..``start + count`` of one tensor and where in the file they go."""

    seed: tuple[int, int, int]
    offset: int  # bytes
    count: int
    mean: float
    std: float


def _chunks(preset: Preset, seed: int, offset: int, itemsize: int) -> Iterator[_Chunk]:
    for index, tensor in enumerate(tensors(preset)):
        for start in range(0, tensor.size, _CHUNK):
            count = min(_CHUNK, tensor.size - start)
            yield _Chunk((seed, index, start // _CHUNK), offset, count, tensor.mean, tensor.std)
            offset += count * itemsize


def _write_chunk(descriptor: int, chunk: _Chunk, dtype: np.dtype[Any]) -> int:
    """Draw one chunk from its own stream and write it in place; returns bytes written."""
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(chunk.seed)))
    values = generator.standard_normal(chunk.count, dtype=np.float32)
    values *= np.float32(chunk.std)
    values += np.float32(chunk.mean)
    data = memoryview(values.astype(dtype, copy=False).tobytes())
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], chunk.offset + written)
    return written


def _header(preset: Preset, seed: int) -> tuple[bytes, int]:
    """The safetensors header with its length prefix, and the number of elements that follow."""
    code, dtype = _DTYPES[preset.dtype]
    entries: dict[str, Any] = {"__metadata__": _metadata(preset, seed)}
    elements = 0
    for tensor in tensors(preset):
        begin, elements = elements, elements + tensor.size
        offsets = [begin * dtype.itemsize, elements * dtype.itemsize]
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text, elements


def _metadata(preset: Preset, seed: int) -> dict[str, str]:
    # "format": transformers 4 refuses a file that does not say which framework it is for.
    return {"format": "pt", "kvfarm_synth": f"{preset.name} {preset.fingerprint} seed={seed}"}


def _already_there(folder: Path, preset: Preset, seed: int) -> bool:
    """Whether ``folder`` is this preset with this seed, by header, size and config.

    False if there is nothing; raises SynthError if there is anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    header, elements = _header(preset, seed)
    size = len(header) + elements * _DTYPES[preset.dtype][1].itemsize
    weights = folder / WEIGHTS
    try:
        with weights.open("rb") as file:
            same = file.read(len(header)) == header and weights.stat().st_size == size
        same = same and (folder / "tokenizer.json").is_file()
        if same and json.loads((folder / "config.json").read_text()) == preset.config:
            return True
    except (OSError, ValueError):
        pass  # a file is missing or is no JSON: something else
    raise SynthError(
        f"sought an empty or new folder, or {preset.name} with seed {seed}, at {folder}; "
        f"found something else; remove it or name another folder"
    )


def _generation_config(preset: Preset) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: preset.config[key] for key in keys} | {"do_sample": False}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
