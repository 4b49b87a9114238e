"""Graphs that somebody else exported: read with suspicion, their cache contract inferred, made artifacts."""

from kvengine.export.foreign.adopt import adopt
from kvengine.export.foreign.inspection import Inspection, Question, inspect_model

__all__ = ["Inspection", "Question", "adopt", "inspect_model"]
