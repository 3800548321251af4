"""`lolcats init`: a project in a directory of its own, worked on by the installed package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from lolcats_common.errors import UserError
from lolcats_common.files import write_text
from lolcats_common.project import DISTRIBUTION, HOME
from tasks.runner.git import git, identity
from tasks.versioning import dvc_graph, package

# Copied as they are.
COPIED = ("params.yaml", ".gitignore", ".dvcignore")
DVC_CONFIG = "[core]\n    analytics = false\n    check_update = false\n    autostage = false\n"
HEADER = """\
# The pipeline's only graph, laid out by `lolcats init` from that of the installed package. In place of the paths of its
# code each stage depends on a hash of them, which `lolcats` keeps up to date in package.yaml.
"""


def init(folder: Path) -> None:
    """Lay out a project, with git and DVC, and commit it where git had to be set up.

    Raises:
        UserError: the folder is a project already, has one of its files, or lies inside another git repository.
    """
    if shutil.which("git") is None:
        raise UserError("git is not installed; a project keeps its parameters and its stage graph in it")
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; `lolcats init` takes a directory")
    names = ("dvc.yaml", package.PACKAGE, "prefect.yaml", ".dvc", *COPIED)
    if found := [name for name in names if (folder / name).exists()]:
        raise UserError(f"{folder} has {', '.join(found)} already; give an empty directory")
    around = next((above for above in folder.parents if (above / ".git").exists()), None)
    if around is not None and not (folder / ".git").exists():
        raise UserError(f"{folder} lies in the git repository {around}; give a directory outside it, or that one")
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(HOME / name, folder / name)
    write_text(folder / "dvc.yaml", HEADER + yaml.safe_dump(package.project_graph(), sort_keys=False, width=1000))
    flows = (HOME / "prefect.yaml").read_text(encoding="utf-8")
    # By module, for the files of the flows lie in the package.
    write_text(folder / "prefect.yaml", re.sub(r"flows/(\w+)\.py:", r"flows.\1.", flows).replace("checkout", "project"))
    package.follow(folder, new=True)
    fresh = not (folder / ".git").exists()
    if fresh:
        git(folder, "init", "--quiet")
    dvc_graph.run_dvc(folder, "init", "--quiet")
    write_text(folder / ".dvc" / "config", DVC_CONFIG)
    if fresh:
        git(folder, "add", "--all")
        message = f"A project of {DISTRIBUTION} {package.version()}"
        git(folder, "commit", "--quiet", "--message", message, env=identity(folder))
