"""The oracle: what the PyTorch model, without a cache, says for a token sequence."""

from harness.reference.actor import (
    RayReference,
    begin_reference,
    offer_reference,
    share_reference,
    start_reference,
)
from harness.reference.cached import CachedReference
from harness.reference.protocol import Reference, ReferenceUnavailable
from harness.reference.transformers_reference import TransformersReference

__all__ = [
    "CachedReference",
    "RayReference",
    "Reference",
    "ReferenceUnavailable",
    "TransformersReference",
    "begin_reference",
    "offer_reference",
    "share_reference",
    "start_reference",
]
