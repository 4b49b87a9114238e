"""Where results live from the moment they are made: ``open_store`` and the Store seam."""

from harness.store.protocol import RunSummary, Store
from harness.store.sql import DEFAULT_STORE, SqlStore, open_store

__all__ = ["DEFAULT_STORE", "RunSummary", "SqlStore", "Store", "open_store"]
