"""Version 1: runs with their devices, checks, legs and infrastructure."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "kvfarm_schema", sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False)
    )
    _table(
        "runs",
        sa.Column("run_id", sa.String(64), nullable=False, unique=True),
        sa.Column("started_at", sa.String(40), nullable=False, index=True),
        sa.Column("model", sa.String(255), nullable=False, index=True),
        sa.Column("finished_at", sa.String(40)),
    )
    _table("devices", _run_id(), _name("name"), sa.UniqueConstraint("run_id", "name"))
    _table(
        "checks",
        _run_id(),
        _name("device", index=True),
        _name("recipe"),
        _name("name"),
        sa.Column("outcome", sa.String(20), nullable=False, index=True),
        sa.UniqueConstraint("run_id", "device", "recipe", "name"),
    )
    _table(
        "legs",
        _run_id(),
        sa.Column("digest", sa.String(64), nullable=False),
        _name("device", index=True),
        _name("recipe", index=True),
        _name("workload"),
        sa.Column("validity", sa.String(20), nullable=False),
        sa.UniqueConstraint("run_id", "digest"),
    )
    _table(
        "infrastructure",
        _run_id(),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.UniqueConstraint("run_id", "digest"),
    )


def _table(name: str, *rest: sa.Column[str] | sa.UniqueConstraint) -> None:
    seq = sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=True)
    op.create_table(name, seq, sa.Column("payload", sa.Text(), nullable=False), *rest)


def _run_id() -> sa.Column[str]:
    return sa.Column("run_id", sa.String(64), sa.ForeignKey("runs.run_id"), nullable=False)


def _name(name: str, index: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(255), nullable=False, index=index)
