"""A model that the exporter does not know is refused by what sets it apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, Olmo2Config, Olmo2ForCausalLM

from harness.presets import PRESETS, tensors
from harness.synth import synth
from kvengine.errors import CheckpointError, UnsupportedModel
from kvengine.export import export, load_spec
from kvengine.export.config import read_architecture
from kvengine.export.families import FAMILIES
from kvengine.export.unknown import _tensors_of, _without_number
from kvengine.recipe import ExportRecipe
from tests.kvengine.export_support import read_config, variant

QWEN = "tiny-qwen3"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(QWEN, tmp_path_factory.mktemp("unknown") / QWEN)


def test_the_nearest_family_and_what_differs_are_named(qwen: Path, tmp_path: Path) -> None:
    """As Cohere's: other keys, another norm layout, biases in the norms."""
    config = read_config(qwen) | {"model_type": "command", "logit_scale": 0.06, "layer_norm_eps": 1e-5}

    def change(weights: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in weights.items() if "post_attention" not in name}
        return kept | {"model.norm.bias": np.zeros(64, np.float32)}

    folder = variant(qwen, tmp_path / "m", config=config, tensors=change)
    with pytest.raises(UnsupportedModel) as refusal:
        read_architecture(folder)
    said = str(refusal.value)
    assert "'command'" in said
    assert "Nearest is qwen3" in said
    assert "config keys unknown there: layer_norm_eps, logit_scale" in said
    assert "tensors unknown there: model.norm.bias" in said
    assert "tensors missing: model.layers.N.post_attention_layernorm.weight" in said


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
def test_a_renamed_family_is_nearest_to_itself(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    folder = synth(name, tmp_path / name)
    renamed = variant(folder, tmp_path / "m", config=preset.config | {"model_type": "renamed"})
    nearest = preset.config["model_type"]
    # By their tensors these two are one.
    also = {"llama": "llama|mistral|smollm3", "mistral": "mistral", "smollm3": "smollm3"}.get(
        nearest, nearest
    )
    with pytest.raises(UnsupportedModel, match=rf"Nearest is ({also}); what differs: nothing but its name"):
        read_architecture(renamed)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("whole", [True, False], ids=["every key", "as saved"])
def test_what_transformers_writes_of_a_family_is_no_difference(
    family: str, whole: bool, tmp_path: Path
) -> None:
    """Keys of every model, and switches that are off."""
    theirs = AutoConfig.for_model(family)
    theirs.save_pretrained(tmp_path)
    config = theirs.to_dict() if whole else json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UnsupportedModel) as refusal:
        load_spec(config | {"model_type": "olmo2"})
    assert str(refusal.value).endswith("what differs: nothing but its name, as far as keys and tensors tell")


def test_what_really_differs_is_told_and_no_more(tmp_path: Path) -> None:
    """OLMo 2 norms after the blocks, not before, and nothing else here is unlike Qwen 3."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    Olmo2ForCausalLM(Olmo2Config(**shape, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as refusal:
        read_architecture(tmp_path)
    assert str(refusal.value).endswith(
        "Nearest is qwen3; what differs: tensors unknown there: "
        "model.layers.N.post_feedforward_layernorm.weight; tensors missing: "
        "model.layers.N.input_layernorm.weight"
    )


def test_the_tensor_names_of_each_family_are_those_of_its_preset() -> None:
    for preset in PRESETS.values():
        found = {_without_number(tensor.name) for tensor in tensors(preset)} - {"lm_head.weight"}
        assert found == _tensors_of(FAMILIES[preset.config["model_type"]]), preset.name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba", "hidden_size": 64, "state_size": 16}, "unknown there: state_size"),
        ({"model_type": "bert"}, "none of a decoder's keys"),
        ({}, "model_type None"),
        ({"model_type": ["llama"], "hidden_size": 8}, "Nearest is"),
        ({"model_type": "x", "hidden_size": 1} | {f"key{i}": 1 for i in range(30)}, "and 22 more"),
    ],
)
def test_a_config_alone_is_enough_for_a_clear_refusal(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        load_spec(config)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.1.mlp.router.weight"])
def test_a_tensor_that_the_family_does_not_have_is_not_dropped(qwen: Path, tmp_path: Path, name: str) -> None:
    folder = variant(qwen, tmp_path / "m", tensors=lambda w: w | {name: np.ones(8, np.float32)})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        export(folder, tmp_path / "a", ExportRecipe())


def test_what_follows_from_the_config_may_be_stored(qwen: Path, tmp_path: Path) -> None:
    stored = {"model.rotary_emb.inv_freq": np.ones(16, np.float32)}
    folder = variant(qwen, tmp_path / "m", tensors=lambda w: w | stored)
    export(folder, tmp_path / "a", ExportRecipe())
