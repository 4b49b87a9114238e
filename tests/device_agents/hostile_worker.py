"""Opens artifacts as a runner does and says what came of each: a line with a folder in, a line out."""

from __future__ import annotations

import resource
import sys

from kvengine.engine import LocalEngine
from kvengine.errors import KvEngineError
from kvengine.program import Prefill, Program
from kvengine.recipe import SessionRecipe

# A graph that declares enormous tensors fails for want of memory here, and not at this machine's expense.
MEMORY_BYTES = 6 << 30
PROGRAM = Program(8, (Prefill((3, 4, 5)), Prefill((6,), logits="last")))


def outcome(folder: str) -> str:
    try:
        observations = LocalEngine.open(folder, SessionRecipe(threads=1)).run_program(PROGRAM)
    except KvEngineError as error:
        return type(error).__name__
    except MemoryError:
        return "MemoryError"  # ends a runner in good order, see kvengine.errors.failure_of
    except Exception as error:
        return f"untyped {type(error).__name__}: {error}".replace("\n", " ")
    return next((seen.error.type for seen in observations if seen.error), "ran")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        print(outcome(line.rstrip("\n")), flush=True)  # noqa: T201
