"""Catalogue 1-10: windows and masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from harness.mutants import seams
from harness.mutants.mutant import Mutant, Patch
from kvengine.decoder import Decoder
from kvengine.spec import LayerSpec


def _wider(by: int) -> Callable[[LayerSpec], LayerSpec]:
    return lambda layer: replace(layer, window=layer.window + by) if layer.window else layer


def _widen_masks(model: onnx.ModelProto) -> None:
    for node in seams.attention_nodes(model):
        window = seams.window_of(node)
        if window is not None:
            window.i += 1


def _drop_masks(model: onnx.ModelProto) -> None:
    for node in seams.attention_nodes(model):
        seams.drop_window(node)


def _drop_second(model: onnx.ModelProto) -> None:
    seams.drop_window(seams.attention_nodes(model)[1])


def _window_everywhere(model: onnx.ModelProto) -> None:
    """The global layer gets the mask of the first layer."""
    nodes = seams.attention_nodes(model)
    for node in nodes:
        if seams.window_of(node) is None:
            node.attribute.append(seams.window_of(nodes[0]))


def _window_of_layer_0(seen: seams.Fed) -> int:
    window = seen.decoder.model.spec.layers[0].window
    assert window is not None
    return window


def _length_capped(seen: seams.Fed) -> None:
    """The length is read off layer 0, which never holds more than a window."""
    seen.say(max(seen.count, min(seen.before[0], _window_of_layer_0(seen)) + seen.count))


def _length_padded(seen: seams.Fed) -> None:
    """The mask covers a whole window before there are as many tokens: zero rows are attended."""
    total = seen.before[0] + seen.count
    seen.say(max(total, min(_window_of_layer_0(seen), seen.decoder.capacity)))


def _early_roll(held: seams.Held) -> None:
    """The window rolls when it has just become full, and so loses a token that the next step needs."""
    if held.after == held.spec.window and held.before < held.after:
        for now, _ in held.parts:
            now[:, :, : held.after - 1] = now[:, :, 1 : held.after].copy()


def _without_windows(decoder: Decoder) -> Any:
    """A second session of the same artifact, its graph without windows; made once a model."""
    sessions: dict[str, Any] = decoder.model.__dict__.setdefault("mutant_sessions", {})
    if not sessions:
        path = Path(decoder.model.artifact.model_path)
        model = onnx.load(str(path), load_external_data=False)
        _drop_masks(model)
        other = path.with_name("without_windows.onnx")
        other.write_bytes(model.SerializeToString())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        sessions["without"] = ort.InferenceSession(str(other), options)
    return sessions["without"]


@contextlib.contextmanager
def _other_kernel(decoder: Decoder) -> Iterator[None]:
    """Inside, the decoder's steps run in the session without windows."""
    right = decoder.model.session, decoder._general, decoder._feedback
    decoder.model.session = _without_windows(decoder)
    bindings = decoder.__dict__.setdefault("mutant_bindings", [])
    if not bindings:
        feedback = [decoder._make_feedback_binding(source) for source in range(2)]
        bindings += [decoder._make_binding(), feedback]
    decoder._general, decoder._feedback = bindings
    try:
        yield
    finally:
        decoder.model.session, decoder._general, decoder._feedback = right


def _kernel_by_width(when: Callable[[int], bool]) -> tuple[Patch, Patch]:
    """Steps of some widths go through a graph without windows, as through a kernel of their own."""

    def run(right: Callable[..., Any], decoder: Decoder, ids: Any, *rest: Any, **named: Any) -> Any:
        with _other_kernel(decoder) if when(ids.shape[1]) else contextlib.nullcontext():
            return right(decoder, ids, *rest, **named)

    def step(right: Callable[..., Any], decoder: Decoder, *arguments: Any) -> Any:
        with _other_kernel(decoder) if when(1) else contextlib.nullcontext():
            return right(decoder, *arguments)

    return seams.method(Decoder, "_run", run), seams.method(Decoder, "step", step)


def _empty_softmax(
    run: Callable[..., Any], decoder: Decoder, ids: Any, rows: Any, *rest: Any, **named: Any
) -> Any:
    """In a chunk longer than the window, rows past the first window have all keys masked: 0 / 0."""
    logits = run(decoder, ids, rows, *rest, **named)
    window = decoder.model.spec.layers[0].window
    if window and len(logits) and ids.shape[1] > window:
        logits = logits.copy()
        logits[np.asarray(rows) % ids.shape[1] >= window] = np.nan
    return logits


MUTANTS = (
    Mutant(
        "window one too wide",
        1,
        "ORT#25927",
        "a window of W sees W keys besides the current token",
        (seams.layers(_wider(1)),),
    ),
    Mutant(
        "window one too narrow",
        1,
        "ORT#25927, the other way",
        "a window of W sees W - 2 keys besides the current token",
        (seams.layers(_wider(-1)),),
    ),
    Mutant(
        "window one too wide under int4",
        1,
        "ORT#25927",
        "as above, where an int4 cache hides it from the logits",
        (seams.layers(_wider(1)),),
        recipe="hybrid-int4kv,slack=2",
    ),
    Mutant(
        "inclusive window tuple",
        2,
        "HF#39408, mlx#390, Megatron-Bridge#2656",
        "the operator is told W where it counts W + 1 keys",
        (seams.graph(_widen_masks),),
        recipe="static",
        model="w2",
    ),
    Mutant(
        "inclusive window tuple under int4",
        2,
        "HF#39408, mlx#390, Megatron-Bridge#2656",
        "as above, where an int4 cache hides it from the logits",
        (seams.graph(_widen_masks),),
        recipe="static,cache-dtype=int4",
        model="w5",
    ),
    Mutant(
        "roll when the window is full",
        3,
        "HF#37574",
        "the window rolls at W tokens, not at W + 1",
        (seams.after_step(_early_roll),),
        model="w4",
    ),
    Mutant(
        "length of local layer 0",
        4,
        "HF#38156",
        "the number of cached tokens is read off layer 0, capped at W",
        (seams.fed(_length_capped),),
        model="w3",
    ),
    Mutant(
        "mask length W before the window is full",
        5,
        "HF#45940",
        "zero rows up to W are attended",
        (seams.fed(_length_padded),),
        recipe="static",
    ),
    Mutant(
        "global layer masked like layer 0",
        6,
        "HF#48482",
        "the mask of layer 0 is used in every layer",
        (seams.graph(_window_everywhere),),
    ),
    Mutant(
        "second local layer unmasked",
        6,
        "HF#48482, the other way",
        "one local layer gets the global layer's mask",
        (seams.graph(_drop_second),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "window attribute dropped",
        7,
        "mobius#371, openvino#37207",
        "no layer of the graph has a window",
        (seams.graph(_drop_masks),),
        recipe="static",
        model="w4",
    ),
    Mutant(
        "window attribute dropped, growing",
        7,
        "mobius#371, openvino#37207",
        "no layer of the graph has a window, with a growing cache",
        (seams.graph(_drop_masks),),
        recipe="naive",
        model="w2",
    ),
    Mutant(
        "single-token kernel without window",
        8,
        "VeloxQuant-MLX#463",
        "steps of one token run a graph without windows",
        _kernel_by_width(lambda width: width == 1),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "chunk longer than the window",
        9,
        "mlxcel#418",
        "rows past the first window of a chunk come out as NaN",
        (seams.method(Decoder, "_run", _empty_softmax),),
        model="w4",
    ),
    Mutant(
        "chunks see the whole cache",
        12,
        "ET#21857, ET#22285",
        "steps of several tokens run a graph without windows",
        _kernel_by_width(lambda width: width > 1),
        recipe="static",
        model="w4",
    ),
)
