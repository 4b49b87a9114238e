"""Runs the operations of a program, one after the other, and says what came of each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvengine import program as ops
from kvengine.decoder import Decoder
from kvengine.errors import InvalidRequest, KvEngineError, NotSupported
from kvengine.program import CacheRows, Observation, OperationError

FIRST_STATE = "main"


class Interpreter:
    """The states of one program by name, and the disk slots it saved to; both end with it."""

    def __init__(self, decoder: Decoder) -> None:
        self._states = {FIRST_STATE: decoder}
        self._current = FIRST_STATE
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def observe(self, operation: ops.Operation) -> Observation:
        """Do one operation; what the engine refuses is in the Observation."""
        found = _Found(np.empty((0, self._decoder.model.spec.vocab_size), np.float32))
        error = None
        try:
            found = self._do(operation) or found
        except KvEngineError as refusal:
            error = OperationError(type(refusal).__name__, str(refusal))
        held = tuple(self._decoder.rows.held)
        return Observation(held, found.logits, found.tokens, error, found.cache)

    @property
    def _decoder(self) -> Decoder:
        return self._states[self._current]

    def _do(self, operation: ops.Operation) -> _Found | None:
        match operation:
            case ops.Prefill() | ops.Decode() | ops.Generate() | ops.Speculate() | ops.Extend() | ops.Reuse():
                return self._append(operation)
            case ops.ReadCache():
                return self._found(cache=self._decoder.read_cache(operation.layer, operation.row))
            case ops.Reset():
                self._decoder.reset(operation.row)
            case ops.Poison():
                self._decoder.poison()
            case ops.Rewind():
                self._decoder.rewind(operation.count, operation.row)
            case ops.Reorder():
                self._decoder.reorder(operation.order)
            case ops.Fork():
                self._fork(operation.name)
            case ops.Switch():
                if operation.name not in self._states:
                    raise InvalidRequest(
                        f"sought a state called {operation.name!r}, found {sorted(self._states)}"
                    )
                self._current = operation.name
            case _:
                raise NotSupported(f"{operation.kind} is not built yet")
        return None

    def _append(self, operation: ops.Append) -> _Found:
        decoder = self._decoder
        match operation:
            case ops.Prefill():
                parts = self._alone(operation.tokens, operation.row)
                return self._found(decoder.extend(parts, chunk=operation.chunk, logits=operation.logits))
            case ops.Decode():
                return self._found(self._decode(operation))
            case ops.Generate():
                return self._found(tokens=self._generate(operation))
            case ops.Extend():
                return self._found(decoder.extend(operation.tokens, chunk=operation.chunk, logits="all"))
            case _:
                raise NotSupported(f"{operation.kind} is not built yet")

    def _found(
        self,
        logits: npt.NDArray[np.float32] | None = None,
        tokens: tuple[int, ...] = (),
        cache: CacheRows | None = None,
    ) -> _Found:
        nothing = np.empty((0, self._decoder.model.spec.vocab_size), np.float32)
        return _Found(nothing if logits is None else logits, tokens, cache)

    def _alone(self, tokens: tuple[int, ...], row: int) -> list[tuple[int, ...]]:
        """``tokens`` for one row, none for the others."""
        if not 0 <= row < self._decoder.batch:
            raise InvalidRequest(f"sought a row of 0..{self._decoder.batch - 1}, found {row}")
        return [tokens if each == row else () for each in range(self._decoder.batch)]

    def _decode(self, operation: ops.Decode) -> npt.NDArray[np.float32]:
        # One check up front, so that a Decode either runs whole or changes nothing.
        self._decoder.check_rows(self._alone(operation.tokens, operation.row))
        steps = [self._alone((token,), operation.row) for token in operation.tokens]
        return np.concatenate([self._decoder.extend(step) for step in steps])

    def _generate(self, operation: ops.Generate) -> tuple[int, ...]:
        if operation.count < 1:
            raise InvalidRequest(f"sought a count of at least 1 token, found {operation.count}")
        decoder, row = self._decoder, operation.row
        decoder.check_rows(self._alone((operation.token,) * operation.count, row))
        found = [int(decoder.start_rows(self._alone((operation.token,), row))[row])]
        stepping = None if decoder.batch == 1 else [each == row for each in range(decoder.batch)]
        found += [int(decoder.step(stepping)[row]) for _ in range(operation.count - 1)]
        return tuple(found)

    def _fork(self, name: str) -> None:
        if name == self._current:
            raise InvalidRequest(f"sought a name other than {name!r}, which is the state forked from")
        self._states[name] = self._decoder.fork()

    def _slot(self, name: str) -> Path:
        """The file of slot ``name``; names are the program's, so they are not used as they are."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="kvfarm-states-")
        return Path(self._folder.name) / name.encode().hex()


class _Found:
    """What one operation returned."""

    def __init__(
        self,
        logits: npt.NDArray[np.float32],
        tokens: tuple[int, ...] = (),
        cache: CacheRows | None = None,
    ) -> None:
        self.logits, self.tokens, self.cache = logits, tokens, cache
