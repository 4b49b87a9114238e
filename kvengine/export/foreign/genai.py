"""genai_config.json beside a model: what onnxruntime-genai's builder says about its names and cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvengine.errors import InvalidModel

CONFIG = "genai_config.json"
_MAX_BYTES = 1 << 20

# Keys of decoder.inputs whose meaning is a role of ours.
ROLES = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_sequence_length": "past_length",
    "total_sequence_length": "total_length",
    "current_sequence_length": "new_lengths",
}


@dataclass(frozen=True)
class GenaiConfig:
    """The part of it that concerns the cache. templates: tensor names with ``%d`` for the layer.

    shared: search.past_present_share_buffer, None where it is not said.
    """

    roles: dict[str, str] = field(default_factory=dict)  # input name -> role
    templates: dict[str, str] = field(
        default_factory=dict
    )  # past_key, past_value, present_key, present_value
    logits: str | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    shared: bool | None = None


def read_genai_config(model: Path) -> GenaiConfig | None:
    """The one beside ``model`` that names it as its decoder, or None.

    Raises:
        InvalidModel: it is there and is not such a file.
    """
    path = model.parent / CONFIG
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidModel(f"{path}: sought at most {_MAX_BYTES:,} bytes, found {path.stat().st_size:,}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} is not JSON: {error}") from error
    decoder = _object(path, _object(path, config, "model"), "decoder")
    if decoder.get("filename", model.name) != model.name:
        return None
    inputs, outputs = _object(path, decoder, "inputs"), _object(path, decoder, "outputs")
    names = {
        f"{side}_{part}": source.get(f"{side}_{part}_names")
        for side, source in (("past", inputs), ("present", outputs))
        for part in ("key", "value")
    }
    for key, name in names.items():
        if name is not None and (not isinstance(name, str) or name.count("%d") != 1):
            raise InvalidModel(f"{path}: {key}_names: sought one name with %d for the layer, found {name!r}")
    search = config.get("search")
    shared = search.get("past_present_share_buffer") if isinstance(search, dict) else None
    return GenaiConfig(
        roles={str(inputs[key]): role for key, role in ROLES.items() if isinstance(inputs.get(key), str)},
        templates={key: name for key, name in names.items() if isinstance(name, str)},
        logits=outputs["logits"] if isinstance(outputs.get("logits"), str) else None,
        head_dim=_count(path, decoder, "head_size"),
        kv_heads=_count(path, decoder, "num_key_value_heads"),
        shared=shared if isinstance(shared, bool) else None,
    )


def _object(path: Path, value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise InvalidModel(f"{path}: sought an object {key!r}, found {found!r:.80}")
    return found


def _count(path: Path, decoder: dict[str, Any], key: str) -> int | None:
    value = decoder.get(key)
    if value is not None and (type(value) is not int or not 0 < value < 1 << 20):
        raise InvalidModel(f"{path}: {key}: sought a positive number, found {value!r:.80}")
    return value
