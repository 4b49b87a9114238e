"""Checkpoints with no download: ordinary Hugging Face folders with deterministic random weights.

Random weights at the usual std of 0.02 make attention almost uniform, so that a cache that
drops, doubles or shifts a row barely shows in the logits. Here every scale is chosen by what
it does to the activations instead (see ``Scales``); tests/harness/test_synth.py holds that a
window, RoPE table or KV head map that is off by one moves the logits by > 100x the float32
tolerance, while rounding noise stays below it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from harness.errors import HarnessError

Progress = Callable[[int, int], None]
"""Called with bytes of weights written and bytes in all, from the thread that called ``synth``."""

WEIGHTS = "model.safetensors"
_CHUNK = 1 << 20  # elements drawn at once: 4 MiB of float32, so a worker stays near its core's cache
_WORKERS = min(4, os.cpu_count() or 1)
_DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


class SynthError(HarnessError):
    """An unknown preset, or a target folder that already holds something else."""


@dataclass(frozen=True)
class Scales:
    """How large activations are; weights follow from these and the geometry.

    Projections have std 1/sqrt(fan_in), so they keep the RMS of what they are given. Gemma 3
    normalises before and after attention and MLP, so the norms' gains decide everything else.
    Norm weights are stored as gain - 1 (Gemma 3 multiplies by 1 + weight).
    """

    embedding: float  # RMS of the residual stream at layer 0, after Gemma's sqrt(hidden_size)
    attention: float  # std over keys of the scaled attention scores: 0 is uniform, > 2 is peaked
    attention_residual: float  # RMS that each attention adds to the residual stream
    mlp_residual: float  # RMS that each MLP adds to it
    logits: float  # std of the logits over the vocabulary
    norm_spread: float  # std of a norm's gain over its channels, relative to the gain


@dataclass(frozen=True)
class Preset:
    """A Gemma 3 text geometry (``config.json``) and how its weights are scaled."""

    name: str
    config: dict[str, Any]
    scales: Scales
    dtype: Literal["float32", "bfloat16"]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the weights or the config, except the seed."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tensor:
    """One tensor to draw: normal with this mean and std."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _layer_types(layers: int, period: int) -> list[str]:
    """Local first: every ``period``-th layer is global."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


_GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

# The transformers 5 spelling of RoPE. query_pre_attn_scalar differs from head_dim, as in Gemma 3 27B,
# so that an exporter that scales by head_dim is caught; the vocabulary is no multiple of 32.
_TINY = Preset(
    name="tiny-gemma3",
    config=_GEMMA3
    | {
        "dtype": "float32",
        "vocab_size": 331,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "max_position_embeddings": 1024,
        "sliding_window": 5,
        "layer_types": _layer_types(6, 3),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    scales=Scales(
        embedding=0.15, attention=3.0, attention_residual=1.0, mlp_residual=1.0, logits=1.0, norm_spread=0.2
    ),
    dtype="float32",
)

# The transformers 4 spelling of RoPE and layer types, as google/gemma-3-1b-it has it.
_GEMMA3_1B = Preset(
    name="gemma-3-1b",
    config=_GEMMA3
    | {
        "torch_dtype": "bfloat16",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
    },
    scales=Scales(
        embedding=0.15, attention=2.0, attention_residual=1.0, mlp_residual=1.0, logits=1.0, norm_spread=0.2
    ),
    dtype="bfloat16",
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_TINY, _GEMMA3_1B)}


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
        _write_weights(partial / WEIGHTS, preset, seed, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not _already_there(folder, preset, seed):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def tensors(preset: Preset) -> Iterator[Tensor]:
    """Every tensor of the checkpoint under its Hugging Face name, in file order."""
    c, s = preset.config, preset.scales
    hidden, ffn, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q_size, kv_size = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    # Normalised q and k of RMS g give q.k of std g^2 sqrt(head_dim), then scaled by scalar^-0.5.
    qk_gain = math.sqrt(s.attention * math.sqrt(c["query_pre_attn_scalar"] / head_dim))

    def norm(name: str, size: int, gain: float) -> Tensor:
        return Tensor(f"{name}.weight", (size,), gain - 1.0, s.norm_spread * gain)

    def linear(name: str, rows: int, columns: int) -> Tensor:
        return Tensor(f"{name}.weight", (rows, columns), 0.0, columns**-0.5)

    yield Tensor("model.embed_tokens.weight", (c["vocab_size"], hidden), 0.0, s.embedding * hidden**-0.5)
    for index in range(c["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield norm(f"{layer}.input_layernorm", hidden, 1.0)
        yield linear(f"{layer}.self_attn.q_proj", q_size, hidden)
        yield linear(f"{layer}.self_attn.k_proj", kv_size, hidden)
        yield linear(f"{layer}.self_attn.v_proj", kv_size, hidden)
        yield norm(f"{layer}.self_attn.q_norm", head_dim, qk_gain)
        yield norm(f"{layer}.self_attn.k_norm", head_dim, qk_gain)
        yield linear(f"{layer}.self_attn.o_proj", hidden, q_size)
        yield norm(f"{layer}.post_attention_layernorm", hidden, s.attention_residual)
        yield norm(f"{layer}.pre_feedforward_layernorm", hidden, 1.0)
        yield linear(f"{layer}.mlp.gate_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.up_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.down_proj", hidden, ffn)
        yield norm(f"{layer}.post_feedforward_layernorm", hidden, s.mlp_residual)
    yield norm("model.norm", hidden, s.logits / s.embedding)


def parameter_count(preset: Preset) -> int:
    """Weights in the checkpoint; the tied head is stored, and counted, once."""
    return sum(tensor.size for tensor in tensors(preset))


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
