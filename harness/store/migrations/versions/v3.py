"""Version 3: the canary's legs are among what was measured, so that a trend need not read whole runs."""

import json
import math
import statistics
from typing import Any

import sqlalchemy as sa

from harness.store.migrations.steps import batches, insert

revision = "3"
down_revision = "2"


def upgrade() -> None:
    legs = sa.table("legs", *map(sa.column, ("seq", "run_id", "payload")))
    for batch in batches(legs, "canaries", legs.c.payload.like('%"canary"%')):
        found = [(row, json.loads(row.payload)) for row in batch]
        insert("measured", [_row(row, leg) for row, leg in found if _arm(leg) == "canary"])


def _arm(leg: dict[str, Any]) -> str:
    return str((leg.get("place") or {}).get("arm", ""))


def _row(row: Any, leg: dict[str, Any]) -> dict[str, Any]:
    gaps = [gap for sample in leg["samples"] for gap in sample["itl_ms"]]
    middle = statistics.median(gaps) if gaps else math.nan
    return {
        "seq": row.seq,
        "run_id": row.run_id,
        "arm": "canary",
        **{name: leg[name] for name in ("device", "recipe", "model", "workload", "validity")},
        "artifact": leg["provenance"].get("artifact", ""),
        "code": leg["provenance"].get("commit", ""),
        "decode": middle if math.isfinite(middle) else None,
    }
