"""How a first port decodes: without IO binding, with logits for every position, or both.

Legitimate modes that people ship, and the baseline that the engine's own way is measured against
(``kvfarm ablate``). They answer the same programs with the same logits as ``Decoder``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from kvengine.arrays import GrowingArrays, StaticArrays
from kvengine.cache import Cache, present_names
from kvengine.decoder import Decoder, Float32Array, Int64Array
from kvengine.model import Model
from kvengine.recipe import SessionRecipe


def decoder_for(recipe: SessionRecipe) -> type[Decoder]:
    """The decoder that works the way ``recipe`` says."""
    if recipe.io_binding:
        return FullLogitsDecoder if recipe.logits == "all" else Decoder
    return UnboundFullLogitsDecoder if recipe.logits == "all" else UnboundDecoder


class _HostFedDecoder(Decoder):
    """The greedy token makes a round trip through the host at every step."""

    def step(self, rows: Sequence[bool] | None = None) -> Int64Array:
        new = None if rows is None else np.asarray(rows, bool).astype(np.int64)
        self._check_room(1, new)
        tokens = self.newest_token().reshape(self.batch, 1)
        self._run(tokens, np.arange(self.batch, dtype=np.int64), keep_token=True, new=new)
        return self.newest_token()

    def _keep(self, tokens: Int64Array) -> Float32Array:
        """``tokens``, one for each row, are the newest greedy ones; returns no rows."""
        self._newest = 0
        self.newest_buffers[0].write(tokens.reshape(self.batch, 1))
        return np.empty((0, self.model.spec.vocab_size), np.float32)


class FullLogitsDecoder(_HostFedDecoder):
    """The head runs on every new token and all its rows come back; the host takes what it needs."""

    def _run(
        self, ids: Int64Array, rows: Int64Array, keep_token: bool = False, new: Int64Array | None = None
    ) -> Float32Array:
        every: Float32Array = super()._run(ids, np.arange(ids.size, dtype=np.int64), new=new)
        asked = every[rows]
        return self._keep(np.argmax(asked, axis=-1)) if keep_token else asked


class UnboundDecoder(_HostFedDecoder):
    """``session.run``: onnxruntime allocates every output anew and copies it into a numpy array."""

    def __init__(self, model: Model, capacity: int, *, batch: int = 1, slack: int | None = None) -> None:
        super().__init__(model, capacity, batch=batch, slack=slack)
        self._presents = [name for i in range(len(model.spec.layers)) for name in present_names(i)]
        self._constants = {name: buffer.read() for name, buffer in self._tables}

    def _run(
        self, ids: Int64Array, rows: Int64Array, keep_token: bool = False, new: Int64Array | None = None
    ) -> Float32Array:
        self._asked, self._wanted = rows, "next_token" if keep_token else "logits"
        self._advance(self._general, ids, new)
        return self._keep(self._answer) if keep_token else self._answer

    def _execute(self, binding: ort.IOBinding, ids: Int64Array) -> None:
        feeds = {
            "input_ids": ids,
            "logits_index": self._asked,
            "seqlens_k": self._lengths.read(),
            "total_sequence_length": self._total.read(),
            "query_seqlens": self._new.read(),
            **self._constants,
            **self._arrays.feeds(),
        }
        names = [self._wanted, *self._presents]
        self._answer, *presents = self.model.session.run(names, feeds, self.model.run_options)
        self._arrays.take(presents)

    def _make_cache(self) -> Cache:
        arrays = GrowingArrays if self.plan.kind == "growing" else StaticArrays
        self._arrays = arrays(self.model.spec, self.plan, self.capacity, self.batch)
        return self._arrays


class UnboundFullLogitsDecoder(FullLogitsDecoder, UnboundDecoder):
    """Both: a growing cache with this one is the naive baseline."""
