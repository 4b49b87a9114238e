"""Graphs that somebody else exported: read with suspicion, their cache contract inferred, made artifacts."""

from kvengine.export.foreign.adopt import adopt, contradictions, recipe_of, stated_by
from kvengine.export.foreign.inspection import Inspection, Question, inspect_model

__all__ = ["Inspection", "Question", "adopt", "contradictions", "inspect_model", "recipe_of", "stated_by"]
