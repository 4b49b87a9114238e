"""Programs that look at one thing inside a cache, and what must be seen there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from harness.compare import CheckFailed
from harness.programs import Limits, fitting, slacks, token_lists
from harness.reference.protocol import KeysAndValues
from harness.tolerances import Tolerance
from kvengine.plan import BITS, CachePlan
from kvengine.program import CacheRows, Decode, Observation, Operation, Prefill, Program, ReadCache
from kvengine.recipe import ExportRecipe
from kvengine.rope import inverse_frequencies
from kvengine.spec import LayerSpec, ModelSpec

Float32Array = npt.NDArray[np.float32]
# Float noise of K and V in layer 0, by the same sums in another order: measured 3e-6 where they reach 6.
_NOISE = 2e-5


def reading_back(program: Program, spec: ModelSpec) -> Program:
    """``program``, and then every layer's cache read."""
    reads = tuple(ReadCache(layer) for layer in range(len(spec.layers)))
    return replace(program, operations=(*program.operations, *reads))


def caches(program: Program, observations: Sequence[Observation]) -> list[CacheRows]:
    """What the program's ReadCache operations gave; raises CheckFailed where one gave nothing."""
    found = []
    for index, (operation, seen) in enumerate(zip(program.operations, observations, strict=True)):
        if seen.error is not None:
            raise CheckFailed(f"operation {index} was refused: {seen.error.message}", program)
        if isinstance(operation, ReadCache):
            if seen.cache is None:
                raise CheckFailed(f"operation {index} read no cache", program)
            found.append(seen.cache)
    return found


# -- P3: which positions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What the rows of each layer must be, for one cache plan."""

    plan: CachePlan
    spec: ModelSpec
    tolerance: Tolerance

    def check(self, program: Program, found: Sequence[CacheRows], reference: Sequence[KeysAndValues]) -> None:
        """Raises CheckFailed unless every layer's rows are the newest positions, each where it should be."""
        slack = self.plan.slack if program.slack is None else program.slack
        for index, (layer, rows, true) in enumerate(zip(self.spec.layers, found, reference, strict=True)):
            self._check_positions(program, index, layer, rows.positions, true[0].shape[1], slack)
            for name, got, scale, sought in (
                ("K", rows.key, rows.key_scale, true[0]),
                ("V", rows.value, rows.value_scale, true[1]),
            ):
                self._check_rows(program, f"layer {index}: {name}", rows.positions, got, scale, sought)

    def _check_positions(
        self,
        program: Program,
        index: int,
        layer: LayerSpec,
        positions: npt.NDArray[np.int64],
        total: int,
        slack: int,
    ) -> None:
        count = len(positions)
        if not np.array_equal(positions, np.arange(total - count, total)):
            raise CheckFailed(
                f"layer {index}: sought the newest of {total} positions in order, found {positions}", program
            )
        least = most = total
        if self.plan.is_windowed(layer):
            assert layer.window is not None
            least, most = min(total, layer.window), min(total, layer.window + slack)
        if not least <= count <= most:
            raise CheckFailed(f"layer {index}: sought {least} to {most} rows, found {count}", program)

    def _check_rows(
        self,
        program: Program,
        what: str,
        positions: npt.NDArray[np.int64],
        got: Float32Array,
        scale: Float32Array,
        sought: Float32Array,
    ) -> None:
        """Each row [kv_heads, head_dim] is nearest to the position it stands for, up to rounding."""
        away = np.linalg.norm(got[:, :, None] - sought[:, None], axis=(0, 3))  # [rows, positions]
        own = away[np.arange(len(positions)), positions]
        # How far a right row may be off: rounding of the cache, and of the weights below it.
        room = 1e-3 if self.plan.dtype == "float32" else 0.05
        if self.plan.dtype in ("int8", "int4"):
            room = 2 * float(np.linalg.norm(scale))
        if self.tolerance.logits is None:
            room += 0.3 * float(np.linalg.norm(sought, axis=(0, 2)).max())
        for row, position in enumerate(positions):
            nearest = int(away[row].argmin())
            if not own[row] <= away[row, nearest] + room:
                raise CheckFailed(
                    f"{what} row {row} should be position {position} and is nearest to {nearest}", program
                )
        limit = self.tolerance.logits
        if limit is not None and not np.abs(got - sought[:, positions]).max() <= 10 * limit:
            raise CheckFailed(f"{what} is further than {10 * limit:g} from the reference's", program)


# -- P4: where a window ends ----------------------------------------------------------------------


@dataclass(frozen=True)
class Perturbed:
    """One program, and the same with one token changed outside a window or on its inner edge.

    layer: whose newest cache row tells; None where the logits do.
    """

    base: Program
    outside: Program | None
    inside: Program | None
    layer: int | None

    def seen(self, observations: Sequence[Observation]) -> bytes:
        """Every bit that tells of the newest position."""
        if self.layer is None:
            return observations[-1].logits[-1:].tobytes()
        (rows,) = caches(self.base, observations)
        return rows.key_codes[:, -1].tobytes() + rows.value_codes[:, -1].tobytes()


def reaches(spec: ModelSpec) -> list[int]:
    """How far back what enters layer 1, 2, ... depends on tokens, as long as only windows lie below.

    A window of W reaches W - 1 back; windows one on the other add up.
    """
    found: list[int] = []
    for layer in spec.layers:
        if layer.window is None:
            break
        found.append(layer.window - 1 + (found[-1] if found else 0))
    return found


@st.composite
def perturbed(draw: st.DrawFn, limits: Limits, spec: ModelSpec) -> Perturbed:
    """Sequences longer than a window's reach; of a model without one, any position matters."""
    reach = [r for r in reaches(spec) if r + 2 <= limits.longest]
    depth = draw(st.integers(1, len(reach))) if reach else 0
    least = reach[depth - 1] + 2 if reach else 2
    tokens = draw(token_lists(limits, limits.longest, least=least))
    last = len(tokens) - 1
    outside = last - reach[depth - 1] - 1 if reach else None
    inside = last - reach[0] if depth == 1 else (draw(st.integers(0, last)) if not reach else None)
    one_by_one = draw(st.integers(0, len(tokens) - 1))
    chunk = draw(st.integers(0, len(tokens) - one_by_one))
    spare, slack = draw(st.integers(0, 3)), draw(slacks(limits))
    other = draw(st.integers(1, limits.vocab_size - 1))
    layer = depth if 0 < depth < len(spec.layers) else None

    def program(changed: int | None) -> Program:
        own = list(tokens)
        if changed is not None:
            own[changed] = (own[changed] + other) % limits.vocab_size
        split = len(own) - one_by_one
        operations: list[Operation] = [Prefill(tuple(own[:split]), chunk)]
        operations += [Decode(tuple(own[split:]))] if one_by_one else []
        operations += [ReadCache(layer)] if layer is not None else []
        return fitting(tuple(operations), spare, slack)

    return Perturbed(
        base=program(None),
        outside=None if outside is None else program(outside),
        inside=None if inside is None else program(inside),
        layer=layer,
    )


# -- P6: positions and rotation -------------------------------------------------------------------


@st.composite
def repeated(draw: st.DrawFn, limits: Limits) -> Program:
    """One token over and over, in chunks of any size."""
    token = draw(st.integers(0, limits.vocab_size - 1))
    count = draw(st.integers(2, limits.longest))
    operations: list[Operation] = []
    while count:
        part = draw(st.integers(1, count))
        chunk = draw(st.integers(0, part))
        operations.append(Prefill((token,) * part, chunk) if draw(st.booleans()) else Decode((token,) * part))
        count -= part
    return fitting(tuple(operations), draw(st.integers(0, 3)), draw(slacks(limits)))


def check_repeated(
    program: Program, observations: Sequence[Observation], spec: ModelSpec, tolerance: Tolerance
) -> None:
    """Raises CheckFailed where logits, V or unrotated K of a ``repeated`` program depend on the position."""
    found = caches(program, observations)
    rows = np.concatenate([seen.logits for seen in observations])
    error = float(np.abs(rows - rows[0]).max())
    if not error <= tolerance.same:
        raise CheckFailed(f"the logits of one repeated token differ by {error:.3g}", program)
    for index, (layer, cache) in enumerate(zip(spec.layers, found, strict=True)):
        value_room = _room(cache.value_scale, cache.value_codes, cache.value[:, 0], tolerance)
        key_room = _room(cache.key_scale, cache.key_codes, cache.key[:, 0], tolerance)
        clipped = _clipped(cache.value_codes)
        off = np.abs(cache.value - cache.value[:, :1]) > value_room[:, None]
        if (off & ~clipped).any() or np.isnan(cache.value).any():
            raise CheckFailed(f"layer {index}: V of one repeated token depends on its position", program)
        turns = (cache.positions - cache.positions[0])[:, None] * frequencies(spec, layer)
        sought = _rotate(cache.key[:, 0], turns)
        # Rotation mixes the rounding of a channel with that of its partner.
        partner = _partner(layer.head_dim, turns.shape[1])
        mixed = key_room + key_room[:, partner]
        clipped = _clipped(cache.key_codes)
        clipped |= clipped[:, :1]
        clipped |= clipped[:, :, partner]
        if ((np.abs(cache.key - sought) > mixed[:, None]) & ~clipped).any() or np.isnan(cache.key).any():
            raise CheckFailed(f"layer {index}: K of one repeated token does not turn by its RoPE", program)


def frequencies(spec: ModelSpec, layer: LayerSpec) -> npt.NDArray[np.float64]:
    """Radians per position of each channel pair of a layer that rotates, float64 [rotary_dim / 2].

    By theta (arXiv 2104.09864, section 3.2.2); scaled RoPE is kvengine's, whose own tests hold it
    against transformers. None for a layer without RoPE.
    """
    if layer.rope is None:
        return np.zeros(0)
    rope = spec.ropes[layer.rope]
    width = rope.rotary_dim or layer.head_dim
    if rope.scaling is not None:
        return inverse_frequencies(rope, layer.head_dim).astype(np.float64)
    return rope.theta ** (-2 * np.arange(width // 2) / width) / rope.factor


def _rotate(key: Float32Array, turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[kv_heads, head_dim] turned by [rows, r] radians: [kv_heads, rows, head_dim].

    Channel j < r turns with channel j + r; channels from 2 r on stay.
    """
    r = turns.shape[1]
    whole = np.repeat(key[:, None].astype(np.float64), len(turns), axis=1)
    first, second = whole[..., :r], whole[..., r : 2 * r]
    cos, sin = np.cos(turns), np.sin(turns)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin, whole[..., 2 * r :]], axis=2
    )


def _partner(width: int, r: int) -> npt.NDArray[np.int64]:
    """Of each of ``width`` channels the one that it turns with; itself where it does not turn."""
    partner: npt.NDArray[np.int64] = np.r_[r : 2 * r, :r, 2 * r : width]
    return partner


def _room(
    scale: Float32Array, codes: npt.NDArray[np.generic], row: Float32Array, tolerance: Tolerance
) -> Float32Array:
    """How far two stored elements that should be equal to ``row`` may differ, all [kv_heads, head_dim]."""
    noise = tolerance.stored * np.sqrt(np.mean(row**2, axis=1, keepdims=True))
    # Codes: both were rounded.
    own = 1.1 * scale if codes.dtype.kind != "f" else np.full(scale.shape, 10 * (tolerance.logits or 1e-2))
    room: Float32Array = np.asarray(own + noise, np.float32)
    return room


def _clipped(stored: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Elements whose codes are the last there are, so that what they stood for is unknown."""
    if stored.dtype.kind == "f":
        return np.zeros(stored.shape, bool)
    most = 127 if stored.dtype == np.int8 else 7
    clipped: npt.NDArray[np.bool_] = np.abs(_codes(stored)) >= most
    return clipped


# -- P13: codes -----------------------------------------------------------------------------------


def check_same_codes(
    program: Program, one: Sequence[CacheRows], other: Sequence[CacheRows], recipe: ExportRecipe
) -> None:
    """The same codes whatever the chunking.

    Where float noise meets a tie a code may be one step off, and seldom (rounded weights round activations
    too, which flips more: 1.6 % seen on tiny-phi3); a layer above it sees other inputs from there on, and
    may be off a little more.
    """
    most, share = 1, 0.05 if recipe.weights in ("int8", "int4") else 0.01
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        count = min(len(a.positions), len(b.positions))
        flipped = False
        for name, left, right in (("K", a.key_codes, b.key_codes), ("V", a.value_codes, b.value_codes)):
            steps = np.abs(_codes(left)[:, -count:] - _codes(right)[:, -count:])
            if steps.max() > most or (steps > 0).mean() > share:
                raise CheckFailed(
                    f"layer {index}: {name} codes depend on the chunking: {(steps > 0).mean():.1%} differ, "
                    f"by up to {steps.max()}",
                    program,
                )
            flipped = flipped or bool(steps.any())
        if flipped:
            most, share = 4, 0.25


def check_codes(program: Program, rows: CacheRows, reference: KeysAndValues, recipe: ExportRecipe) -> None:
    """Layer 0's elements are within half a scale of the reference's, few are clipped, scales are used."""
    if recipe.weights in ("int8", "int4"):
        return  # MatMulNBits rounds activations, so K and V are not the reference's to begin with
    most = 1 << (BITS[recipe.cache.dtype] - 1)
    for name, got, codes, scale, true in (
        ("K", rows.key, rows.key_codes, rows.key_scale, reference[0]),
        ("V", rows.value, rows.value_codes, rows.value_scale, reference[1]),
    ):
        sought = true[:, rows.positions]
        low, high = -most * scale[:, None], (most - 1) * scale[:, None]
        off = np.abs(got - np.clip(sought, low, high)) - scale[:, None] / 2
        clipped = float(((sought < low - scale[:, None]) | (sought > high + scale[:, None])).mean())
        if not (off <= _NOISE).all():
            raise CheckFailed(
                f"layer 0: {name} is off by more than half a scale, by {off.max():.3g}", program
            )
        if clipped > 0.05:
            raise CheckFailed(f"layer 0: {clipped:.0%} of {name} is outside what its codes reach", program)
        if np.abs(_codes(codes)).max() < most // 4:
            raise CheckFailed(f"layer 0: {name} uses less than a quarter of its codes", program)


def _codes(stored: npt.NDArray[np.generic]) -> npt.NDArray[np.int16]:
    """Signed codes [kv_heads, rows, head_dim]; int4 comes two in a byte, plus 8."""
    if stored.dtype != np.uint8:
        return stored.astype(np.int16)
    nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], 2 * stored.shape[-1])  # type: ignore[operator]
    return nibbles.astype(np.int16) - 8


# -- P14: heads -----------------------------------------------------------------------------------


def check_heads(program: Program, found: Sequence[CacheRows], reference: Sequence[KeysAndValues]) -> None:
    """Each KV head's rows are nearer to the reference's same head than to any other of the layer."""
    for index, (rows, true) in enumerate(zip(found, reference, strict=True)):
        for name, got, sought in (("K", rows.key, true[0]), ("V", rows.value, true[1])):
            away = np.linalg.norm(got[:, None] - sought[None][:, :, rows.positions], axis=(2, 3))
            for head, nearest in enumerate(away.argmin(axis=1)):
                if head != nearest:
                    raise CheckFailed(
                        f"layer {index}: {name} of KV head {head} is nearest to that of head {nearest}",
                        program,
                    )
