"""The store's tables, as the newest migration leaves them; a test holds that they are the same.

A payload is one of reports.results' dataclasses as JSON text (text and not a JSON column: an error may
be NaN, which PostgreSQL's JSON refuses). Beside it stand the columns it is looked up by. ``seq`` is the
order of arrival.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Double, ForeignKey, Index, Integer, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# The newest revision in migrations/versions.
SCHEMA_VERSION = "5"
VERSION_TABLE = "kvfarm_version"  # alembic's
FIRST_VERSION_TABLE = "kvfarm_schema"  # of version 1, which was made before there were migrations

# Compared and sorted byte by byte on every server, whatever its language.
NAME = Text().with_variant(Text(collation="C"), "postgresql")


class Base(DeclarativeBase):
    pass


class Row(Base):
    __abstract__ = True
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)


class Run(Row):
    """payload: RunResults without results, gate and tags."""

    __tablename__ = "runs"
    payload: Mapped[str] = mapped_column(Text)
    run_id: Mapped[str] = mapped_column(NAME, unique=True)
    started_at: Mapped[str] = mapped_column(NAME, index=True)
    model: Mapped[str] = mapped_column(NAME)
    finished_at: Mapped[str | None] = mapped_column(NAME)
    command: Mapped[str] = mapped_column(Text, server_default="")
    code: Mapped[str] = mapped_column(NAME, server_default="", index=True)  # the harness's commit
    drill: Mapped[str] = mapped_column(Text, server_default="")  # what was made wrong on purpose


class Tag(Row):
    __tablename__ = "tags"
    __table_args__ = (UniqueConstraint("run_id", "name"),)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME)
    name: Mapped[str] = mapped_column(NAME, index=True)


class Device(Row):
    __tablename__ = "devices"
    __table_args__ = (UniqueConstraint("run_id", "name"),)
    payload: Mapped[str] = mapped_column(Text)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME)
    name: Mapped[str] = mapped_column(NAME)


class Check(Row):
    __tablename__ = "checks"
    __table_args__ = (UniqueConstraint("run_id", "device", "recipe", "name"),)
    payload: Mapped[str] = mapped_column(Text)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME)
    device: Mapped[str] = mapped_column(NAME)
    recipe: Mapped[str] = mapped_column(NAME)
    name: Mapped[str] = mapped_column(NAME)
    outcome: Mapped[str] = mapped_column(NAME)


class Leg(Row):
    __tablename__ = "legs"
    __table_args__ = (UniqueConstraint("run_id", "digest"),)
    payload: Mapped[str] = mapped_column(Text)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME)
    digest: Mapped[str] = mapped_column(NAME)  # of its key, or of the payload where it has none


class Measured(Base):
    """What history is read from: narrow rows, for payloads of several kB make any scan slow.

    One for each leg that tells of its recipe (no warm-up, nothing injected), and one for each canary, of
    which decode alone is kept.
    """

    __tablename__ = "measured"
    # Canaries of a device are few among its legs.
    __table_args__ = (Index("ix_measured_device_arm", "device", "arm"),)
    seq: Mapped[int] = mapped_column(ForeignKey("legs.seq"), primary_key=True, autoincrement=False)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME, index=True)
    device: Mapped[str] = mapped_column(NAME)
    recipe: Mapped[str] = mapped_column(NAME, index=True)
    model: Mapped[str] = mapped_column(NAME)
    workload: Mapped[str] = mapped_column(NAME)
    arm: Mapped[str] = mapped_column(NAME)
    artifact: Mapped[str] = mapped_column(NAME)
    code: Mapped[str] = mapped_column(NAME)
    validity: Mapped[str] = mapped_column(NAME)
    # One column for each of protocol.UNITS.
    ttft: Mapped[float | None] = mapped_column(Double)
    decode: Mapped[float | None] = mapped_column(Double)
    tokens_per_s: Mapped[float | None] = mapped_column(Double)
    memory: Mapped[float | None] = mapped_column(Double)
    energy: Mapped[float | None] = mapped_column(Double)


class Infrastructure(Row):
    __tablename__ = "infrastructure"
    __table_args__ = (UniqueConstraint("run_id", "digest"),)
    payload: Mapped[str] = mapped_column(Text)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME)
    digest: Mapped[str] = mapped_column(NAME)


class SpanRow(Row):
    """payload: the span's parts."""

    __tablename__ = "spans"
    __table_args__ = (
        UniqueConstraint("run_id", "device", "kind", "name", "began"),
        Index("ix_spans_device_kind", "device", "kind"),
    )
    payload: Mapped[str] = mapped_column(Text)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME)
    device: Mapped[str] = mapped_column(NAME)
    kind: Mapped[str] = mapped_column(NAME)
    name: Mapped[str] = mapped_column(NAME)
    began: Mapped[float] = mapped_column(Double)  # Unix times, s
    ended: Mapped[float | None] = mapped_column(Double)
    outcome: Mapped[str] = mapped_column(NAME)
    retries: Mapped[int] = mapped_column(Integer)


class Gate(Base):
    """payload: GateInfo."""

    __tablename__ = "gates"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), type_=NAME, primary_key=True)
    kind: Mapped[str] = mapped_column(NAME, index=True)
    aa: Mapped[bool] = mapped_column(Boolean, index=True)  # its two sides are the same
    plan_key: Mapped[str] = mapped_column(NAME, index=True)
    baseline: Mapped[str] = mapped_column(NAME)
    candidate: Mapped[str] = mapped_column(NAME)
    verdict: Mapped[str] = mapped_column(NAME)
    exit_code: Mapped[int] = mapped_column(Integer)
    planned_cells: Mapped[int] = mapped_column(Integer)
    payload: Mapped[str] = mapped_column(Text)


class GateCell(Row):
    __tablename__ = "gate_cells"
    run_id: Mapped[str] = mapped_column(ForeignKey("gates.run_id"), type_=NAME, index=True)
    device: Mapped[str] = mapped_column(NAME, index=True)
    recipe: Mapped[str] = mapped_column(NAME)
    model: Mapped[str] = mapped_column(NAME)
    workload: Mapped[str] = mapped_column(NAME)
    metric: Mapped[str] = mapped_column(NAME, index=True)
    comparison: Mapped[str] = mapped_column(NAME)
    verdict: Mapped[str] = mapped_column(NAME)
    gating: Mapped[bool] = mapped_column(Boolean)
    waived: Mapped[bool] = mapped_column(Boolean)
    aa: Mapped[bool] = mapped_column(Boolean)
    margin: Mapped[float] = mapped_column(Double)
    ratio: Mapped[float | None] = mapped_column(Double)
    low: Mapped[float | None] = mapped_column(Double)
    high: Mapped[float | None] = mapped_column(Double)
    sd: Mapped[float | None] = mapped_column(Double)
    p: Mapped[float | None] = mapped_column(Double)
    blocks: Mapped[int] = mapped_column(Integer)
    baseline: Mapped[float | None] = mapped_column(Double)
    candidate: Mapped[float | None] = mapped_column(Double)
