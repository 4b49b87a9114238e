"""Version 4: when a device did what, for timelines and flake rates."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "spans",
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("run_id", NAME, sa.ForeignKey("runs.run_id"), nullable=False),
        *map(_name, ("device", "kind", "name")),
        sa.Column("began", sa.Double(), nullable=False),
        sa.Column("ended", sa.Double()),
        _name("outcome"),
        sa.Column("retries", sa.Integer(), nullable=False),
        sa.UniqueConstraint("run_id", "device", "kind", "name", "began"),
    )
    op.create_index("ix_spans_device_kind", "spans", ["device", "kind"])


def _name(name: str) -> sa.Column[Any]:
    return sa.Column(name, NAME, nullable=False)
