"""Which of the project's files a module imports, directly or not, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

# The harness and what only reads, writes, checks or shows: a change there does not change a result.
NEUTRAL = {
    "lolcats_common/errors.py",
    "lolcats_common/files.py",
    "lolcats_common/params.py",
    "lolcats_common/progress.py",
    "lolcats_common/records.py",
    "lolcats_core/compute/device.py",
    "lolcats_common/training_params.py",
    "tasks/reporting/figures.py",
    "tasks/runner/logs.py",
    "tasks/runner/preflight.py",
    "tasks/runner/stage.py",
    "tasks/runner/mlflow_run.py",
}


def module_file(root: Path, module: str) -> Path | None:
    """The file of a module of this project; None for anyone else's."""
    top, _, rest = module.partition(".")
    folder = {
        "lolcats_common": "lolcats_common",
        "lolcats_core": "lolcats_core",
        "lolcats_kernels": "kernels",
        "tasks": "tasks",
    }.get(top)
    if folder is None:
        return None
    base = root / folder / rest.replace(".", "/") if rest else root / folder
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _exported(package: Path) -> dict[str, str]:
    """Which module each name of a package's __init__ comes from."""
    names = {}
    for node in ast.walk(ast.parse(package.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: node.module for alias in node.names}
    return names


def imported_files(root: Path, start: Path) -> set[str]:
    """Every file of the project that `start` needs, itself included, without the neutral ones.

    ``from lolcats_core import name`` counts as an import of the module that defines the name, not of the package.
    """
    found: set[str] = set()
    todo = [start]
    while todo:
        file = todo.pop()
        relative = file.relative_to(root).as_posix()
        if relative in found or relative in NEUTRAL:
            continue
        found.add(relative)
        modules: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                package = module_file(root, node.module)
                if package is not None and package.name == "__init__.py":
                    exported = _exported(package)
                    modules |= {exported.get(alias.name, f"{node.module}.{alias.name}") for alias in node.names}
                else:
                    modules.add(node.module)
        todo += [path for module in modules if (path := module_file(root, module)) is not None]
    return found
