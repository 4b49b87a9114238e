"""Decode with a preallocated KV cache: prefill, decode and greedy generation over IO binding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvengine import editing, shortcuts, state
from kvengine.buffers import Buffer
from kvengine.cache import Cache, GrowingCache, StaticCache, take_rows
from kvengine.errors import (
    ContextOverflow,
    EmptyPrompt,
    EngineFailure,
    InvalidRequest,
    InvalidToken,
    failure_of,
)
from kvengine.model import Model
from kvengine.plan import PADDING_ROWS
from kvengine.program import CacheRows
from kvengine.rope import rope_tables
from kvengine.rows import Rows
from kvengine.steps import Step, equal_steps, ragged_steps

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Tokens = Sequence[int] | Int64Array
RowTokens = Sequence[Tokens] | Int64Array  # the tokens of each batch row


class Decoder:
    """One growing sequence per batch row on a loaded Model; the rows may be of different lengths.

    Every buffer is allocated here, once; ``reset`` reuses them. A request that is refused changes
    nothing. After an EngineFailure the cache is undefined and only ``reset`` or ``load`` is accepted.

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
        self.plan = model.plan if slack is None else dataclasses.replace(model.plan, slack=slack)
        self.rows = Rows(len(model.spec.layers), batch, capacity)
        self._failed = False
        self.cache = self._make_cache()
        self._lengths = Buffer((batch,), np.int32)  # seqlens_k: total tokens - 1
        self._total = Buffer((1,), np.int32)
        self._new = Buffer((batch,), np.int32)  # query_seqlens
        device = model.recipe.device_type, model.recipe.device_id
        # Greedy tokens alternate between two buffers: one is read while the other is written.
        self.newest_buffers = [Buffer((batch, 1), np.int64, *device) for _ in range(2)]
        self._every_row = Buffer((batch,), np.int64, *device)
        self._every_row.write(np.arange(batch, dtype=np.int64))
        self._newest = 0  # index of the buffer that holds the newest greedy token
        self._tables = self._make_rope_tables()
        self._general = self._make_binding()
        self._feedback = [self._make_feedback_binding(source) for source in range(2)]

    @property
    def position(self) -> int:
        """Tokens in the longest row."""
        return self.rows.longest

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache held now; for static and hybrid plans fixed from the start."""
        return self.cache.nbytes

    # -- appending --------------------------------------------------------------------------------

    def prefill(
        self,
        tokens: Tokens,
        *,
        chunk: int = 0,
        logits: Literal["all", "last"] = "last",
    ) -> Float32Array:
        """Append ``tokens`` ([n], or [batch, n]) in steps of ``chunk`` (0: one shot).

        Returns:
            float32 [batch * n, vocab] for "all" (row-major: batch, then position),
            [batch, vocab] for "last".
        """
        return self._append(self._checked(tokens), chunk, logits)

    def extend(
        self,
        tokens: RowTokens,
        *,
        chunk: int = 0,
        logits: Literal["all", "last"] = "last",
    ) -> Float32Array:
        """Append ``tokens[b]`` to row b, in the same steps of at most ``chunk`` (0: as few as can be).

        A row that gets none is idle: its cache is not touched. Shorter rows are padded on the right;
        a step is cut where the padding of the fullest row would leave its buffer.

        Returns:
            float32 [tokens of all rows, vocab] for "all", row 0's first; for "last" [rows that got
            any, vocab].

        Raises:
            EmptyPrompt, InvalidToken, InvalidRequest, ContextOverflow, EngineFailure.
        """
        return self._append(self._checked_rows(tokens), chunk, logits)

    def check_rows(self, tokens: RowTokens) -> None:
        """Raise what ``extend`` would raise, without running anything."""
        self._checked_rows(tokens)

    def decode(self, tokens: int | Sequence[int]) -> Float32Array:
        """Append one token (or one per row); returns float32 [batch, vocab]."""
        each = [tokens] if isinstance(tokens, int | np.integer) else list(tokens)
        return self.prefill(np.array([[token] for token in each], np.int64))

    def start(self, tokens: Tokens, *, chunk: int = 0) -> Int64Array:
        """Append a prompt ([n], or [batch, n]) and return the greedy next token of each row, int64 [batch].

        No logits leave the device; the tokens stay there for ``step``.
        """
        return self._start(self._checked(tokens), chunk)

    def start_rows(self, tokens: RowTokens, *, chunk: int = 0) -> Int64Array:
        """As ``start`` with a prompt of its own for each row; one that gets none is idle, its token means
        nothing."""
        return self._start(self._checked_rows(tokens), chunk)

    def reuse(self, tokens: Sequence[int], *, chunk: int = 0, row: int = 0) -> Float32Array:
        """Make ``row`` hold exactly ``tokens``, running only those behind the longest common prefix.

        The prefix is kept by ``rewind``; where that cannot reach it, or the row was compacted, the row
        starts again from nothing. The last token always runs, for its logits.

        Returns:
            float32 [tokens really run, vocab].
        """
        self._check_alive()
        return shortcuts.reuse(self, tokens, chunk, self._row(row))

    def speculate(
        self,
        token: int,
        count: int,
        *,
        draft: int = 4,
        ngram: int = 2,
        row: int = 0,
        hint: Sequence[int] = (),
    ) -> tuple[int, ...]:
        """Append ``token`` and greedy tokens after it, by prompt lookup; the last one is not appended.

        What followed the last ``ngram`` tokens when they last occurred (in the row, or in ``hint``, which
        counts as standing before it), up to ``draft`` tokens and no more than could be rewound, is run in
        one step with the newest token. As far as it is what the model would have said it is kept, the
        rest is rewound: the tokens are those of greedy decoding.

        Returns:
            the ``count`` tokens that follow ``token``.
        """
        self._check_alive()
        return shortcuts.speculate(self, token, count, draft, ngram, self._row(row), hint)

    def step(self, rows: Sequence[bool] | None = None) -> Int64Array:
        """Append the newest greedy token and return the one after it, int64 [batch].

        rows: which rows take part (None: all); the others are idle and lose their newest token.
        """
        new = None if rows is None else np.asarray(rows, bool).astype(np.int64)
        self._check_room(1, new)
        binding = self._feedback[self._newest]
        if self.plan.kind == "growing":
            self.cache.bind(binding)
        self._advance(binding, self.newest_buffers[self._newest].read(), new)
        self._newest = 1 - self._newest
        return self.newest_token()

    def newest_token(self) -> Int64Array:
        """The token that ``start`` or ``step`` found last, int64 [batch]."""
        newest: Int64Array = self.newest_buffers[self._newest].read().reshape(-1).copy()
        return newest

    # -- forgetting and moving --------------------------------------------------------------------

    def reset(self, row: int | None = None) -> None:
        """Forget every token, or those of one row; keep every buffer."""
        if row is None:
            self._failed = False
            self.cache.reset()
        for each in range(self.batch) if row is None else [self._row(row)]:
            self.rows.clear(each)
        self.cache.trim(self.rows.longest)

    def poison(self) -> None:
        """Overwrite all dead cache rows with NaN (see StaticCache.poison); must never matter."""
        self.cache.poison(self.rows.held)

    def rewind(self, count: int, row: int = 0) -> None:
        """Drop the newest ``count`` tokens of ``row``, as if they had never been appended.

        Exact, on every layer, down to CachePlan.rewind_limit, which proves the bound; layers without
        a window, and windows that have evicted nothing yet, go back to any length.

        Raises:
            InvalidRequest: a count below 0 or above the tokens held.
            RewindTooFar: beyond the limit; nothing was changed.
        """
        self._check_alive()
        editing.rewind(self, count, self._row(row))

    def compact(self, keep: int, sinks: int = 0, row: int = 0) -> None:
        """Drop all tokens of ``row`` but the first ``sinks`` and the newest ``keep``; makes room, inexactly.

        What it preserves, and what not: nothing that stays is computed again, so the keys and values of
        later layers still carry what they took from dropped tokens. From here on no token attends to a
        dropped one. Distances stay: a key that was n positions back still is, sinks included, since
        all keys are rotated by the same angle. So the logits are exactly those of a model whose
        attention mask hides the dropped positions from every token appended after this call (up to the
        rounding of that rotation; an int8 or int4 cache rounds its keys once more). They are not those
        of a run on the kept tokens alone, nor of the uncompacted run. Windows lose nothing if
        ``keep`` is at least window - 1, which is demanded where there are sinks.

        Nothing happens where nothing is to be dropped.

        Raises InvalidRequest: keep below 1, sinks below 0, or a window that would reach the sinks.
        """
        self._check_alive()
        editing.compact(self, keep, sinks, self._row(row))

    def read_cache(self, layer: int, row: int = 0) -> CacheRows:
        """What ``layer`` holds of ``row``. Raises InvalidRequest for a layer or row there is not."""
        self._check_alive()
        return editing.read_cache(self, layer, self._row(row))

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was, its newest greedy token included.

        Raises InvalidRequest unless ``order`` names a row for each row.
        """
        self._check_alive()
        if len(order) != self.batch:
            raise InvalidRequest(f"sought an order of {self.batch} rows, found {len(order)}")
        chosen = [self._row(row) for row in order]
        take_rows(self.cache, len(self.model.spec.layers), chosen)
        self.rows.take(chosen)
        for buffer in self.newest_buffers:
            buffer.write(buffer.read()[chosen])

    def fork(self) -> Decoder:
        """A second decoder with the same state; whatever happens to one does not show in the other."""
        self._check_alive()
        other = type(self)(self.model, self.capacity, batch=self.batch, slack=self.plan.slack)
        for layer, (key, value) in enumerate(self.cache.arrays()):
            other.cache.write(layer, key, value)
        other.rows.copy_from(self.rows)
        other._newest = self._newest
        for mine, theirs in zip(self.newest_buffers, other.newest_buffers, strict=True):
            theirs.write(mine.read())
        return other

    def save(self, path: str | Path) -> None:
        """Write the state to ``path``; see kvengine.state. Raises StateError where it cannot be written."""
        self._check_alive()
        state.save(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Replace the state by the one in ``path``, which must be of this artifact, plan, capacity and batch.

        Raises StateError: anything else, a truncated or an altered file; nothing was changed.
        """
        state.load(self, Path(path))
        self._failed = False

    def alone(self, tokens: Tokens, row: int) -> list[Tokens]:
        """``tokens`` for one row and none for the others. Raises InvalidRequest for a row there is not."""
        self._row(row)
        return [tokens if each == row else () for each in range(self.batch)]

    # -- inside -----------------------------------------------------------------------------------

    def _start(self, parts: Sequence[Int64Array], chunk: int) -> Int64Array:
        newest = np.zeros((self.batch, 1), np.int64)
        for step in self._steps(parts, chunk):
            ending = [row for row, asked in enumerate(step.last_rows) if len(asked)]
            if len(ending) == self.batch:
                self._run(step.ids, np.concatenate(step.last_rows), keep_token=True, new=step.new)
                return self.newest_token()
            logits = self._run(step.ids, np.concatenate(step.last_rows), new=step.new)
            newest[ending, 0] = logits.argmax(axis=-1)
        self._newest = 0
        self.newest_buffers[0].write(newest)
        return self.newest_token()

    def _append(
        self, parts: Sequence[Int64Array], chunk: int, logits: Literal["all", "last"]
    ) -> Float32Array:
        found: list[list[Float32Array]] = [[] for _ in parts]
        for step in self._steps(parts, chunk):
            asked = step.every_row if logits == "all" else step.last_rows
            answers = self._run(step.ids, np.concatenate(asked), new=step.new)
            for row, answer in enumerate(np.split(answers, np.cumsum([len(a) for a in asked])[:-1])):
                found[row].append(answer)
        return np.concatenate([answer for answers in found for answer in answers])

    def _checked(self, tokens: Tokens | RowTokens) -> list[Int64Array]:
        """A request for all rows alike, [n] or [batch, n], as each row's tokens; or why it is refused."""
        ids = np.atleast_2d(np.asarray(tokens, dtype=np.int64))
        if ids.size and (ids.ndim != 2 or ids.shape[0] != self.batch):
            raise InvalidRequest(f"sought tokens of shape [{self.batch}, n], found {list(ids.shape)}")
        return self._checked_rows(ids if ids.size else [()] * self.batch)

    def _checked_rows(self, tokens: RowTokens) -> list[Int64Array]:
        """The tokens of each row, or the reason they are refused."""
        if len(tokens) != self.batch:
            raise InvalidRequest(f"sought tokens for {self.batch} rows, found {len(tokens)}")
        parts = [np.asarray(part, np.int64).reshape(-1) for part in tokens]
        self.check_tokens(np.concatenate(parts))
        self._check_room(1, np.array([part.size for part in parts]))
        return parts

    def check_tokens(self, ids: Int64Array) -> None:
        """Raises EmptyPrompt, InvalidToken."""
        if not ids.size:
            raise EmptyPrompt("sought at least one token to append, found none; pass a token such as BOS")
        vocabulary = self.model.spec.vocab_size
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.size:
            raise InvalidToken(
                f"sought token ids in 0..{vocabulary - 1}, found {int(outside[0])}; does the tokenizer "
                "belong to this checkpoint?"
            )

    def _check_alive(self) -> None:
        if self._failed:
            raise EngineFailure("the last step failed and the cache is undefined; reset first")

    def _check_room(self, count: int, new: Int64Array | None = None) -> None:
        """Room for ``count`` tokens in every row; with ``new`` for that many times ``count`` in each."""
        self._check_alive()
        for row, held in enumerate(self.rows.held):
            wanted = count if new is None else count * int(new[row])
            if wanted and held + wanted > self.capacity:
                raise ContextOverflow(
                    f"sought room for {wanted} more tokens at position {held}, the capacity is "
                    f"{self.capacity}; open the decoder with more capacity or reset"
                )

    def _row(self, row: int) -> int:
        if not 0 <= row < self.batch:
            raise InvalidRequest(f"sought a row of 0..{self.batch - 1}, found {row}")
        return row

    def _steps(self, parts: Sequence[Int64Array], chunk: int) -> Iterator[Step]:
        if chunk < 0:
            raise InvalidRequest(f"sought a chunk of 0 (one shot) or more tokens, found {chunk}")
        if self.batch == 1:
            return equal_steps(np.stack(parts), chunk)
        return ragged_steps(parts, self.rows.held, chunk, self.capacity + PADDING_ROWS)

    def _run(
        self, ids: Int64Array, rows: Int64Array, keep_token: bool = False, new: Int64Array | None = None
    ) -> Float32Array:
        """One step over ``ids`` [batch, n], of which row b has ``new[b]`` (None: all n).

        Returns the logits of the flat ``rows``, [rows, vocab].
        """
        binding = self._general
        inputs = [Buffer(array.shape, np.int64, *self._device) for array in (ids, rows)]
        for buffer, array in zip(inputs, (ids, rows), strict=True):
            buffer.write(array)
        binding.bind_ortvalue_input("input_ids", inputs[0].value)
        binding.bind_ortvalue_input("logits_index", inputs[1].value)
        binding.clear_binding_outputs()
        if keep_token:
            self._newest = 0
            binding.bind_ortvalue_output("next_token", self.newest_buffers[0].value)
        else:
            binding.bind_output("logits", "cpu")
        self.cache.bind(binding)
        self._advance(binding, ids, new)
        if keep_token:
            return np.empty((0, self.model.spec.vocab_size), np.float32)
        logits: Float32Array = binding.get_outputs()[0].numpy()
        return logits

    def _advance(self, binding: ort.IOBinding, ids: Int64Array, new: Int64Array | None) -> None:
        """Run one step that appends ``ids`` [batch, n], of row b the first ``new[b]`` (None: all n)."""
        held, count = self.rows.held, ids.shape[1]
        counts = [count] * self.batch if new is None else new.tolist()
        totals = [before + added for before, added in zip(held, counts, strict=True)]
        lengths = totals if new is None else [max(total, 1) for total in totals]  # the op knows no empty row
        bound = max(lengths)
        if new is not None and self.plan.kind == "growing":
            bound = max(*held, 1) + count  # the length of the present, which must hold the padding too
        self._lengths.read()[:] = [length - 1 for length in lengths]
        self._total.read()[:] = bound
        self._new.read()[:] = counts
        try:
            self._execute(binding, ids)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            self._failed = True
            raise failure_of(error, f"onnxruntime failed at position {self.position}") from error
        for row, added in enumerate(counts):
            self.rows.append(row, ids[row, :added])
        self.rows.held = totals
        self.cache.collect(binding)

    def _execute(self, binding: ort.IOBinding, ids: Int64Array) -> None:
        self.model.session.run_with_iobinding(binding, self.model.run_options)

    def _make_cache(self) -> Cache:
        cache_type = GrowingCache if self.plan.kind == "growing" else StaticCache
        return cache_type(self.model.spec, self.plan, self.capacity, self.batch, self.model.recipe)

    @property
    def _device(self) -> tuple[str, int]:
        return self.model.recipe.device_type, self.model.recipe.device_id

    def _make_rope_tables(self) -> list[tuple[str, Buffer]]:
        """cos_cache.r and sin_cache.r, each [rows, head_dim // 2] in the graph's activation dtype."""
        spec, activations = self.model.spec, self.model.artifact.manifest.recipe.activations
        # The op wants a row for every row of the longest cache, also where the window exceeds the capacity.
        rows = max(self.plan.rows(layer, self.capacity, self.batch) for layer in spec.layers)
        rows = max(rows, self.capacity + (PADDING_ROWS if self.batch > 1 else 0))
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
        binding.bind_ortvalue_input("input_ids", self.newest_buffers[source].value)
        binding.bind_ortvalue_input("logits_index", self._every_row.value)
        binding.bind_ortvalue_output("next_token", self.newest_buffers[1 - source].value)
        self.cache.bind(binding)
        return binding
