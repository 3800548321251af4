"""Where the project is: the directory that holds dvc.yaml and params.yaml."""

from __future__ import annotations

import os
from pathlib import Path

from lolcats_common.errors import UserError


def find_root() -> Path:
    """`LOLCATS_ROOT`, or the nearest directory at or above here with a dvc.yaml and a params.yaml.

    Raises:
        UserError: there is none.
    """
    given = os.environ.get("LOLCATS_ROOT")
    begin = Path(given or ".").resolve()
    for directory in [begin] if given else [begin, *begin.parents]:
        if (directory / "dvc.yaml").is_file() and (directory / "params.yaml").is_file():
            return directory
    raise UserError(f"{begin} is not in a project: no dvc.yaml and params.yaml here or above; change to the checkout")
