"""What alembic runs: the migrations, on the connection and in the transaction of harness.store.schema."""

from alembic import context

from harness.store.tables import VERSION_TABLE, Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
)
context.run_migrations()
