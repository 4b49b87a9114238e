"""What the README and docs say is so."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from harness.presets import PRESETS as CHECKPOINTS
from harness.recipes import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_command_page_is_up_to_date() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))
    assert (ROOT / "docs" / "cli.md").read_text() == generator["render"](), "run `make docs`"


def test_the_suite_over_devices_is_found_in_this_checkout(tiny_checkpoint: Path) -> None:
    """As `make farm` runs it: with our tests' own conftest.py about."""
    command = [sys.executable, "-m", "pytest", "--devices=host", f"--model={tiny_checkpoint}"]
    done = subprocess.run(
        [*command, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "harness/suite/test_correctness.py" in done.stdout


def test_every_make_target_in_the_docs_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{page.name}: make {target}"


def test_every_recipe_preset_is_in_the_readme() -> None:
    table = README.split("## Recipes")[1].split("```sh")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", table)) - {"PRESET"} >= set(PRESETS)


def test_every_checkpoint_in_the_readme_can_be_made() -> None:
    assert set(re.findall(r"kvfarm synth ([\w.-]+)", README)) <= set(CHECKPOINTS)


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
