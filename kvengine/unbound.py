"""How a first port decodes: without IO binding, with logits for every position, or both.

Legitimate modes that people ship, and the baseline that the engine's own way is measured against
(``kvfarm ablate``). They answer the same programs with the same logits as ``Decoder``.
"""

from __future__ import annotations

import numpy as np

from kvengine.cache import ArrayCache, Cache, present_names
from kvengine.decoder import Decoder, Float32Array, Int64Array
from kvengine.errors import EngineFailure
from kvengine.model import Model
from kvengine.recipe import SessionRecipe


def decoder_for(recipe: SessionRecipe) -> type[Decoder]:
    """The decoder that works the way ``recipe`` says."""
    if recipe.io_binding:
        return FullLogitsDecoder if recipe.logits == "all" else Decoder
    return UnboundFullLogitsDecoder if recipe.logits == "all" else UnboundDecoder


class _HostFedDecoder(Decoder):
    """The greedy token makes a round trip through the host at every step."""

    def step(self) -> Int64Array:
        self._check_room(1)
        token = self.newest_token().reshape(self.batch, 1)
        self._run(token, np.arange(self.batch, dtype=np.int64), keep_token=True)
        return self.newest_token()

    def _keep(self, tokens: Int64Array) -> Float32Array:
        """``tokens`` [batch] are the newest greedy ones; returns no rows."""
        self._newest = 0
        self._tokens[0].write(tokens.reshape(self.batch, 1))
        return np.empty((0, self.model.spec.vocab_size), np.float32)


class FullLogitsDecoder(_HostFedDecoder):
    """The head runs on every new token and all its rows come back; the host takes what it needs."""

    def _run(self, ids: Int64Array, rows: Int64Array, keep_token: bool = False) -> Float32Array:
        every: Float32Array = super()._run(ids, np.arange(ids.size, dtype=np.int64))
        asked = every[rows]
        return self._keep(np.argmax(asked, axis=-1)) if keep_token else asked


class UnboundDecoder(_HostFedDecoder):
    """``session.run``: onnxruntime allocates every output anew and copies it into a numpy array."""

    def __init__(self, model: Model, capacity: int, *, batch: int = 1, slack: int | None = None) -> None:
        super().__init__(model, capacity, batch=batch, slack=slack)
        self._presents = [name for i in range(len(model.spec.layers)) for name in present_names(i)]
        self._constants = {name: buffer.read() for name, buffer in self._tables}

    def _make_cache(self) -> Cache:
        self._arrays = ArrayCache(self.model.spec, self.plan, self.capacity, self.batch)
        return self._arrays

    def _run(self, ids: Int64Array, rows: Int64Array, keep_token: bool = False) -> Float32Array:
        total = self.position + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "logits_index": rows,
            "seqlens_k": np.full(self.batch, total - 1, np.int32),
            "total_sequence_length": np.array([total], np.int32),
            "query_seqlens": np.full(self.batch, ids.shape[1], np.int32),
            **self._constants,
            **self._arrays.feeds(),
        }
        wanted = ["next_token" if keep_token else "logits", *self._presents]
        try:
            answer, *presents = self.model.session.run(wanted, feeds, self.model.run_options)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            self._failed = True
            raise EngineFailure(f"onnxruntime failed at position {self.position}: {error}") from error
        self.position = total
        self._arrays.take(presents)
        return self._keep(answer) if keep_token else answer


class UnboundFullLogitsDecoder(FullLogitsDecoder, UnboundDecoder):
    """Both: a growing cache with this one is the naive baseline."""
