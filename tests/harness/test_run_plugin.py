"""What the run plugin makes of collected tests."""

from __future__ import annotations

import textwrap

import pytest

from harness.run_plugin import RunPlugin

pytest_plugins = ["pytester"]


def test_a_property_for_none_of_the_recipes_is_deselected(pytester: pytest.Pytester) -> None:
    """Not planned, not skipped: with static recipes alone nothing is left of what is for hybrid ones."""
    pytester.makepyfile(
        textwrap.dedent("""
            import pytest

            @pytest.fixture
            def cell(request):
                return request.param

            @pytest.mark.parametrize("cell", [], indirect=True)
            def test_for_nothing(cell): ...

            @pytest.mark.parametrize("cell", [("host", "static")], indirect=True)
            def test_for_one(cell): ...
        """)
    )

    class Plugin:
        """The hook under test alone; a whole RunPlugin needs devices."""

        def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
            RunPlugin.pytest_collection_modifyitems(self, config, items)  # type: ignore[arg-type]

    found = pytester.inline_run("-p", "no:cacheprovider", plugins=[Plugin()])
    passed, skipped, failed = found.listoutcomes()
    assert [report.nodeid.split("::")[1] for report in passed] == ["test_for_one[cell0]"]
    assert (skipped, failed) == ([], [])
