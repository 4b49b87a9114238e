"""The other side: onnxruntime-genai, installed and built with its own tools and defaults.

It goes into a folder of its own that only the processes running it put on ``sys.path``, so that the
project's environment, with its pinned onnxruntime, stays as it is. ``--no-deps`` keeps pip from
resolving torch anew: everything else that the package and its builder need is there already.

    python -m bench.baseline PACKAGES CHECKPOINT OUTPUT [KEY=VALUE ...]    builds one model
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.errors import BenchError

# onnx-ir: what genai's model builder is written with.
PACKAGES = ("onnxruntime-genai==0.18.*", "onnx-ir==1.1.*")
_INSTALL_SECONDS = 300
_BUILD_SECONDS = 900
_DONE = "genai_config.json"  # the builder's last file


def install(folder: Path) -> Path:
    """onnxruntime-genai and its builder under ``folder``, installed if they are not there.

    Raises:
        BenchError: pip failed; the message has its last lines.
    """
    key = folder / "installed.json"
    wanted = json.dumps([*PACKAGES, sys.version])
    if key.is_file() and key.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(folder), *PACKAGES]
    _run(command, folder.with_suffix(".log"), _INSTALL_SECONDS, "installing onnxruntime-genai")
    key.write_text(wanted)
    return folder


def build(packages: Path, checkpoint: Path, folder: Path, options: dict[str, str]) -> Path:
    """genai's int4 CPU model of ``checkpoint`` in ``folder``, built if it is not there whole.

    Raises:
        BenchError: the builder failed; the message has its last lines.
    """
    key = folder / "built.json"
    wanted = _identity(checkpoint, options)
    if key.is_file() and key.read_text() == wanted and (folder / _DONE).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.baseline", str(packages), str(checkpoint), str(folder)]
    command += [f"{name}={value}" for name, value in options.items()]
    _run(command, folder.with_suffix(".log"), _BUILD_SECONDS, f"building {folder.name}")
    key.write_text(wanted)
    return folder


def _identity(checkpoint: Path, options: dict[str, str]) -> str:
    """Changes with the packages, the checkpoint's files (by size and time), the options and our own part."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(checkpoint.glob("*"))
    ]
    ours = inspect.getsource(_build_here) + inspect.getsource(flatten_rope)
    return json.dumps([PACKAGES, files, options, ours])


def _run(command: list[str], log: Path, seconds: float, what: str) -> None:
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{what}: not done within {seconds:g} s; its output is in {log}") from None
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise BenchError(f"{what} failed with exit code {done.returncode}; the end of {log}:\n{tail}")


def _build_here(packages: Path, checkpoint: Path, folder: Path, options: dict[str, Any]) -> None:
    """What genai's command line does for ``-p int4 -e cpu``, with the config it should have read.

    Two things its 0.18 cannot do under transformers 5 with a checkpoint of weights alone:
    - Gemma 3's RoPE parameters are nested by layer type there, and the builder looks for one flat
      ``rope_parameters`` plus ``rope_local_base_freq``, the spelling of transformers 4. Writing that
      spelling into config.json does not help, since transformers 5 nests it on reading. So the
      config object is flattened after it is read.
    - A tokenizer is read and copied. Neither side of this bench uses one.
    """
    sys.path.insert(0, str(packages))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig

    builder = importlib.import_module("onnxruntime_genai.models.builder")
    # genai's package puts its own folder on sys.path; its modules are top-level there.
    importlib.import_module("builders.base").Model.save_processing = lambda *_: None
    config = AutoConfig.from_pretrained(str(checkpoint))
    flatten_rope(config)
    details = {"extra_kwargs": {}, "hf_name": str(checkpoint), "hf_config": config}
    scratch = folder / "scratch"
    builder.create_model(
        "", str(checkpoint), str(folder), "int4", "cpu", str(scratch), hf_details=details, **options
    )
    shutil.rmtree(scratch, ignore_errors=True)


def flatten_rope(config: Any) -> None:
    """Gemma 3's nested ``rope_parameters`` in place to what genai's builder reads."""
    nested = config.rope_parameters
    config.rope_theta = nested["full_attention"]["rope_theta"]
    config.rope_local_base_freq = nested["sliding_attention"]["rope_theta"]
    config.rope_parameters = nested["full_attention"]


def version(packages: Path) -> str:
    """The installed onnxruntime-genai."""
    found = importlib.metadata.distributions(path=[str(packages)], name="onnxruntime-genai")
    return next(iter(found)).version


if __name__ == "__main__":
    _packages, _checkpoint, _folder, *_pairs = sys.argv[1:]
    _options: dict[str, Any] = dict(pair.split("=", 1) for pair in _pairs)
    # The builder's own command line turns these words into booleans.
    _options = {name: {"true": True, "false": False}.get(value, value) for name, value in _options.items()}
    _build_here(Path(_packages), Path(_checkpoint), Path(_folder), _options)
