"""Group commit: writers that come while one writes share its successor's transaction.

A durable commit waits for the disk, however little it holds. Nobody waits longer than for the commit under
way and the next one, nothing is acknowledged before it is on the disk, and there is no thread and no timer:
whoever comes first writes for all who wait (DeWitt et al., Implementation techniques for main memory
database systems, 1984, section 5.2).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

Work = Callable[[Connection], Any]
MOST = 500  # in one transaction, so that other processes get their turn


@dataclass
class Write:
    """What one caller wants written, and what became of it."""

    work: Work
    result: Any = None
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class GroupCommit:
    """Thread-safe. commit: carries out all of the writes in one transaction, durable when it returns.

    What ``commit`` itself raises, all of the group get; a write that fails alone has its ``error``.
    """

    def __init__(self, commit: Callable[[Sequence[Write]], None]) -> None:
        self._commit = commit
        self._lock = threading.Lock()
        self._waiting: list[Write] = []
        self._turn = threading.Lock()  # held by who writes

    def do(self, work: Work) -> Any:
        """What ``work`` returns, once it is durable; what it raises."""
        mine = Write(work)
        with self._lock:
            self._waiting.append(mine)
        with self._turn:  # meanwhile somebody may write for us
            if not mine.ended.is_set():
                self._write_for_all(mine)
        if mine.error is not None:
            raise mine.error
        return mine.result

    def _write_for_all(self, mine: Write) -> None:
        with self._lock:
            others = [write for write in self._waiting if write is not mine]
            group, self._waiting = [mine, *others[: MOST - 1]], others[MOST - 1 :]
        try:
            self._commit(group)
        except Exception as error:
            for write in group:
                write.error = error
        except BaseException:  # Ctrl-C here is no answer to the others: the next one writes for them
            with self._lock:
                self._waiting = [*group[1:], *self._waiting]
            raise
        for write in group:
            write.ended.set()
