"""Pages held against files: `UPDATE_GOLDEN=1 pytest …` writes what the code makes now, for `git diff` to show."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(text: str, name: str) -> None:
    """Compare a page with tests/golden/`name`."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
