"""Version 5: a device's canaries are found without reading all that was measured of it."""

from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    op.create_index("ix_measured_device_arm", "measured", ["device", "arm"])
    op.drop_index("ix_measured_device", "measured")
