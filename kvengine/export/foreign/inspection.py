"""Infer a foreign graph's cache contract; what the graph does not say becomes a question, not a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from kvengine.artifact import MANIFEST, MODEL, Artifact
from kvengine.codes import Scales
from kvengine.contract import Contract, LayerContract
from kvengine.errors import ArtifactError, ContractIncomplete, InvalidModel, UnsupportedModel
from kvengine.export.foreign.asking import Asking, check_answers, listed
from kvengine.export.foreign.caches import Caches
from kvengine.export.foreign.genai import GenaiConfig, read_genai_config
from kvengine.export.foreign.inputs import Inputs
from kvengine.export.foreign.reading import ModelFile, read_model
from kvengine.export.foreign.scales import scales_of
from kvengine.export.foreign.wiring import Wiring, attribute
from kvengine.export.genai import GRAPH


@dataclass(frozen=True)
class Question:
    """What has to be said with ``--set KEY=VALUE``, and why the graph does not say it."""

    key: str
    why: str


@dataclass(frozen=True)
class Inspection:
    """What a model file says. ``contract`` is None as long as there are questions.

    found: the layers, those already clear. weights: the coarsest storage among the matrices.
    scales: of each layer's K and V where the cache is quantized, else none.
    """

    file: ModelFile
    contract: Contract | None
    questions: tuple[Question, ...]
    found: tuple[LayerContract | None, ...]
    weights: Literal["float32", "float16", "int8", "int4"]
    scales: tuple[Scales, ...] = ()

    def complete(self) -> Contract:
        """Raises ContractIncomplete, naming every option that is needed."""
        if self.contract is None:
            asked = "\n".join(f"  --set {q.key}=…   {q.why}" for q in self.questions)
            raise ContractIncomplete(
                f"{self.file.path} does not say all that driving it needs (recipes: set.KEY=VALUE):\n{asked}"
            )
        return self.contract


def inspect_model(path: Path, answers: Mapping[str, str] | None = None) -> Inspection:
    """Read ``path`` and infer its contract. ``answers``: see asking.OPTIONS; they win over genai_config.json.

    Raises:
        InvalidModel: the file is damaged or hostile (see read_model).
        UnsupportedModel: a graph of a kind that kvfarm cannot drive, or the main graph of a kvfarm artifact.
        RecipeError: an answer to what nobody asks, or of no meaning.
    """
    _refuse_our_own(path)
    file = read_model(path)
    try:
        return _inspected(file, read_genai_config(path), dict(answers or {}))
    except UnicodeDecodeError as error:  # protobuf decodes strings only when they are looked at
        raise InvalidModel(f"{path}: a name in it is not UTF-8: {error}") from error


def _inspected(file: ModelFile, genai: GenaiConfig | None, answers: dict[str, str]) -> Inspection:
    wiring = Wiring(file.proto.graph)
    check_answers(answers, wiring)
    asking = Asking(file.path, wiring, genai or GenaiConfig(), answers)
    caches = Caches(asking)
    pasts = {one.past.name for one in caches.carried}
    presents = {one.present.name for one in caches.carried}
    inputs = Inputs(asking, caches.layers)
    rest = [value for value in wiring.inputs.values() if value.name not in pasts]
    entries = [entry for entry in map(inputs.entry, rest) if entry is not None]
    logits = inputs.logits([value for value in wiring.outputs.values() if value.name not in presents])
    if not asking.questions and not any(entry.role == "input_ids" for entry in entries):
        raise asking.unsupported(f"sought an input of token ids, found {listed(rest) or 'none'}")
    contract = None
    if not asking.questions and logits is not None:
        width = logits.dims[-1] if logits.dims else None
        contract = Contract(
            convention=_convention(file, genai),
            inputs=tuple(entries),
            layers=tuple(layer for layer in caches.layers if layer is not None),
            logits=logits.name,
            logits_rows="last" if len(logits.dims) == 3 and logits.dims[1] == 1 else "all",
            vocab_size=width if isinstance(width, int) and width > 0 else None,
            batch=caches.batch,
            notes=tuple(asking.notes),
        )
    questions = tuple(Question(key, why) for key, why in asking.questions.items())
    scales = () if contract is None else scales_of(file, contract)
    return Inspection(file, contract, questions, tuple(caches.layers), _weights(file.proto.graph), scales)


def _refuse_our_own(path: Path) -> None:
    """An artifact's model.onnx takes what kvfarm's engine alone feeds; its sister is for everybody."""
    folder = path if path.is_dir() else path.parent
    try:
        manifest = Artifact.open(folder, verify=False).manifest
    except (ArtifactError, OSError):
        return
    theirs = folder / GRAPH
    if manifest.contract is not None or path not in (folder, folder / MODEL, folder / MANIFEST):
        return
    cache = manifest.recipe.cache
    raise UnsupportedModel(
        f"{path} is an artifact of kvfarm's, made of {manifest.checkpoint}, {cache.kind} cache of "
        f"{cache.dtype}: its {MODEL} is fed by kvfarm's own engine alone, and artifact.json says how. The "
        f"same model for any runtime is {theirs}: inspect that, or give it to --onnx"
    )


def _convention(file: ModelFile, genai: GenaiConfig | None) -> str:
    if genai is not None:
        return "onnxruntime-genai (genai_config.json)"
    operators = {node.op_type for node in file.proto.graph.node}
    if "TensorScatter" in operators:
        return "TensorScatter (ONNX opset 24)"
    if "GroupQueryAttention" in operators:
        return "GroupQueryAttention"
    producer = file.proto.producer_name
    return f"decomposed attention, made by {producer!r}" if producer else "decomposed attention"


def _weights(graph: onnx.GraphProto) -> Literal["float32", "float16", "int8", "int4"]:
    blocked = ("MatMulNBits", "GatherBlockQuantized")
    bits = {attribute(node, "bits", 4) for node in graph.node if node.op_type in blocked}
    if bits:
        return "int4" if min(bits) <= 4 else "int8"
    if {node.op_type for node in graph.node} & {"DequantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"}:
        return "int8"
    halves = any(t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) > 1 for t in graph.initializer)
    return "float16" if halves else "float32"
