"""Projects outside a checkout: their stages depend on a hash of the installed package's code, kept in package.yaml.

`lolcats_pipeline`'s dvc.yaml, a checkout's, lists the code of each stage. A project gets that graph with one value of
package.yaml in place of the paths. An upgrade of the package changes the values of those stages alone whose code
it changed, so that the others stay up to date.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import yaml

from lolcats_common.files import sha256_file, sha256_json, sha256_tree, write_text
from lolcats_common.params import read_yaml
from lolcats_common.project import DISTRIBUTION, HOME, code_path

PACKAGE = "package.yaml"
OUTPUTS = "outputs/"
HEADER = (
    "# The installed package's code, a hash for each stage that it decides. Written by `lolcats`; keep it in git.\n"
)


def version() -> str:
    """The installed distribution's version; ``unknown`` where the code was put on the path without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def project_graph() -> dict[str, Any]:
    """The graph of a checkout with each stage's code as a value of package.yaml."""
    graph = read_yaml(HOME / "dvc.yaml")
    for name, stage in graph["stages"].items():
        stage["cmd"] = str(stage["cmd"]).replace(f"python -m tasks.{name}", f"lolcats stage {name}")
        stage["params"] = [*stage["params"], {PACKAGE: [f"code.{name}"]}]
        stage["deps"] = [dep for dep in stage["deps"] if dep.startswith(OUTPUTS)]
        if not stage["deps"]:
            del stage["deps"]
    return graph


def code_hashes() -> dict[str, str]:
    """For each stage the hash of all the code that it depends on, as it is installed."""
    stages = read_yaml(HOME / "dvc.yaml")["stages"]
    code = {name: [dep for dep in stage["deps"] if not dep.startswith(OUTPUTS)] for name, stage in stages.items()}
    known = {dep: _hash(code_path(dep)) for dep in {dep for deps in code.values() for dep in deps}}
    return {name: sha256_json({dep: known[dep] for dep in deps})[:16] for name, deps in code.items()}


def _hash(path: Path) -> str:
    return sha256_tree(path) if path.is_dir() else sha256_file(path)


def follow(root: Path, new: bool = False) -> None:
    """Bring package.yaml to the installed code; only a `new` project gets one, for a checkout has none."""
    file = root / PACKAGE
    if new or file.is_file():
        text = HEADER + yaml.safe_dump({"version": version(), "code": code_hashes()}, sort_keys=False)
        if new or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
