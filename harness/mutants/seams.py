"""Ways into the engine that several mutants share; each makes a Patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import kvengine.decoder
import kvengine.export.api
from harness.mutants.mutant import Patch
from kvengine.decoder import Decoder
from kvengine.export.config import Architecture
from kvengine.export.graph import CacheScales
from kvengine.spec import LayerSpec, ModelSpec, RopeSpec

Array = npt.NDArray[Any]
Run = Callable[[], None]


# -- the export -----------------------------------------------------------------------------------


def spec(alter: Callable[[ModelSpec], ModelSpec]) -> Patch:
    """The exporter reads another geometry out of config.json; plan and graph follow it."""

    def wrap(read: Callable[..., Architecture]) -> Callable[..., Architecture]:
        def broken(*arguments: Any) -> Architecture:
            architecture = read(*arguments)
            return replace(architecture, spec=alter(architecture.spec))

        return broken

    return Patch(kvengine.export.api, "read_architecture", wrap)


def layers(alter: Callable[[LayerSpec], LayerSpec]) -> Patch:
    return spec(lambda whole: replace(whole, layers=tuple(map(alter, whole.layers))))


def graph(alter: Callable[[onnx.ModelProto], None]) -> Patch:
    """The exported graph is edited; the plan does not know."""

    def wrap(build: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
        def broken(*arguments: Any) -> onnx.ModelProto:
            model = build(*arguments)
            alter(model)
            return model

        return broken

    return Patch(kvengine.export.api, "build_graph", wrap)


def scales(alter: Callable[[Array], Array]) -> Patch:
    """Calibration gives other scales for K and V, each [1, kv_heads, 1, head_dim]."""

    def wrap(calibrate: Callable[..., tuple[CacheScales, dict[str, str]]]) -> Callable[..., Any]:
        def broken(*arguments: Any) -> Any:
            found, note = calibrate(*arguments)
            return [tuple(alter(part).astype(np.float32) for part in pair) for pair in found], note

        return broken

    return Patch(kvengine.export.api, "calibrate", wrap)


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The GroupQueryAttention of each layer."""
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def window_of(node: onnx.NodeProto) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == "local_window_size"), None)


def drop_window(node: onnx.NodeProto) -> None:
    attribute = window_of(node)
    if attribute is not None:
        node.attribute.remove(attribute)


# -- the step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fed:
    """What a step tells the operator: counts of tokens, to be altered in place.

    before: tokens held by each batch row. count: width of the chunk. lengths: seqlens_k, int32 [batch]
    (tokens after the step - 1). total: total_sequence_length, int32 [1]. new: query_seqlens, int32 [batch].
    """

    decoder: Decoder
    before: list[int]
    count: int
    lengths: Array
    total: Array
    new: Array

    def say(self, total: int) -> None:
        """Let every row hold ``total`` tokens after the step."""
        self.lengths[:] = total - 1
        self.total[:] = total


def fed(alter: Callable[[Fed], None]) -> Patch:
    """The counts are altered just before onnxruntime runs; the decoder's own bookkeeping stays right."""

    def altered(seen: Fed, run: Run) -> None:
        alter(seen)
        run()

    return around_run(altered)


def around_run(alter: Callable[[Fed, Run], None]) -> Patch:
    """``alter`` is called in the place of onnxruntime's run, which it gets to call."""

    def wrap(advance: Callable[..., None]) -> Callable[..., None]:
        def broken(decoder: Decoder, binding: Any, ids: Array, new: Any) -> None:
            seen = Fed(
                decoder=decoder,
                before=list(decoder.rows.held),
                count=ids.shape[1],
                lengths=decoder._lengths.read(),
                total=decoder._total.read(),
                new=decoder._new.read(),
            )
            right = decoder.model.session
            decoder.model.session = _Between(right, lambda run: alter(seen, run))
            try:
                advance(decoder, binding, ids, new)
            finally:
                decoder.model.session = right

        return broken

    return Patch(Decoder, "_advance", wrap)


class _Between:
    """An InferenceSession whose runs go through ``alter``."""

    def __init__(self, session: Any, alter: Callable[[Run], None]) -> None:
        self._session, self._alter = session, alter

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._alter(lambda: self._session.run_with_iobinding(binding, options))


@dataclass(frozen=True)
class Held:
    """One layer around a step.

    key, value: live, [batch, kv_heads, rows, head_dim]. was: copies from before the step.
    before, after: tokens held. capacity: rows allocated. alive: rows in use after the step.
    """

    layer: int
    spec: LayerSpec
    key: Array
    value: Array
    was: tuple[Array, Array]
    before: int
    after: int
    capacity: int
    alive: int

    @property
    def parts(self) -> Iterator[tuple[Array, Array]]:
        """(now, before the step) of K and of V."""
        return zip((self.key, self.value), self.was, strict=True)

    @property
    def evicts(self) -> bool:
        return self.after > self.capacity


def after_step(alter: Callable[[Held], None], *, windowed: bool = True) -> Patch:
    """Windowed (or else the other) layers are altered after each step of a decoder with one row."""

    def wrap(advance: Callable[..., None]) -> Callable[..., None]:
        def broken(decoder: Decoder, binding: Any, ids: Array, new: Any) -> None:
            before, plan = decoder.rows.held[0], decoder.plan
            chosen = [
                (index, layer)
                for index, layer in enumerate(decoder.model.spec.layers)
                if plan.kind != "growing" and plan.is_windowed(layer) == windowed
            ]
            copies = {i: tuple(part.copy() for part in decoder.cache.read(i)) for i, _ in chosen}
            advance(decoder, binding, ids, new)
            after = decoder.rows.held[0]
            for index, layer in chosen:
                key, value = decoder.cache.read(index)
                alive = plan.resident(layer, decoder.capacity, after)
                was = (copies[index][0], copies[index][1])
                rows = key.shape[2]
                alter(Held(index, layer, key, value, was, before, after, rows, alive))
                decoder.cache.write(index, key, value)

        return broken

    return Patch(Decoder, "_advance", wrap)


# -- tables ---------------------------------------------------------------------------------------


def tables(alter: Callable[[Array, RopeSpec], Array]) -> Patch:
    """The decoder makes other cos and sin tables [positions, head_dim / 2]."""

    def wrap(make: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
        def broken(rope: RopeSpec, positions: int, head_dim: int) -> tuple[Array, Array]:
            cos, sin = make(rope, positions, head_dim)
            return np.ascontiguousarray(alter(cos, rope)), np.ascontiguousarray(alter(sin, rope))

        return broken

    return Patch(kvengine.decoder, "rope_tables", wrap)


def other_rope(alter: Callable[[RopeSpec], RopeSpec], user: Any = kvengine.decoder) -> Patch:
    """The module ``user`` makes its tables of another RopeSpec."""
    return Patch(
        user,
        "rope_tables",
        lambda make: lambda rope, positions, head_dim: make(alter(rope), positions, head_dim),
    )


def method(owner: Any, name: str, broken: Callable[..., Any]) -> Patch:
    """``owner.name`` becomes ``broken(original, *arguments)``."""
    return Patch(owner, name, calling(broken))


def calling(broken: Callable[..., Any]) -> Callable[[Any], Any]:
    """A Patch's ``wrap`` of a function that takes the original first."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return broken(original, *arguments, **named)

        return call

    return wrap
