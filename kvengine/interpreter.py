"""Runs the operations of a program, one after the other, and says what came of each."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvengine import program as ops
from kvengine.decoder import Decoder
from kvengine.errors import InvalidRequest, KvEngineError, StateError
from kvengine.program import CacheRows, Observation, OperationError

FIRST_STATE = "main"


@dataclass(frozen=True)
class _Found:
    """What one operation returned."""

    logits: npt.NDArray[np.float32]
    tokens: tuple[int, ...] = ()
    cache: CacheRows | None = None


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
            case ops.Compact():
                self._decoder.compact(operation.keep, operation.sinks, operation.row)
            case ops.Save():
                self._decoder.save(self._slot(operation.name))
            case ops.Load():
                self._decoder.load(self._slot(operation.name))
            case ops.Damage():
                self._damage(operation)
            case ops.Fork():
                self._fork(operation.name)
            case ops.Switch():
                if operation.name not in self._states:
                    raise InvalidRequest(
                        f"sought a state called {operation.name!r}, found {sorted(self._states)}"
                    )
                self._current = operation.name
        return None

    def _append(self, operation: ops.Append) -> _Found:
        decoder = self._decoder
        match operation:
            case ops.Prefill():
                parts = decoder.alone(operation.tokens, operation.row)
                return self._found(decoder.extend(parts, chunk=operation.chunk, logits=operation.logits))
            case ops.Decode():
                return self._found(self._decode(operation))
            case ops.Generate():
                return self._found(tokens=self._generate(operation))
            case ops.Extend():
                return self._found(decoder.extend(operation.tokens, chunk=operation.chunk, logits="all"))
            case ops.Speculate(token, count, draft, ngram, row, hint):
                tokens = decoder.speculate(token, count, draft=draft, ngram=ngram, row=row, hint=hint)
                return self._found(tokens=tokens)
            case ops.Reuse(tokens, chunk, row):
                return self._found(decoder.reuse(tokens, chunk=chunk, row=row))

    def _found(
        self,
        logits: npt.NDArray[np.float32] | None = None,
        tokens: tuple[int, ...] = (),
        cache: CacheRows | None = None,
    ) -> _Found:
        nothing = np.empty((0, self._decoder.model.spec.vocab_size), np.float32)
        return _Found(nothing if logits is None else logits, tokens, cache)

    def _decode(self, operation: ops.Decode) -> npt.NDArray[np.float32]:
        # One check up front, so that a Decode either runs whole or changes nothing.
        decoder, row = self._decoder, operation.row
        decoder.check_rows(decoder.alone(operation.tokens, row))
        return np.concatenate([decoder.extend(decoder.alone((token,), row)) for token in operation.tokens])

    def _generate(self, operation: ops.Generate) -> tuple[int, ...]:
        if operation.count < 1:
            raise InvalidRequest(f"sought a count of at least 1 token, found {operation.count}")
        decoder, row = self._decoder, operation.row
        decoder.check_rows(decoder.alone((operation.token,) * operation.count, row))
        found = [int(decoder.start_rows(decoder.alone((operation.token,), row))[row])]
        stepping = None if decoder.batch == 1 else [each == row for each in range(decoder.batch)]
        found += [int(decoder.step(stepping)[row]) for _ in range(operation.count - 1)]
        return tuple(found)

    def _fork(self, name: str) -> None:
        if name == self._current:
            raise InvalidRequest(f"sought a name other than {name!r}, which is the state forked from")
        self._states[name] = self._decoder.fork()

    def _damage(self, operation: ops.Damage) -> None:
        path = self._slot(operation.name)
        try:
            data = bytearray(path.read_bytes())
        except OSError as error:
            raise StateError(f"sought slot {operation.name!r} to damage: {error}") from error
        if data and operation.cut:
            data = data[: operation.at % len(data)]
        elif data:
            data[operation.at % len(data)] = (data[operation.at % len(data)] + 1) % 256
        path.write_bytes(data)

    def _slot(self, name: str) -> Path:
        """The file of slot ``name``; names are the program's, so they are not used as they are."""
        if self._folder is None:
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="kvfarm-states-")
            except OSError as error:
                raise StateError(f"sought a folder for saved states: {error}; set TMPDIR") from error
        return Path(self._folder.name) / name.encode().hex()
