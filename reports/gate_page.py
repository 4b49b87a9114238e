from pathlib import Path
from reports.results import RunResults


def render(results: RunResults, folder: Path) -> Path:
    (folder / "index.html").write_text("x")
    return folder / "index.html"
