"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FarmOption = Annotated[
    Path | None, typer.Option("--farm", help="Inventory file.  [default: ./farm.toml, else this host]")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--farm-address", help="Ray cluster to join, HOST:PORT.  [default: start one here]"),
]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="Results database: a URL or a SQLite file.  [default: .kvfarm]")
]
UserOption = Annotated[
    str | None, typer.Option(help="In whose name devices are leased.  [default: who runs this]")
]
PriorityOption = Annotated[int, typer.Option(help="In line for devices; higher is first.")]
WaitOption = Annotated[
    str, typer.Option(metavar="TIME", help="How long to stand in line for devices that others have.")
]
