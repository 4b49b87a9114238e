"""Where results live from the moment they are made: ``open_store`` and the Store seam.

protocol: the seam. sql: it, on SQLAlchemy. tables, rows, reading: what is written and how it is asked for.
engine: SQLite and PostgreSQL. schema, migrations: versions.
"""

from harness.store.protocol import (
    UNITS,
    GateCellRow,
    GateSummary,
    HistoryMetric,
    HistoryRow,
    RunSummary,
    Store,
)
from harness.store.sql import DEFAULT_STORE, SqlStore, open_store

__all__ = [
    "DEFAULT_STORE",
    "UNITS",
    "GateCellRow",
    "GateSummary",
    "HistoryMetric",
    "HistoryRow",
    "RunSummary",
    "SqlStore",
    "Store",
    "open_store",
]
