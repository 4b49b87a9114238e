"""Decode with a preallocated KV cache: prefill, decode and greedy generation over IO binding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvengine.buffers import Buffer
from kvengine.cache import GrowingCache, StaticCache
from kvengine.errors import (
    ContextOverflow,
    EmptyPrompt,
    EngineFailure,
    InvalidRequest,
    InvalidToken,
    NotSupported,
    failure_of,
)
from kvengine.model import Model
from kvengine.rope import rope_tables

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class Decoder:
    """One growing sequence per batch row on a loaded Model.

    Every buffer is allocated here, once; ``reset`` reuses them. A request that is refused
    (ContextOverflow, InvalidToken, EmptyPrompt, InvalidRequest) changes nothing. After an
    EngineFailure the cache is undefined and only ``reset`` is accepted.

    Args:
        capacity: tokens of context per row.
        slack: rows above the window in windowed layers; None takes the artifact's plan.

    Raises:
        InvalidRequest: capacity, batch or slack out of range.
    """

    def __init__(self, model: Model, capacity: int, *, batch: int = 1, slack: int | None = None) -> None:
        if not 1 <= capacity <= model.spec.max_position:
            raise InvalidRequest(
                f"sought a capacity of 1..{model.spec.max_position} tokens (the model's), found {capacity}"
            )
        if batch < 1 or (slack is not None and slack < 0):
            raise InvalidRequest(f"sought batch >= 1 and slack >= 0, found batch {batch} and slack {slack}")
        self.model = model
        self.capacity = capacity
        self.batch = batch
        self.position = 0  # tokens in the cache, the same for every row
        self.plan = model.plan if slack is None else dataclasses.replace(model.plan, slack=slack)
        self._failed = False
        cache_type = GrowingCache if self.plan.kind == "growing" else StaticCache
        self.cache = cache_type(model.spec, self.plan, capacity, batch, model.recipe)
        self._lengths = Buffer((batch,), np.int32)  # seqlens_k: total tokens - 1
        self._total = Buffer((1,), np.int32)
        self._new = Buffer((batch,), np.int32)  # query_seqlens
        device = model.recipe.device_type, model.recipe.device_id
        # Greedy tokens alternate between two buffers: one is read while the other is written.
        self._tokens = [Buffer((batch, 1), np.int64, *device) for _ in range(2)]
        self._every_row = Buffer((batch,), np.int64, *device)
        self._every_row.write(np.arange(batch, dtype=np.int64))
        self._newest = 0  # index of the buffer that holds the newest greedy token
        self._tables = self._make_rope_tables()
        self._general = self._make_binding()
        self._feedback = [self._make_feedback_binding(source) for source in range(2)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache held now; for static and hybrid plans fixed from the start."""
        return self.cache.nbytes

    def prefill(
        self,
        tokens: Sequence[int] | Int64Array,
        *,
        chunk: int = 0,
        logits: Literal["all", "last"] = "last",
    ) -> Float32Array:
        """Append ``tokens`` ([n], or [batch, n]) in steps of ``chunk`` (0: one shot).

        Returns:
            float32 [batch * n, vocab] for "all" (row-major: batch, then position),
            [batch, vocab] for "last".
        """
        vocabulary = self.model.spec.vocab_size
        found = []
        for part, last_rows in self._chunks(self._checked(tokens), chunk):
            rows = self._run(part, _every_row(part) if logits == "all" else last_rows)
            found.append(rows.reshape(self.batch, -1, vocabulary))
        return np.concatenate(found, axis=1).reshape(-1, vocabulary)

    def check(self, tokens: Sequence[int] | Int64Array) -> None:
        """Raise what appending ``tokens`` would raise, without running anything."""
        self._checked(tokens)

    def decode(self, tokens: int | Sequence[int]) -> Float32Array:
        """Append one token (or one per row); returns float32 [batch, vocab]."""
        each = [tokens] if isinstance(tokens, int | np.integer) else list(tokens)
        return self.prefill(np.array([[token] for token in each], np.int64))

    def start(self, tokens: Sequence[int] | Int64Array, *, chunk: int = 0) -> Int64Array:
        """Append a prompt and return the greedy next token of each row, int64 [batch].

        No logits leave the device; the token stays there for ``step``.
        """
        for part, last_rows in self._chunks(self._checked(tokens), chunk):
            self._run(part, last_rows, keep_token=last_rows.size > 0)
        return self.newest_token()

    def step(self) -> Int64Array:
        """Append the newest greedy token and return the one after it, int64 [batch]."""
        self._check_room(1)
        binding = self._feedback[self._newest]
        if self.plan.kind == "growing":
            self.cache.bind(binding)
        self._advance(binding, 1)
        self._newest = 1 - self._newest
        return self.newest_token()

    def newest_token(self) -> Int64Array:
        """The token that ``start`` or ``step`` found last, int64 [batch]."""
        newest: Int64Array = self._tokens[self._newest].read().reshape(-1).copy()
        return newest

    def reset(self) -> None:
        """Forget every token; keep every buffer."""
        self.position = 0
        self._failed = False
        self.cache.reset()

    def poison(self) -> None:
        """Overwrite all dead cache rows with NaN (see StaticCache.poison); must never matter."""
        self.cache.poison(self.position)

    def rewind(self, count: int) -> NoReturn:
        raise NotSupported("rewind is not built yet; reset and prefill again")

    def fork(self) -> NoReturn:
        raise NotSupported("fork is not built yet; prefill a second Decoder")

    def save(self, path: str) -> NoReturn:
        raise NotSupported("save is not built yet; keep the tokens and prefill again")

    def load(self, path: str) -> NoReturn:
        raise NotSupported("load is not built yet; keep the tokens and prefill again")

    def _checked(self, tokens: Sequence[int] | Int64Array) -> Int64Array:
        """The request as int64 [batch, n], or the reason it is refused."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size == 0:
            raise EmptyPrompt("sought at least one token to append, found none; pass a token such as BOS")
        ids = np.ascontiguousarray(np.atleast_2d(ids))
        if ids.ndim != 2 or ids.shape[0] != self.batch:
            raise InvalidRequest(f"sought tokens of shape [{self.batch}, n], found {list(ids.shape)}")
        vocabulary = self.model.spec.vocab_size
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.size:
            raise InvalidToken(
                f"sought token ids in 0..{vocabulary - 1}, found {int(outside[0])}; does the tokenizer "
                "belong to this checkpoint?"
            )
        self._check_room(ids.shape[1])
        return ids

    def _chunks(self, ids: Int64Array, chunk: int) -> list[tuple[Int64Array, Int64Array]]:
        """The steps of a prompt [batch, n], each with the flat rows of the prompt's last tokens (or none)."""
        if chunk < 0:
            raise InvalidRequest(f"sought a chunk of 0 (one shot) or more tokens, found {chunk}")
        count = ids.shape[1]
        parts = [ids[:, start : start + (chunk or count)] for start in range(0, count, chunk or count)]
        nothing = np.empty(0, np.int64)
        return [(part, nothing) for part in parts[:-1]] + [(parts[-1], _last_rows(parts[-1]))]

    def _check_room(self, count: int) -> None:
        if self._failed:
            raise EngineFailure("the last step failed and the cache is undefined; reset first")
        if self.position + count > self.capacity:
            raise ContextOverflow(
                f"sought room for {count} more tokens at position {self.position}, the capacity is "
                f"{self.capacity}; open the decoder with more capacity or reset"
            )

    def _run(self, ids: Int64Array, rows: Int64Array, keep_token: bool = False) -> Float32Array:
        """One step over ``ids`` [batch, n]; returns the logits of the flat ``rows``, [rows, vocab]."""
        binding = self._general
        inputs = [Buffer(array.shape, np.int64, *self._device) for array in (ids, rows)]
        for buffer, array in zip(inputs, (ids, rows), strict=True):
            buffer.write(array)
        binding.bind_ortvalue_input("input_ids", inputs[0].value)
        binding.bind_ortvalue_input("logits_index", inputs[1].value)
        binding.clear_binding_outputs()
        if keep_token:
            self._newest = 0
            binding.bind_ortvalue_output("next_token", self._tokens[0].value)
        else:
            binding.bind_output("logits", "cpu")
        self.cache.bind(binding)
        self._advance(binding, ids.shape[1])
        if keep_token:
            return np.empty((0, self.model.spec.vocab_size), np.float32)
        logits: Float32Array = binding.get_outputs()[0].numpy()
        return logits

    def _advance(self, binding: ort.IOBinding, count: int) -> None:
        """Run one step that appends ``count`` tokens to every row."""
        total = self.position + count
        self._lengths.read()[:] = total - 1
        self._total.read()[:] = total
        self._new.read()[:] = count
        try:
            self.model.session.run_with_iobinding(binding, self.model.run_options)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            self._failed = True
            raise failure_of(error, f"onnxruntime failed at position {self.position}") from error
        self.position = total
        self.cache.collect(binding)

    @property
    def _device(self) -> tuple[str, int]:
        return self.model.recipe.device_type, self.model.recipe.device_id

    def _make_rope_tables(self) -> list[tuple[str, Buffer]]:
        """cos_cache.r and sin_cache.r, each [rows, head_dim // 2] in the graph's activation dtype."""
        spec, activations = self.model.spec, self.model.artifact.manifest.recipe.activations
        # The op wants a row for every row of the longest cache, also where the window exceeds the capacity.
        rows = max(self.capacity, *(self.plan.rows(layer, self.capacity) for layer in spec.layers))
        tables = []
        for index, rope in enumerate(spec.ropes):
            head_dim = next(layer.head_dim for layer in spec.layers if layer.rope == index)
            for name, table in zip(("cos", "sin"), rope_tables(rope, rows, head_dim), strict=True):
                buffer = Buffer(table.shape, np.dtype(activations), *self._device)
                buffer.write(table.astype(activations))
                tables.append((f"{name}_cache.{index}", buffer))
        return tables

    def _make_binding(self) -> ort.IOBinding:
        """A binding with everything that never changes."""
        binding = self.model.session.io_binding()
        binding.bind_ortvalue_input("seqlens_k", self._lengths.value)
        binding.bind_ortvalue_input("total_sequence_length", self._total.value)
        binding.bind_ortvalue_input("query_seqlens", self._new.value)
        for name, buffer in self._tables:
            binding.bind_ortvalue_input(name, buffer.value)
        return binding

    def _make_feedback_binding(self, source: int) -> ort.IOBinding:
        """A step that reads its token from one buffer and writes the next into the other."""
        binding = self._make_binding()
        binding.bind_ortvalue_input("input_ids", self._tokens[source].value)
        binding.bind_ortvalue_input("logits_index", self._every_row.value)
        binding.bind_ortvalue_output("next_token", self._tokens[1 - source].value)
        self.cache.bind(binding)
        return binding


def _every_row(part: Int64Array) -> Int64Array:
    """Flat index of every token in [batch, n]."""
    return np.arange(part.size, dtype=np.int64)


def _last_rows(part: Int64Array) -> Int64Array:
    """Flat index of each row's last token in [batch, n]."""
    batch, count = part.shape
    ends: Int64Array = np.arange(1, batch + 1, dtype=np.int64) * count
    return ends - 1
