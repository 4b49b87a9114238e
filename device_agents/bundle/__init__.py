"""The bundle: CPython, its libc, numpy, onnxruntime and our runner as one folder for a device.

Made on the lab host, without root, from pinned Debian packages and PyPI wheels (lock.json):
``build``. A user's own Python in place of ours: ``Bundle.from_runtime``.
"""

from device_agents.bundle.builder import build, built
from device_agents.bundle.lock import Abi
from device_agents.bundle.model import ENTRY, MANIFEST, Bundle, BundleBlob, BundleManifest

__all__ = ["ENTRY", "MANIFEST", "Abi", "Bundle", "BundleBlob", "BundleManifest", "build", "built"]
