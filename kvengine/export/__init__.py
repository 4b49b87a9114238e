"""Hugging Face checkpoints to ONNX artifacts (build machine only: needs onnx and safetensors)."""

from kvengine.export.api import export
from kvengine.export.config import load_spec

__all__ = ["export", "load_spec"]
