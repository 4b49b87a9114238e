"""What the harness itself refuses; each message says what was sought, what was found, what to do."""


class HarnessError(Exception):
    """Base: a mistake in what the harness was given, neither the engine's nor the lab's."""


class InventoryError(HarnessError):
    """farm.toml cannot be used, or a name is not in it."""


class StoreError(HarnessError):
    """The result store cannot be opened, is of another version, or lacks what was asked for."""
