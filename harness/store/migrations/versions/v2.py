"""Version 2: tags, gates with their cells, and what legs measured become rows that can be asked for."""

import json
import math
import statistics
from typing import Any

import sqlalchemy as sa
from alembic import op

from harness.store.migrations.steps import batches, insert

revision = "2"
down_revision = "1"

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("runs", sa.Column("command", sa.Text(), nullable=False, server_default=""))
    op.add_column("runs", _name("code", server_default=""))
    op.add_column("runs", sa.Column("drill", sa.Text(), nullable=False, server_default=""))
    if op.get_bind().dialect.name == "postgresql":
        _widen()
    _create()
    _move_gates()
    _measure()
    for table, index in (
        ("runs", "model"),
        ("checks", "device"),
        ("checks", "outcome"),
        ("legs", "device"),
        ("legs", "recipe"),
    ):
        op.drop_index(f"ix_{table}_{index}", table)
    for column in ("device", "recipe", "workload", "validity"):
        op.drop_column("legs", column)
    op.create_index("ix_runs_code", "runs", ["code"])
    # For the kvfarm of version 1, which looks here and must refuse this store.
    op.execute("DELETE FROM kvfarm_schema")
    op.execute("INSERT INTO kvfarm_schema (version) VALUES (2)")


def _widen() -> None:
    """SQLite never held anybody to a length, PostgreSQL did."""
    for table, columns in {
        "runs": ("run_id", "started_at", "model", "finished_at"),
        "devices": ("run_id", "name"),
        "checks": ("run_id", "device", "recipe", "name", "outcome"),
        "legs": ("run_id", "digest"),
        "infrastructure": ("run_id", "digest"),
    }.items():
        for column in columns:
            op.alter_column(table, column, type_=NAME)


def _create() -> None:
    op.create_table(
        "tags",
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=True),
        _name("run_id", sa.ForeignKey("runs.run_id")),
        _name("name", index=True),
        sa.UniqueConstraint("run_id", "name"),
    )
    op.create_table(
        "measured",
        sa.Column("seq", sa.Integer(), sa.ForeignKey("legs.seq"), primary_key=True, autoincrement=False),
        _name("run_id", sa.ForeignKey("runs.run_id"), index=True),
        _name("device", index=True),
        _name("recipe", index=True),
        *map(_name, ("model", "workload", "arm", "artifact", "code", "validity")),
        *map(_number, ("ttft", "decode", "tokens_per_s", "memory", "energy")),
    )
    op.create_table(
        "gates",
        _name("run_id", sa.ForeignKey("runs.run_id"), primary_key=True),
        _name("kind", index=True),
        sa.Column("aa", sa.Boolean(), nullable=False, index=True),
        _name("plan_key", index=True),
        *map(_name, ("baseline", "candidate", "verdict")),
        sa.Column("exit_code", sa.Integer(), nullable=False),
        sa.Column("planned_cells", sa.Integer(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
    )
    op.create_table(
        "gate_cells",
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=True),
        _name("run_id", sa.ForeignKey("gates.run_id"), index=True),
        _name("device", index=True),
        *map(_name, ("recipe", "model", "workload")),
        _name("metric", index=True),
        *map(_name, ("comparison", "verdict")),
        *(sa.Column(name, sa.Boolean(), nullable=False) for name in ("gating", "waived", "aa")),
        sa.Column("margin", sa.Double(), nullable=False),
        *map(_number, ("ratio", "low", "high", "sd", "p")),
        sa.Column("blocks", sa.Integer(), nullable=False),
        *map(_number, ("baseline", "candidate")),
    )


def _name(name: str, *rest: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, NAME, *rest, nullable=False, **options)


def _number(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Double())


# -- what was in payloads alone ---------------------------------------------------------------------


def _move_gates() -> None:
    """Out of the runs' headers into tables of their own; a gate's one tag into the run's tags."""
    runs = sa.table("runs", *map(sa.column, ("seq", "run_id", "payload", "command", "code")))
    for row in (row for batch in batches(runs, "runs") for row in batch):
        header = json.loads(row.payload)
        gate = header.pop("gate", None)
        changed = {
            "payload": _dump(header),
            "command": header["command"],
            "code": header["provenance"].get("commit", ""),
        }
        op.get_bind().execute(runs.update().where(runs.c.seq == row.seq).values(changed))
        if gate is not None:
            _keep_gate(row.run_id, gate)


def _keep_gate(run_id: str, gate: dict[str, Any]) -> None:
    tag = gate.pop("tag", "")
    if tag:
        insert("tags", [{"run_id": run_id, "name": tag}])
    sides = {side: gate[side]["recipe"] for side in ("baseline", "candidate")}
    row = {name: gate[name] for name in ("kind", "plan_key", "planned_cells")}
    row |= {"verdict": gate.get("verdict", "INVALID"), "exit_code": gate.get("exit_code", 4)}
    same = all(gate["baseline"][name] == gate["candidate"][name] for name in ("artifact", "session"))
    insert("gates", [{"run_id": run_id, "aa": same, **row, **sides, "payload": _dump(gate)}])
    injected = {each["name"] for each in gate["comparisons"] if any(each.get("injection", {}).values())}
    names = ("device", "model", "workload", "metric", "comparison", "verdict", "gating", "margin")
    numbers = ("low", "high", "sd", "p", "baseline", "candidate")
    insert(
        "gate_cells",
        [
            {
                "run_id": run_id,
                "recipe": sides["candidate"],
                **{name: cell[name] for name in names},
                **{name: _finite(cell.get(name)) for name in numbers},
                "ratio": _finite(cell.get("estimate")),
                "waived": bool(cell.get("waived")),
                "aa": same and cell["comparison"] not in injected,
                "blocks": len(cell.get("blocks", ())),
            }
            for cell in gate.get("cells", ())
        ],
    )


def _measure() -> None:
    """What each leg measured, where nothing was done to it."""
    legs = sa.table("legs", *map(sa.column, ("seq", "run_id", "payload")))
    for batch in batches(legs, "legs"):
        rows = []
        for row in batch:
            leg = json.loads(row.payload)
            place = leg.get("place") or {"comparison": "gate", "arm": ""}
            if place["comparison"] in ("gate", "A/A") and place["arm"] != "canary":
                rows.append({"seq": row.seq, "run_id": row.run_id, "arm": place["arm"], **_measured(leg)})
        insert("measured", rows)


def _measured(leg: dict[str, Any]) -> dict[str, Any]:
    # In a gate only a process that was weighed by itself tells the peak memory.
    weighed = leg.get("memory_pass") or leg.get("place") is None
    gaps = [gap for sample in leg["samples"] for gap in sample["itl_ms"]]
    finite = [gap for gap in gaps if math.isfinite(gap)]
    total = sum(finite)
    return {
        **{name: leg[name] for name in ("device", "recipe", "model", "workload", "validity")},
        "artifact": leg["provenance"].get("artifact", ""),
        "code": leg["provenance"].get("commit", ""),
        "ttft": _median([sample["ttft_ms"] for sample in leg["samples"]]),
        "decode": _median(gaps),
        "tokens_per_s": 1000 * len(finite) / total if total > 0 else None,
        "memory": (float(leg["peak_rss_bytes"]) or None) if weighed else None,
        "energy": _finite((leg.get("energy") or {}).get("gross_j_per_token")),
    }


def _median(values: list[float]) -> float | None:
    return _finite(statistics.median(values)) if values else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
