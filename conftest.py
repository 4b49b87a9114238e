"""Makes ``pytest --devices=farm`` work in a checkout where kvfarm itself is not installed."""

import pytest

import harness.plugin


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.is_registered(harness.plugin):
        pluginmanager.register(harness.plugin, "kvfarm")
