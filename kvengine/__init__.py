"""The decode engine that runs, as the same source, on the host and on the phone.

Its runtime half imports numpy, onnxruntime and the standard library, nothing else;
``kvengine.export`` (build machine only) adds onnx and safetensors.
"""

import os

# onnxruntime's PyPI wheels report home by default and read this only at import,
# so it must be set before anything of ours can import onnxruntime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
