"""Decode with a graph that somebody else exported, fed as its Contract says.

The same requests, refusals and results as ``kvengine.decoder``; no operator of ours is in the graph,
so greedy tokens are chosen here, from the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvengine import editing
from kvengine.buffers import Buffer
from kvengine.contract import Contract, InputContract, Role
from kvengine.decoder import Decoder, Float32Array, Int64Array, RowTokens
from kvengine.errors import EngineFailure, InvalidRequest, NotSupported, failure_of
from kvengine.foreign_cache import ForeignCache
from kvengine.model import Model
from kvengine.program import CacheRows
from kvengine.rows import Rows
from kvengine.steps import Step, equal_steps


class ForeignDecoder(Decoder):
    """As Decoder, for a model with a Contract.

    Rows of a batch are always of the same length: no contract says how a row would be padded.
    A ring has the rows its graph says; less ``slack`` than that only means that less is counted on.

    Raises:
        InvalidRequest: a capacity, batch or slack that the graph has no room for.
    """

    def __init__(self, model: Model, capacity: int, *, batch: int = 1, slack: int | None = None) -> None:
        # Not Decoder's own: that allocates what only graphs of ours take.
        contract = contract_of(model)
        most = min(model.spec.max_position, contract.rows or model.spec.max_position)
        if not 1 <= capacity <= most:
            raise InvalidRequest(f"sought a capacity of 1..{most} tokens (the model's), found {capacity}")
        if batch < 1 or (contract.batch is not None and batch != contract.batch):
            raise InvalidRequest(f"sought a batch of {contract.batch or '1 or more'}, found {batch}")
        if slack is not None and slack < 0:
            raise InvalidRequest(f"sought slack >= 0, found {slack}")
        ring = any(layer.max_step is not None for layer in contract.layers)
        if ring and slack is not None and slack > model.plan.slack:
            raise InvalidRequest(f"sought a slack of at most {model.plan.slack}, the ring's, found {slack}")
        self.model = model
        self.capacity = capacity
        self.batch = batch
        self.plan = model.plan if slack is None else dataclasses.replace(model.plan, slack=slack)
        self.rows = Rows(len(contract.layers), batch, capacity)
        self._failed = False
        self._contract = contract
        self.cache = cache = ForeignCache(contract, self.plan.slack, capacity, batch, model.recipe)
        self._rings = cache.rings
        self._max_step = min((la.max_step for la in contract.layers if la.max_step), default=capacity)
        self.newest_buffers = [Buffer((batch, 1), np.int64)]
        self._newest = 0

    def step(self, rows: Sequence[bool] | None = None) -> Int64Array:
        """As Decoder.step. Raises NotSupported unless all rows take part."""
        if rows is not None and not all(rows):
            raise _ragged()
        self._check_room(1)
        self._run(self.newest_buffers[0].read().copy(), np.arange(self.batch), keep_token=True)
        return self.newest_token()

    def rewind(self, count: int, row: int = 0) -> None:
        """As Decoder.rewind, and to the same limit.

        A ring of R rows holds more than the plan counts on: positions from T - R on. Its slots need no
        moving: a stale one is taken for a position R older than the newest it could be, which is outside
        the window of every query to come, as the limit keeps what is dropped to R - W + 1 tokens.
        """
        if not self._rings:
            super().rewind(count, row)
            return
        self._check_alive()
        held, floors = self.rows.held[self._row(row)], self.rows.floors
        editing.check_rewind(self, count, row)
        if held == count:
            self.rows.clear(row)
        elif count:
            for index in self._rings:
                floors[index, row] = max(int(floors[index, row]), self._oldest(index, held))
            self.rows.rewind(row, held - count)
        self.cache.trim(self.rows.longest)

    def compact(self, keep: int, sinks: int = 0, row: int = 0) -> None:
        """As Decoder.compact. Raises NotSupported for a ring, whose slots are tied to positions."""
        if self._rings:
            raise NotSupported("compact moves tokens to other positions; a ring's slots are tied to them")
        super().compact(keep, sinks, row)

    def save(self, path: str | Path) -> None:
        """As Decoder.save. Raises NotSupported for a ring: its rows are not the first of its buffer."""
        if self._rings:
            raise NotSupported("the state of a ring cannot be saved; prefill again")
        super().save(path)

    def read_cache(self, layer: int, row: int = 0) -> CacheRows:
        """As Decoder.read_cache; of a ring what the plan counts on, in order of position."""
        if layer not in self._rings:
            return super().read_cache(layer, row)
        self._check_alive()
        held = self.rows.held[self._row(row)]
        first = max(self._oldest(layer, held), int(self.rows.floors[layer, row]))
        positions = np.arange(first, held, dtype=np.int64)
        slots = positions % self._rings[layer]
        keys, values = (half[row][:, slots].copy() for half in self.cache.read(layer))
        one, _ = self.model.cache_scales[layer]
        return CacheRows(
            positions, keys.astype(np.float32), values.astype(np.float32), keys, values, one, one
        )

    def _oldest(self, layer: int, held: int) -> int:
        return self.plan.oldest(self.model.spec.layers[layer], self.capacity, held)

    def _checked_rows(self, tokens: RowTokens) -> list[Int64Array]:
        parts = super()._checked_rows(tokens)
        if len({part.size for part in parts}) > 1 or len(set(self.rows.held)) > 1:
            raise _ragged()
        return parts

    def _steps(self, parts: Sequence[Int64Array], chunk: int) -> Iterator[Step]:
        if chunk < 0:
            raise InvalidRequest(f"sought a chunk of 0 (one shot) or more tokens, found {chunk}")
        return equal_steps(np.stack(parts), chunk)

    def _append(
        self, parts: Sequence[Int64Array], chunk: int, logits: Literal["all", "last"]
    ) -> Float32Array:
        longest = min(chunk or parts[0].size, parts[0].size, self._max_step)
        if logits == "all" and longest > 1 and self._contract.logits_rows == "last":
            raise NotSupported("this graph returns logits of a step's last token only; ask for logits=last")
        return super()._append(parts, chunk, logits)

    def _run(
        self, ids: Int64Array, rows: Int64Array, keep_token: bool = False, new: Int64Array | None = None
    ) -> Float32Array:
        """``ids`` [batch, n] in as many steps as the cache needs; the logits of the flat ``rows``."""
        count, vocabulary = ids.shape[1], self.model.spec.vocab_size
        parts = [self._step(ids[:, at : at + self._max_step]) for at in range(0, count, self._max_step)]
        found = np.concatenate(parts, axis=1)
        if found.shape[1] != count:  # last rows alone, and nothing else is asked for
            found = found[:, -1:]
            rows = np.arange(len(rows), dtype=np.int64)
        logits: Float32Array = found.reshape(-1, vocabulary)[rows]
        if keep_token:
            self.newest_buffers[0].write(logits.argmax(axis=1)[:, None])
        return logits

    def _step(self, ids: Int64Array) -> Float32Array:
        """One run over ``ids``; float32 logits [batch, n or 1, vocab]."""
        binding = self.model.session.io_binding()
        fed = {entry.name: self._input(entry, ids) for entry in self._contract.inputs}
        for name, buffer in fed.items():
            binding.bind_ortvalue_input(name, buffer.value)
        binding.bind_output(self._contract.logits, "cpu")
        self.cache.bind(binding)
        try:
            self.model.session.run_with_iobinding(binding, self.model.run_options)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            self._failed = True
            raise failure_of(error, f"onnxruntime failed at position {self.position}") from error
        self.cache.collect(binding)
        for row in range(self.batch):
            self.rows.append(row, ids[row])
        self.rows.held = [held + ids.shape[1] for held in self.rows.held]
        return self._logits(binding.get_outputs()[0].numpy(), ids.shape[1])

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


def _ragged() -> NotSupported:
    return NotSupported("a model brought as ONNX runs batch rows of the same length only; use batch 1")


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
