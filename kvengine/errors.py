"""Everything the engine refuses, as types.

Each message says what was sought, what was found and what to do. The class name is
also the error's name on the wire, so a test can tell a refusal from a crash on any device.
"""


class KvEngineError(Exception):
    """Base of all errors that the engine raises on purpose; its state stays usable."""


class ContextOverflow(KvEngineError):
    """More tokens than the cache plan has rows for; nothing was run, the position is unchanged."""


class InvalidToken(KvEngineError):
    """A token id outside ``[0, vocab_size)``; nothing was run."""


class EmptyPrompt(KvEngineError):
    """A prefill or decode of no tokens; nothing was run."""


class InvalidRequest(KvEngineError):
    """Any other request that makes no sense: a negative chunk, a batch of the wrong size."""


class RewindTooFar(KvEngineError):
    """A rewind to where a window would need positions that are evicted already; nothing was changed."""


class StateError(KvEngineError):
    """A saved state that is missing, truncated, altered or another decoder's; nothing was changed."""


class NotSupported(KvEngineError):
    """A known operation that this engine, plan or provider cannot do."""


class ArtifactError(KvEngineError):
    """The artifact on disk is missing, truncated, altered or of an unknown version."""


class UnsupportedModel(KvEngineError):
    """The checkpoint's architecture, or a setting in its config, that the exporter does not know."""


class CheckpointError(KvEngineError):
    """The checkpoint is incomplete or its weights are unusable (NaN, wrong shape, missing tensor)."""


class RecipeError(KvEngineError):
    """A recipe names an unknown value, flag or combination."""


class ProviderUnavailable(KvEngineError):
    """The execution provider asked for is not in this build of onnxruntime."""


class InvalidModel(KvEngineError):
    """An ONNX file that is damaged or hostile: unreadable, cyclic, too large, or with data elsewhere."""


class ContractIncomplete(KvEngineError):
    """The graph does not say all that driving it needs; the message names each ``--set`` that would."""


class EngineFailure(KvEngineError):
    """onnxruntime failed in the middle of a step; the cache is undefined until ``reset``."""


# How onnxruntime 1.32's CPU arena says it (seen under RLIMIT_AS), and std::bad_alloc of libstdc++.
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc")


def failure_of(error: Exception, what: str) -> EngineFailure | MemoryError:
    """What to raise for an ``error`` of onnxruntime.

    A device without memory left says nothing about the engine: that is a MemoryError, which ends the
    runner, as the kernel would have a moment later.
    """
    text = f"{what}: {error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return MemoryError(text)
    return EngineFailure(text)
