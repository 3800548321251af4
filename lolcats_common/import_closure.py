"""Which files of this project a module needs, read from the source without running anything.

One answer for three questions: which code decides a kept result (`evaluation.results`), which files a saved model takes
along (`remote_code`), and what a stage must list in dvc.yaml (tests/tasks/test_dvc_yaml.py).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

# Package → its folder in a checkout; installed, the folder has the package's own name.
PACKAGES = {"lolcats_common": "lolcats_common", "lolcats_core": "lolcats_core", "lolcats_kernels": "kernels"}
# Its `__init__` offers users the whole library under one name, so a name from it counts as the module that defines it.
FACADE = "lolcats_core"


def import_closure(
    *modules: str,
    root: Path,
    packages: Mapping[str, str] = PACKAGES,
    skip: Callable[[Path], bool] = lambda file: False,
) -> dict[str, Path]:
    """The file of each of `modules` and of every module of `packages` that they import, directly or not.

    Imports inside functions, relative ones and those for type checkers count. ``from package import name`` counts as
    the package's `__init__` and, where `name` is a submodule, as that; ``import a.b`` as ``a.b`` alone, since parents
    that nobody names only hold their children together.

    Args:
        root: where the packages' folders lie.
        skip: files that are left out, with what they import.

    Raises:
        ModuleNotFoundError: one of the modules, or what they import of `packages`, has no file.
    """
    found: dict[str, Path] = {}
    todo = [(module, "the caller") for module in modules]
    while todo:
        module, importer = todo.pop()
        if module in found:
            continue
        file = module_file(module, root, packages)
        if file is None:
            raise ModuleNotFoundError(f"{importer} imports {module}, which has no file under {root}")
        if skip(file):
            continue
        found[module] = file
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for target, name in _imports(file.read_text(encoding="utf-8"), package):
            todo += [(each, module) for each in _modules(target, name, root, packages)]
    return found


def module_file(module: str, root: Path, packages: Mapping[str, str] = PACKAGES) -> Path | None:
    """The file of a module of `packages`; None for anyone else's, and for a folder without `__init__`."""
    top, *parts = module.split(".")
    if top not in packages:
        return None
    # An installed folder goes first: site-packages may hold somebody else's package `kernels`.
    folder = root / top
    path = (folder if folder.is_dir() else root / packages[top]).joinpath(*parts)
    candidates = (path / "__init__.py", *([path.with_suffix(".py")] if parts else []))
    return next((file for file in candidates if file.is_file()), None)


def _modules(target: str, name: str | None, root: Path, packages: Mapping[str, str]) -> Iterator[str]:
    """The modules that an import of `name` from `target` (None: of `target` itself) stands for."""
    if target.partition(".")[0] not in packages:
        return
    if name is None:
        yield target
        return
    submodule = f"{target}.{name}"
    if module_file(submodule, root, packages) is not None:
        yield submodule
        package = module_file(target, root, packages)
        # A namespace package, such as lolcats_kernels, has no file of its own.
        if package is not None and target != FACADE:
            yield target
        return
    if target == FACADE:
        package = module_file(target, root, packages)
        source = package.read_text(encoding="utf-8") if package is not None else ""
        origin = next((module for module, offered in _imports(source, target) if offered == name), None)
        if origin is None:
            raise ModuleNotFoundError(f"{target} offers no `{name}`")
        yield origin
        return
    yield target


@lru_cache(maxsize=1024)
def _imports(source: str, package: str) -> tuple[tuple[str, str | None], ...]:
    """Every (module, imported name, or None for the module itself) of a source file in `package`."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                # One dot is the package itself, each further one its parent.
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                target = ".".join([*base, *([node.module] if node.module else [])])
            found += [(target, alias.name) for alias in node.names]
    return tuple(found)
