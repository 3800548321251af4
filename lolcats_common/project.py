"""Where the project is, the directory that holds dvc.yaml and params.yaml; where the pipeline's code is; the program.

`flows` and `tasks` are names that others use too. A checkout has them at its top level; the wheel keeps them, the
presets and the files of a new project below ``lolcats_pipeline``, a folder laid out as a checkout is. Either way the
program puts `HOME` on the path of itself and of all that it starts, and nobody else sees the two names.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from lolcats_common.errors import UserError

_BESIDE = Path(__file__).parents[1]
# Installed, this package lies in site-packages beside lolcats_pipeline; in a checkout beside tasks and flows.
INSTALLED = (_BESIDE / "lolcats_pipeline" / "tasks").is_dir()
# The directory with tasks, flows, presets, dvc.yaml, params.yaml and prefect.yaml, as they came.
HOME = _BESIDE / "lolcats_pipeline" if INSTALLED else _BESIDE
DISTRIBUTION = "lolcats-linearize"


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
    raise UserError(
        f"{begin} is not in a project: no dvc.yaml and params.yaml here or above; change to one, or make one with "
        "`lolcats init DIR`"
    )


def code_path(name: str) -> Path:
    """Where a file or folder of a checkout's code lies, such as ``kernels/softmax_decode`` or ``tasks/prepare.py``."""
    top, _, rest = name.partition("/")
    if not INSTALLED or top in ("tasks", "flows"):
        return HOME / name
    return _BESIDE / {"kernels": "lolcats_kernels"}.get(top, top) / rest


def share_path() -> None:
    """Let this process and every Python that it starts find `tasks` and `flows`."""
    home = str(HOME)
    if home not in sys.path:
        sys.path.insert(0, home)
    kept = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != home]
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *kept] if INSTALLED else [*kept, home])
    if INSTALLED:
        os.environ["PYTHONSAFEPATH"] = "1"  # `python -m tasks.…` in a project that has a folder `tasks` of its own


def main() -> None:
    """Entry point of the program `lolcats`. The pipeline is loaded by name, for nothing here may depend on it."""
    share_path()
    try:
        importlib.import_module("tasks.cli.main").main()
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "flows", "tasks") or name.startswith("lolcats_"):
            raise
        print(f"Error: {name} is not installed; pip install '{DISTRIBUTION}[pipeline]' has it", file=sys.stderr)
        sys.exit(1)
