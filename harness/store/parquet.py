"""Everything in a store as Parquet files, typed, one a table. ``payload`` is the whole row as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.store.protocol import Store
from harness.store.rows import dump
from reports.results import CheckResult, DeviceInfo, LegResult, RunResults

_TEXT, _INT, _REAL, _FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_TIME = pa.timestamp("us", tz="UTC")
_TEXTS, _REALS = pa.list_(_TEXT), pa.list_(_REAL)
_ROWS = 5000  # of a row group

TABLES: dict[str, dict[str, Any]] = {
    "runs": {
        **dict.fromkeys(("run_id", "model", "command", "reference", "commit", "verdict"), _TEXT),
        **dict.fromkeys(("started_at", "finished_at"), _TIME),
        **dict.fromkeys(("seed", "planned_checks", "planned_legs"), _INT),
        "tags": _TEXTS,
        "payload": _TEXT,
    },
    "devices": {
        **dict.fromkeys(("run_id", "name", "kind", "model", "soc", "abi", "os", "build", "simulated"), _TEXT),
        **dict.fromkeys(("cores", "ram_bytes", "api_level"), _INT),
        "quarantined": _TEXT,
        "payload": _TEXT,
    },
    "checks": {
        **dict.fromkeys(("run_id", "device", "recipe", "check", "title", "outcome", "message"), _TEXT),
        "programs": _INT,
        **dict.fromkeys(("seconds", "worst_error", "tolerance", "mean_kl", "kl_tolerance"), _REAL),
        "retries": _TEXTS,
        "payload": _TEXT,
    },
    "legs": {
        **dict.fromkeys(("run_id", "device", "recipe", "model", "workload", "validity"), _TEXT),
        **dict.fromkeys(("artifact", "commit", "comparison", "arm"), _TEXT),
        **dict.fromkeys(("prompt_tokens", "new_tokens", "depth", "threads", "block", "position"), _INT),
        **dict.fromkeys(("peak_rss_bytes", "kv_bytes"), _INT),
        **dict.fromkeys(("step_weight_bytes", "step_kv_bytes"), _INT),
        "bandwidth_bytes_per_s": _REAL,  # where it was measured beside this leg
        **dict.fromkeys(("load_ms", "energy_gross_j_per_token", "energy_net_j_per_token"), _REAL),
        "ttft_ms": _REALS,  # one a repeat
        "itl_ms": pa.list_(_REALS),  # of each repeat, one a further token
        "reasons": _TEXTS,
        "payload": _TEXT,
    },
    "infrastructure": {"run_id": _TEXT, "message": _TEXT},
    "gate_cells": {
        "at": _TIME,
        **dict.fromkeys(("run_id", "kind", "device", "recipe", "model", "workload", "metric"), _TEXT),
        **dict.fromkeys(("comparison", "verdict"), _TEXT),
        **dict.fromkeys(("gating", "waived", "aa"), _FLAG),
        **dict.fromkeys(("margin", "ratio", "low", "high", "sd", "p"), _REAL),
        "blocks": _INT,
        **dict.fromkeys(("baseline", "candidate"), _REAL),
        "drill": _TEXT,
        "tags": _TEXTS,
    },
    "history": {
        "at": _TIME,
        **dict.fromkeys(("run_id", "device", "recipe", "model", "workload", "metric"), _TEXT),
        "value": _REAL,
        **dict.fromkeys(("unit", "validity"), _TEXT),
        "legs": _INT,
        **dict.fromkeys(("arm", "artifact", "commit"), _TEXT),
        "tags": _TEXTS,
    },
}


def export(store: Store, folder: Path, on_step: Callable[[str, int, int], None]) -> dict[str, int]:
    """Write ``NAME.parquet`` for each of TABLES into ``folder``; returns rows by name.

    Files that are there are replaced once all are written.

    Raises:
        StoreError. OSError: ``folder`` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: _File(folder / f"{name}.parquet", columns) for name, columns in TABLES.items()}
    with ExitStack() as stack:
        for file in files.values():
            stack.callback(file.discard)
        runs = store.runs()
        for done, summary in enumerate(reversed(runs), 1):
            for name, rows in _of_run(store.results(summary.run_id)):
                files[name].add(rows)
            on_step("runs", done, len(runs))
        files["gate_cells"].add(_row(cell, TABLES["gate_cells"]) for cell in reversed(store.gate_cells()))
        files["history"].add(_row(point, TABLES["history"]) for point in reversed(store.history()))
        for file in files.values():
            file.finish()
    return {name: file.count for name, file in files.items()}


class _File:
    """Written beside its place, and put there whole."""

    def __init__(self, path: Path, columns: dict[str, Any]) -> None:
        self.count = 0
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._schema = pa.schema(list(columns.items()))
        self._rows: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._rows.append(row)
            if len(self._rows) == _ROWS:
                self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self.count += len(self._rows)
        self._rows = []

    def finish(self) -> None:
        self._write()
        self._writer.close()
        self._partial.replace(self._path)

    def discard(self) -> None:
        """What was not finished goes."""
        self._writer.close()
        self._partial.unlink(missing_ok=True)


def _of_run(run: RunResults) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    yield "runs", [_run(run)]
    yield "devices", [_device(run.run_id, device) for device in run.devices]
    yield "checks", [_check(run.run_id, check) for check in run.checks]
    yield "legs", [_leg(run.run_id, leg) for leg in run.legs]
    yield "infrastructure", [{"run_id": run.run_id, "message": message} for message in run.infrastructure]


def _run(run: RunResults) -> dict[str, Any]:
    header = replace(run, devices=(), checks=(), legs=(), infrastructure=())
    return _row(
        run,
        TABLES["runs"],
        commit=run.provenance.get("commit", ""),
        verdict=run.gate.verdict if run.gate else None,
        payload=dump(header),
    )


def _device(run_id: str, device: DeviceInfo) -> dict[str, Any]:
    return _row(device, TABLES["devices"], run_id=run_id, payload=dump(device))


def _check(run_id: str, check: CheckResult) -> dict[str, Any]:
    return _row(check, TABLES["checks"], run_id=run_id, payload=dump(check))


def _leg(run_id: str, leg: LegResult) -> dict[str, Any]:
    place = leg.place
    return _row(
        leg,
        TABLES["legs"],
        run_id=run_id,
        artifact=leg.provenance.get("artifact", ""),
        commit=leg.provenance.get("commit", ""),
        comparison=place.comparison if place else None,
        arm=place.arm if place else None,
        block=place.block if place else None,
        position=place.position if place else None,
        energy_gross_j_per_token=leg.energy.gross_j_per_token,
        energy_net_j_per_token=leg.energy.net_j_per_token,
        step_weight_bytes=leg.reads.weights if leg.reads else None,
        step_kv_bytes=leg.reads.kv if leg.reads else None,
        bandwidth_bytes_per_s=leg.bandwidth.bytes_per_s if leg.bandwidth else None,
        ttft_ms=[sample.ttft_ms for sample in leg.samples],
        itl_ms=[list(sample.itl_ms) for sample in leg.samples],
        payload=dump(leg),
    )


def _row(source: Any, columns: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Columns by name: those given, the rest as ``source`` has them."""
    row = {name: given[name] if name in given else getattr(source, name) for name in columns}
    return {name: _time(value) if columns[name] == _TIME else value for name, value in row.items()}


def _time(stamp: str | None) -> datetime | None:
    return datetime.fromisoformat(stamp) if stamp is not None else None
