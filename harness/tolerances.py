"""How far a recipe may be from its float32 reference, and why.

Bands: float32 at 1e-4 on a whole model, as mobius and transformers hold it (mobius L3 tolerances).
float16 rounds 8,192 times coarser than float32 and a model with peaked attention amplifies it, so the
published per-operator 5e-3 becomes 5e-2, held together with a KL divergence. int8 and int4 change the
model on purpose: they are judged by KL divergence and top-1 agreement, since llama.cpp's numbers show
that perplexity hides damage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvengine.recipe import ExportRecipe


@dataclass(frozen=True)
class Tolerance:
    """What "equal" means for one recipe.

    logits: largest absolute logit difference of any row; None where KL and top-1 decide.
    row_kl: largest KL divergence of any single row, nats.
    mean_kl, top1: mean KL divergence (nats) and least share of rows with the reference's argmax,
        over all rows of a check; see ``too_few`` for what a few rows can say of a share.
    same: largest logit difference between two ways through the same engine.
    stored: how far two stored elements of K or V that should be equal may differ beyond their own rounding,
        as a share of the RMS of their row.
    """

    logits: float | None
    row_kl: float
    mean_kl: float
    top1: float
    same: float
    stored: float = 0.0


_FALSE_ALARM = 0.01
# A row whose logits have nothing to do with the reference's is about 1 nat away or more
# (two independent standard normal logit rows: KL = 1). Measured on tiny-gemma3: float32 2e-12 nats,
# float16 cache 2e-7, int8 or int4 weights 0.002, int8 cache 0.001, int4 cache 0.24. Those are means; single
# rows of the int8 cache (23,054 of random prompts): 1 in 1,000 above 0.046, 1 in 10,000 above 0.078, one at
# 0.112, where rounding decides between two keys. So a row may be at 0.3, and the mean holds the rest.
FLOAT32 = Tolerance(logits=1e-4, row_kl=1e-6, mean_kl=1e-7, top1=0.99, same=1e-4)
FLOAT16 = Tolerance(logits=5e-2, row_kl=1e-3, mean_kl=1e-4, top1=0.95, same=5e-2)
INT8 = Tolerance(logits=None, row_kl=0.3, mean_kl=0.02, top1=0.8, same=0.5)
INT4 = Tolerance(logits=None, row_kl=3.0, mean_kl=0.6, top1=0.15, same=1.0)

# Two ways through one engine write the same codes, but for one that float noise meets at a tie: 0.025 at
# most over some 10,000 programs on tiny models. Rounded weights round activations as well, and there it is
# 0.2 with an int8 cache and 0.27 with an int4 cache, so that the bands above are wider.
_SAME_CODES = 0.2
# So rounded they move what is stored, more from layer to layer: at most 0.10 of a row's RMS in V and 0.08 in
# K over the 26 layers of Gemma 3 1B's geometry with int4 weights, one token repeated 2 to 80 times.
_STORED = 0.2


def too_few(hits: int, rows: int, share: float) -> bool:
    """Whether ``hits`` of ``rows`` say that the true share is below ``share``, at 1 % risk of a false alarm.

    Exact one-sided binomial test. Without it a handful of rows fails by chance alone: a share of 80 %
    gives 2 of 3 or fewer every second time.
    """
    if hits >= share * rows:
        return False
    from scipy.stats import binom  # takes a while to import, and is seldom needed

    return bool(binom.cdf(hits, rows, share) < _FALSE_ALARM)


def tolerance_for(recipe: ExportRecipe, rounded_reference: bool = True) -> Tolerance:
    """The band of a recipe: its coarsest arithmetic decides.

    Rounded weights alone do not widen it, for their reference runs on the same rounded weights (see
    harness.reference.rounded). Under int8 and int4 weights MatMulNBits rounds its activations to int8.

    rounded_reference: False where the reference has the checkpoint's own weights, as for a model brought
        as ONNX; its weights' rounding then counts like that of its cache.
    """
    dtypes = {recipe.activations, recipe.cache.dtype, *(() if rounded_reference else (recipe.weights,))}
    band = INT4 if "int4" in dtypes else INT8
    if recipe.weights in ("int8", "int4"):
        return replace(band, stored=_STORED)
    if recipe.cache.dtype in ("int8", "int4"):
        return replace(band, same=_SAME_CODES)
    return FLOAT16 if "float16" in dtypes else FLOAT32
