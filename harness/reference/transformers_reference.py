"""transformers' own model in PyTorch: float32, eager attention, no KV cache.

Every call runs the whole sequence from its first token, so nothing that a cache can get wrong
is in it. Attention is causal: one forward pass gives the logits of every step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from harness.reference.protocol import Float32Array, Hidden, KeysAndValues, ReferenceUnavailable
from kvengine.export.weights import Checkpoint


class TransformersReference:
    """Gemma3ForCausalLM, or any other decoder that AutoModelForCausalLM loads from a local folder.

    Of a composite model (``gemma3``: Gemma3ForConditionalGeneration) the text path is used.
    Holds the model in float32: 4 bytes per weight. torch is imported here, at construction.
    """

    def __init__(self, checkpoint: str | Path, *, threads: int = 1) -> None:
        """threads: torch's, for the whole process.

        Raises:
            ReferenceUnavailable: torch or transformers is not installed, or they refuse the checkpoint.
            CheckpointError: the folder has no complete set of safetensors.
        """
        folder = Path(checkpoint)
        self._torch, transformers = libraries()
        self._transformers = transformers
        self._torch.set_num_threads(threads)
        with Checkpoint(folder) as tensors:
            sha256 = tensors.sha256()
        self._model = _load(self._torch, transformers, folder)
        self._vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        self.identity = (
            f"{sha256} transformers {transformers.__version__} torch {self._torch.__version__} float32"
        )

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...] = ()) -> Float32Array:
        self._check(tokens)
        inputs = self._inputs(tokens)
        if hidden:
            inputs["attention_mask"] = self._masks(len(tokens), hidden)
        with self._torch.no_grad():
            output = self._model(**inputs, use_cache=False)
        rows: Float32Array = np.ascontiguousarray(output.logits[0].numpy())
        rows.setflags(write=False)
        return rows

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        """K and V of each layer, as the one forward pass over all ``tokens`` computes them."""
        self._check(tokens)
        # Without a config it is the plain kind: every layer keeps every position, windows or not.
        computed = self._transformers.DynamicCache()
        with self._torch.no_grad():
            self._model(**self._inputs(tokens), past_key_values=computed, use_cache=True)
        return tuple((layer.keys[0].numpy(), layer.values[0].numpy()) for layer in computed.layers)

    def greedy(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The ``count`` tokens that transformers' ``generate`` appends, without a cache, never ending early.

        Raises ValueError as ``logits`` does.
        """
        self._check(tokens)
        with self._torch.no_grad():
            output = self._model.generate(
                **self._inputs(tokens), max_new_tokens=count, do_sample=False, use_cache=False
            )
        chosen = tuple(int(token) for token in output[0, len(tokens) :])
        if len(chosen) != count:
            raise RuntimeError(f"sought {count} greedy tokens, generate gave {len(chosen)}")
        return chosen

    def _inputs(self, tokens: tuple[int, ...]) -> dict[str, Any]:
        ids = self._torch.tensor([tokens], dtype=self._torch.int64)
        return {"input_ids": ids, "attention_mask": self._torch.ones_like(ids)}

    def _masks(self, count: int, hidden: tuple[Hidden, ...]) -> Any:
        """What the model itself would mask, and ``hidden``: additive, [1, 1, count, count].

        One for each kind of layer where the model has several, as its forward takes them.
        """
        torch, config = self._torch, self._model.config.get_text_config()
        query, key = torch.arange(count)[:, None], torch.arange(count)[None, :]
        seen = key <= query
        for part in hidden:
            seen &= ~((query >= part.since) & (key >= part.start) & (key < part.stop))
        window = getattr(config, "sliding_window", None)
        near = seen & (key > query - window) if window else seen
        full, sliding = (
            torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None] for mask in (seen, near)
        )
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding

    def _check(self, tokens: tuple[int, ...]) -> None:
        if not tokens:
            raise ValueError("sought at least one token, found none")
        for token in tokens:
            if not 0 <= token < self._vocabulary:
                raise ValueError(f"token {token} is outside the vocabulary of {self._vocabulary}")


def libraries() -> tuple[Any, Any]:
    """torch and transformers, kept off the network and quiet."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ReferenceUnavailable(
            f"the reference needs torch and transformers ({error}); install kvfarm[reference]"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def _load(torch: Any, transformers: Any, folder: Path) -> Any:
    """The model in evaluation mode; every tensor must have been found, and none be left over."""
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ReferenceUnavailable(f"transformers cannot load {folder}: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:  # transformers draws missing weights at random, which would make a false oracle
        raise ReferenceUnavailable(f"{folder} does not fit {type(model).__name__}: {wrong}")
    # An end-of-sequence token is a token like any other here.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval()
