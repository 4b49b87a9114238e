"""What migrations share: rows a few at a time, since payloads are large, and telling how far they are."""

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import context, op

BATCH = 500


def batches(table: sa.TableClause, what: str, *where: Any) -> Iterator[list[Any]]:
    """Rows of ``table`` (with a column seq) in order. what: for whoever waits."""
    bind, report = op.get_bind(), context.config.attributes["report"]
    total = bind.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0
    last, done = -1, 0
    rows = sa.select(table).where(*where).order_by(table.c.seq).limit(BATCH)
    while found := list(bind.execute(rows.where(table.c.seq > last))):
        yield found
        last, done = found[-1].seq, done + len(found)
        report(f"bringing the store up to date: {what}", done, total)


def insert(name: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        op.get_bind().execute(sa.insert(sa.table(name, *map(sa.column, rows[0]))), rows)
