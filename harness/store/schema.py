"""Which version a store has; an older one is brought to ours, a newer one is refused.

Creating is migrating from nothing. Everything happens in one transaction that only one process is in
at a time: whoever comes meanwhile waits and finds it done, and whoever is killed leaves it as it was.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from sqlalchemy import Connection, Engine, Select, column, inspect, select, table, text

from harness.bars import Report, progress
from harness.errors import StoreError
from harness.store.engine import transaction
from harness.store.tables import FIRST_VERSION_TABLE, SCHEMA_VERSION, VERSION_TABLE, Base

_LOCK = 0x6B76_6661_726D  # "kvfarm": PostgreSQL's advisory lock has a number for a name


def prepare(engine: Engine, where: str) -> None:
    """Make or migrate the tables of ``engine``. where: what messages call it.

    Raises:
        StoreError: a newer kvfarm's, or somebody else's tables. SQLAlchemyError.
    """
    with transaction(engine, reads=True) as connection:
        if _version(connection, where) == SCHEMA_VERSION:
            return
    with transaction(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
        found = _version(connection, where)
        if found != SCHEMA_VERSION:
            with progress() as report:
                _upgrade(connection, found, report)


def _version(connection: Connection, where: str) -> str | None:
    """The store's version, None for an empty database."""
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE in tables:
        known: Select[Any] = select(column("version_num")).select_from(table(VERSION_TABLE))
    elif FIRST_VERSION_TABLE in tables:
        known = select(column("version")).select_from(table(FIRST_VERSION_TABLE))
    elif foreign := tables & set(Base.metadata.tables):
        raise StoreError(
            f"sought a kvfarm store at {where}, found a table {min(foreign)!r} that kvfarm did not make; "
            "give another --store"
        )
    else:
        return None
    versions = [str(version) for version in connection.scalars(known)]
    if len(versions) == 1 and versions[0].isdecimal() and 1 <= int(versions[0]) <= int(SCHEMA_VERSION):
        return versions[0]
    raise StoreError(
        f"{where}: sought store version {SCHEMA_VERSION} or older, found {', '.join(versions) or 'none'}; "
        "use the kvfarm that made it (pip install --upgrade kvfarm), or another --store"
    )


def _upgrade(connection: Connection, found: str | None, report: Report) -> None:
    # Imported here: it takes longer than everything else that opening a store does.
    from alembic import command
    from alembic.config import Config

    config = Config()
    folder = resources.files("harness.store") / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes |= {"connection": connection, "report": report}
    if found == "1" and not inspect(connection).has_table(VERSION_TABLE):
        command.stamp(config, found)
    command.upgrade(config, "head")
