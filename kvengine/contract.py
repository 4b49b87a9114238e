"""What a decoder graph that kvfarm did not export wants to be fed, and where it keeps its KV cache.

Inferred on the build machine (``kvengine.export.foreign``), carried in artifact.json, obeyed by
``kvengine.foreign`` on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnxruntime as ort

from kvengine.errors import ArtifactError
from kvengine.plan import CacheDtype
from kvengine.spec import ModelSpec

_MOST = 1 << 24  # of any size

# Axes of a cache tensor: b batch, n KV heads, s sequence, h head_dim.
Layout = Literal["bnsh", "bsnh", "bnhs"]
LayerKind = Literal["growing", "static", "windowed"]
CacheElement = CacheDtype
InputElement = Literal["int64", "int32", "bool", "float32", "float16"]

Role = Literal[
    "input_ids",  # [batch, new] token ids
    "attention_mask",  # [batch, total] ones
    "padded_mask",  # [batch, rows of the cache] ones for the tokens there are, then zeros
    "position_ids",  # [batch, new] absolute positions
    "cache_position",  # [new] absolute positions
    "write_indices",  # [batch] position of the first new token
    "past_length",  # position of the first new token: a scalar, [1] or [batch]
    "seqlens_k",  # [batch] or [batch, 1]: total - 1, as GroupQueryAttention counts
    "valid_lengths",  # [batch] rows that hold tokens once the new ones are written
    "total_length",  # a scalar or [1]: total
    "new_lengths",  # [batch] new tokens
]


@dataclass(frozen=True)
class InputContract:
    """One input that is not cache.

    rank: its number of axes. rows: of the cache that a mask is padded to or valid lengths are
        counted in; None where that is the whole context.
    """

    name: str
    role: Role
    dtype: InputElement
    rank: int
    rows: int | None = None


@dataclass(frozen=True)
class LayerContract:
    """One layer's cache.

    kind: ``growing`` (present is past and the new tokens, longer each step), ``static`` (one
        buffer, new tokens at their positions) or ``windowed`` (one buffer of fewer rows than the
        context; the oldest tokens are overwritten).
    writer: the operator that puts new tokens in.
    rows: of the buffer, where the graph fixes them; None where whoever allocates decides.
    window: tokens a query sees, itself included; None where the graph does not say (decomposed
        attention has it in mask arithmetic) or there is none.
    shared: present may be bound onto past (the writer alone reads past).
    skips_dead_rows: rows without tokens are never read; else they are read and masked, where NaN
        would spread (0 * NaN), which real stale rows do not.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    layout: Layout
    kv_heads: int
    head_dim: int
    dtype: CacheElement
    kind: LayerKind
    writer: str
    rows: int | None = None
    window: int | None = None
    shared: bool = False
    skips_dead_rows: bool = False

    @property
    def max_step(self) -> int | None:
        """Tokens one step may append, None for any number.

        A ring of R rows and a window of W: the first of n new tokens still sees W - 1 older ones,
        and the last must not have overwritten them, so n <= R - W + 1 (the floor that ExecuTorch's
        ring misses, catalogue 45). GroupQueryAttention moves its window itself.
        """
        if self.kind != "windowed" or self.writer != "TensorScatter":
            return None
        return (self.rows or 0) - (self.window or 0) + 1

    def shape(self, batch: int, rows: int) -> tuple[int, ...]:
        """Of past and present with ``rows`` rows, as stored: two int4 elements are one byte."""
        width = self.head_dim // 2 if self.dtype == "int4" else self.head_dim
        sizes = {"b": batch, "n": self.kv_heads, "s": rows, "h": width}
        return tuple(sizes[axis] for axis in self.layout)

    @property
    def sequence_axis(self) -> int:
        return self.layout.index("s")


@dataclass(frozen=True)
class Contract:
    """Everything a driver must know about one graph.

    logits_rows: ``all``: float [batch, new, vocab]; ``last``: [batch, 1, vocab].
    batch: where the graph fixes it. notes: how what was inferred was inferred, for people.
    """

    convention: str
    inputs: tuple[InputContract, ...]
    layers: tuple[LayerContract, ...]
    logits: str
    logits_rows: Literal["all", "last"]
    vocab_size: int | None = None
    batch: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int | None:
        """The most tokens a sequence can have, where a static layer fixes it."""
        return min((la.rows for la in self.layers if la.kind == "static" and la.rows), default=None)

    @property
    def kind(self) -> Literal["growing", "static", "hybrid"]:
        """The cache plan kind that this is nearest to."""
        kinds = {layer.kind for layer in self.layers}
        if "windowed" in kinds:
            return "hybrid"
        return "static" if "static" in kinds else "growing"

    def laid_out(self, spec: ModelSpec) -> ModelSpec:
        """``spec`` with the windows that the graph's cache really has, right or wrong.

        Where the checkpoint's config.json says another window the answers are wrong, and the suite is to
        find that; which rows hold which positions follows from the graph alone.
        """
        if self.kind != "hybrid":
            return spec
        windows = (layer.window if layer.kind == "windowed" else None for layer in self.layers)
        pairs = zip(spec.layers, windows, strict=True)
        return dataclasses.replace(
            spec, layers=tuple(dataclasses.replace(layer, window=window) for layer, window in pairs)
        )


def wrong_in_contract(contract: Contract, layers: int) -> Iterator[str]:
    """What no contract says; anybody may have edited the artifact.json it is read from."""
    if len(contract.layers) != layers:
        yield f"sought a contract for {layers} layers, found one for {len(contract.layers)}"
    names = [contract.logits, *(entry.name for entry in contract.inputs)]
    for number, layer in enumerate(contract.layers):
        names += [layer.past_key, layer.past_value, layer.present_key, layer.present_value]
        sizes = (layer.kv_heads, layer.head_dim, layer.rows or 1, layer.window or 1)
        if not all(1 <= size <= _MOST for size in sizes):
            yield f"contract of layer {number}: sought sizes in 1..{_MOST}, found another"
        if layer.kind == "windowed" and layer.window is None:
            yield f"contract of layer {number}: sought the window of a windowed cache, found none"
        if layer.max_step is not None and layer.max_step < 1:
            yield f"contract of layer {number}: sought a ring of at least its window's rows, found fewer"
    if len(set(names)) != len(names):
        yield "sought a name of its own for every input and output of the contract"
    if not any(entry.role == "input_ids" for entry in contract.inputs):
        yield "sought an input of token ids in the contract"
    if any(not 0 <= entry.rank <= 2 for entry in contract.inputs):
        yield "sought inputs of at most two axes in the contract"


def check_names(contract: Contract, session: ort.InferenceSession) -> None:
    """Raise ArtifactError unless the contract's names are those of the graph."""
    pasts = {name for layer in contract.layers for name in (layer.past_key, layer.past_value)}
    presents = {name for layer in contract.layers for name in (layer.present_key, layer.present_value)}
    fed = pasts | {entry.name for entry in contract.inputs}
    inputs = {value.name for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    if wrong := sorted((fed ^ inputs) | ((presents | {contract.logits}) - outputs)):
        raise ArtifactError(
            f"the graph is not what its contract says: {wrong[:4]}; inspect and adopt it again"
        )
