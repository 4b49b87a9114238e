"""Decode with a graph that somebody else exported, fed as its Contract says.

The same requests, refusals and results as ``kvengine.decoder``; no operator of ours is in the graph,
so greedy tokens are chosen here, from the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvengine.buffers import Buffer
from kvengine.contract import Contract, InputContract, LayerContract, Role
from kvengine.decoder import Decoder, Float32Array, Int64Array
from kvengine.errors import EngineFailure, InvalidRequest, NotSupported
from kvengine.model import Model

# For masked dead rows: far from any key or value, yet finite in float16, for NaN would spread through the mask.
_FINITE_POISON = 1e3
Device = tuple[str, int]


class ForeignDecoder(Decoder):
    """As Decoder, for a model with a Contract.

    ``slack`` means nothing here: how many rows a windowed layer has is the graph's own choice.

    Raises:
        InvalidRequest: a capacity or batch that the graph has no room for.
    """

    def __init__(self, model: Model, capacity: int, *, batch: int = 1, slack: int | None = None) -> None:
        # Not Decoder's own: that allocates what only graphs of ours take.
        contract = contract_of(model)
        most = min(model.spec.max_position, contract.rows or model.spec.max_position)
        if not 1 <= capacity <= most:
            raise InvalidRequest(f"sought a capacity of 1..{most} tokens (the model's), found {capacity}")
        if batch < 1 or (contract.batch is not None and batch != contract.batch):
            raise InvalidRequest(f"sought a batch of {contract.batch or '1 or more'}, found {batch}")
        self.model = model
        self.capacity = capacity
        self.batch = batch
        self.position = 0
        self.plan = model.plan
        self._failed = False
        self._contract = contract
        self._layers = tuple(_LAYERS[la.kind](la, capacity, batch, self._device) for la in contract.layers)
        self._max_step = min((la.max_step for la in contract.layers if la.max_step), default=capacity)
        self._newest_tokens = np.zeros(batch, np.int64)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache held now."""
        return sum(layer.nbytes for layer in self._layers)

    def prefill(
        self,
        tokens: Sequence[int] | Int64Array,
        *,
        chunk: int = 0,
        logits: Literal["all", "last"] = "last",
    ) -> Float32Array:
        """As Decoder.prefill.

        Raises:
            NotSupported: all rows are sought of a graph that returns the last row alone.
        """
        ids = self._checked(tokens)
        longest = min(chunk or ids.shape[1], ids.shape[1], self._max_step)
        if logits == "all" and longest > 1 and self._contract.logits_rows == "last":
            raise NotSupported(
                "this graph returns the logits of a step's last token only; ask for logits=last"
            )
        return super().prefill(ids, chunk=chunk, logits=logits)

    def start(self, tokens: Sequence[int] | Int64Array, *, chunk: int = 0) -> Int64Array:
        """As Decoder.start; the logits come to the host, where the greedy tokens are chosen."""
        self._newest_tokens = self.prefill(tokens, chunk=chunk).argmax(axis=1)
        return self.newest_token()

    def step(self) -> Int64Array:
        return self.start(self._newest_tokens[:, None])

    def newest_token(self) -> Int64Array:
        return self._newest_tokens.copy()

    def reset(self) -> None:
        self.position = 0
        self._failed = False
        for layer in self._layers:
            layer.reset()

    def poison(self) -> None:
        """Overwrite all dead rows: NaN where the writer never reads them, else a number far off."""
        for layer in self._layers:
            layer.poison(self.position)

    def _run(self, ids: Int64Array, rows: Int64Array, keep_token: bool = False) -> Float32Array:
        """``ids`` [batch, n] in as many steps as the cache needs; the logits of the flat ``rows``."""
        count, vocabulary = ids.shape[1], self.model.spec.vocab_size
        parts = [self._step(ids[:, at : at + self._max_step]) for at in range(0, count, self._max_step)]
        found = np.concatenate(parts, axis=1)
        if found.shape[1] != count:  # last rows alone, and nothing else is asked for
            found = found[:, -1:]
            rows = np.arange(len(rows), dtype=np.int64)
        return found.reshape(-1, vocabulary)[rows]

    def _step(self, ids: Int64Array) -> Float32Array:
        """One run over ``ids``; float32 logits [batch, n or 1, vocab]."""
        binding = self.model.session.io_binding()
        fed = {entry.name: self._input(entry, ids) for entry in self._contract.inputs}
        for name, buffer in fed.items():
            binding.bind_ortvalue_input(name, buffer.value)
        binding.bind_output(self._contract.logits, "cpu")
        for layer in self._layers:
            layer.bind(binding)
        try:
            self.model.session.run_with_iobinding(binding, self.model.run_options)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            self._failed = True
            raise EngineFailure(f"onnxruntime failed at position {self.position}: {error}") from error
        logits, *presents = binding.get_outputs()
        for layer, key, value in zip(self._layers, presents[::2], presents[1::2], strict=True):
            layer.collect(key, value)
        self.position += ids.shape[1]
        return self._logits(logits.numpy(), ids.shape[1])

    def _logits(self, found: npt.NDArray[Any], count: int) -> Float32Array:
        rows = count if self._contract.logits_rows == "all" else 1
        sought = (self.batch, rows, self.model.spec.vocab_size)
        if found.shape != sought:
            self._failed = True
            raise EngineFailure(
                f"sought logits {list(sought)}, found {list(found.shape)} from {self._contract.logits}; "
                "the contract or the checkpoint is not this graph's"
            )
        return found.astype(np.float32, copy=False)

    def _input(self, entry: InputContract, ids: Int64Array) -> Buffer:
        value = np.asarray(_ROLES[entry.role](self, ids, entry.rows or self.capacity))
        # Lengths come as [batch] or [batch, 1], and one that is the same for all rows as a scalar or [1] too.
        shape = value.shape + (1,) * (entry.rank - value.ndim) if entry.rank else ()
        array = (value if entry.rank else value.reshape(-1)[:1]).reshape(shape).astype(entry.dtype)
        buffer = Buffer(array.shape, array.dtype, *self._device)
        buffer.write(array)
        return buffer


def contract_of(model: Model) -> Contract:
    """Raises InvalidRequest for a model that kvfarm exported itself."""
    contract = model.artifact.manifest.contract
    if contract is None:
        raise InvalidRequest("this artifact is kvfarm's own and has no contract; open it with Decoder")
    return contract


_Make = Callable[[ForeignDecoder, Int64Array, int], Any]
# Of the decoder, the step's token ids [batch, new] and the rows of the cache concerned.
_ROLES: dict[Role, _Make] = {
    "input_ids": lambda d, ids, rows: ids,
    "attention_mask": lambda d, ids, rows: np.ones((d.batch, d.position + ids.shape[1])),
    "padded_mask": lambda d, ids, rows: np.tile(np.arange(rows) < d.position + ids.shape[1], (d.batch, 1)),
    "position_ids": lambda d, ids, rows: np.tile(_positions(d, ids), (d.batch, 1)),
    "cache_position": lambda d, ids, rows: _positions(d, ids),
    "write_indices": lambda d, ids, rows: np.full(d.batch, d.position),
    "past_length": lambda d, ids, rows: np.full(d.batch, d.position),
    "seqlens_k": lambda d, ids, rows: np.full(d.batch, d.position + ids.shape[1] - 1),
    "valid_lengths": lambda d, ids, rows: np.full(d.batch, min(d.position + ids.shape[1], rows)),
    "total_length": lambda d, ids, rows: np.array([d.position + ids.shape[1]]),
    "new_lengths": lambda d, ids, rows: np.full(d.batch, ids.shape[1]),
}


def _positions(decoder: ForeignDecoder, ids: Int64Array) -> Int64Array:
    return np.arange(decoder.position, decoder.position + ids.shape[1], dtype=np.int64)


class _Growing:
    """Past and present are two tensors; present is handed over as the next past, without a copy."""

    def __init__(self, layer: LayerContract, capacity: int, batch: int, device: Device) -> None:
        self._layer = layer
        self._batch = batch
        self._device = device
        self.rows = capacity
        self.reset()

    @property
    def nbytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for value in self._values)

    def reset(self) -> None:
        shape = self._layer.shape(self._batch, 0)
        self._values = [Buffer(shape, self._layer.dtype, *self._device).value for _ in "KV"]

    def bind(self, binding: ort.IOBinding) -> None:
        layer = self._layer
        for name, value in zip((layer.past_key, layer.past_value), self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in (layer.present_key, layer.present_value):
            binding.bind_output(name, *self._device)

    def collect(self, key: ort.OrtValue, value: ort.OrtValue) -> None:
        self._values = [key, value]

    def poison(self, total: int) -> None:
        """A growing cache has no dead rows."""


class _Static:
    """Buffers allocated once: present is bound onto past, or where the graph reads past elsewhere too, beside it."""

    def __init__(self, layer: LayerContract, capacity: int, batch: int, device: Device) -> None:
        self._layer = layer
        self.rows = layer.rows if layer.rows is not None else self._default_rows(capacity)
        shape = layer.shape(batch, self.rows)
        self._past = [Buffer(shape, layer.dtype, *device) for _ in "KV"]
        self._present = self._past if layer.shared else [Buffer(shape, layer.dtype, *device) for _ in "KV"]

    def _default_rows(self, capacity: int) -> int:
        # GroupQueryAttention refuses a windowed cache with fewer rows than the window.
        if self._layer.kind == "windowed":
            assert self._layer.window is not None
            return self._layer.window
        return capacity

    @property
    def nbytes(self) -> int:
        buffers = self._past if self._layer.shared else [*self._past, *self._present]
        return sum(buffer.nbytes for buffer in buffers)

    def reset(self) -> None:
        """Which rows are alive follows from the position alone."""

    def bind(self, binding: ort.IOBinding) -> None:
        layer = self._layer
        for name, buffer in zip((layer.past_key, layer.past_value), self._past, strict=True):
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in zip((layer.present_key, layer.present_value), self._present, strict=True):
            binding.bind_ortvalue_output(name, buffer.value)

    def collect(self, key: ort.OrtValue, value: ort.OrtValue) -> None:
        self._past, self._present = self._present, self._past

    def poison(self, total: int) -> None:
        layer = self._layer
        # A ring of R rows is full from R tokens on, and so is GroupQueryAttention's of exactly its window.
        dead = [slice(None)] * 4
        dead[layer.sequence_axis] = slice(min(total, self.rows), None)
        for buffer in self._past:
            contents = buffer.read()
            contents[tuple(dead)] = _poison(contents.dtype, layer.skips_dead_rows)
            buffer.write(contents)


_Layer = _Growing | _Static
_LAYERS: dict[str, type[_Growing] | type[_Static]] = {
    "growing": _Growing,
    "static": _Static,
    "windowed": _Static,
}


def _poison(dtype: np.dtype[Any], skips_dead_rows: bool) -> float | int:
    if dtype.kind != "f":
        return -128
    return float("nan") if skips_dead_rows else _FINITE_POISON
