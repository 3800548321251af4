"""The house keeps its plan: what each part may import, and how much stands on one floor."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lolcats_common": "lolcats_common",
    "lolcats_kernels": "kernels",
    "lolcats_core": "lolcats_core",
    "tasks": "tasks",
    "flows": "flows",
    "lolcats_vllm": "lolcats_vllm",
}
# A distribution of its own, with its own pyproject.toml: nothing of the rest imports it.
APART = "lolcats_vllm"
# From the ground up: a part imports from its own line and from those above it here. A folder includes its subfolders
# unless one has a line of its own; `tasks` alone is the floor of the eight stages.
LAYERS = (
    ("lolcats_common",),
    ("lolcats_kernels",),
    ("lolcats_core.compute", "lolcats_core.data"),
    ("lolcats_core.model",),
    ("lolcats_core.teacher",),
    ("lolcats_core.streaming",),
    ("lolcats_core.training",),
    ("lolcats_core.evaluation",),
    ("lolcats_core.export", "lolcats_core.estimation"),
    ("lolcats_core",),
    ("lolcats_vllm",),
    ("lolcats_core.experiments", "lolcats_core.pretraining"),
    ("tasks.runner",),
    ("tasks.versioning",),
    ("tasks.registry",),
    ("tasks.measurements", "tasks.reporting"),
    ("tasks",),
    ("tasks.operations", "tasks.studies"),
    ("tasks.cli",),
    ("flows",),
)
PLAIN = {"yaml"}
# torch itself needs filelock.
NUMERICAL = {"torch", "transformers", "peft", "safetensors", "triton", "numpy", "yaml", "filelock"}
OURS = {"lolcats_common", "lolcats_core", "lolcats_kernels"}
NEVER = {"prefect", "mlflow", "dvc", "tasks", "flows"}
# Documents that a run writes.
WRITTEN = {"ablation.md", "frontier.md", "model_card.md", "summary.md"}
# Packages of the distribution that hold no Python.
WITHOUT_MODULES = {"lolcats_core.evaluation.lm_eval_tasks", "lolcats_core.teacher.builtin"}
# A folder's floor that can be taken in at one look.
FLOOR = 14


def module_name(file: Path, top: str) -> str:
    parts = file.relative_to(ROOT / FOLDERS[top]).with_suffix("").parts
    return ".".join((top, *(part for part in parts if part != "__init__")))


MODULES = {module_name(file, top): file for top in FOLDERS for file in sorted((ROOT / FOLDERS[top]).rglob("*.py"))}
LIBRARY = {name: file for name, file in MODULES.items() if name.partition(".")[0] in OURS}


def imported(tree: ast.AST) -> set[str]:
    """Every module of the project that a tree imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found & MODULES.keys()


def layer(module: str) -> int:
    while module:
        for number, names in enumerate(LAYERS):
            if module in names:
                return number
        module = module.rpartition(".")[0]
    raise AssertionError("a module outside every layer")


def imports(nodes: list[ast.stmt]) -> set[str]:
    """First parts of the modules that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_imports_run_downwards_only() -> None:
    for name, file in MODULES.items():
        above = {other for other in imported(parsed(file)) if layer(other) > layer(name)}
        assert above == set(), name


def test_what_is_installed_apart_is_imported_by_nothing_else() -> None:
    for name, file in MODULES.items():
        if not name.startswith(APART):
            assert not any(other.startswith(APART) for other in imported(parsed(file))), name


def test_no_import_closes_a_circle() -> None:
    def follow(name: str, path: tuple[str, ...], done: set[str]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(imported(parsed(MODULES[name]))):
                # A package's own modules stand behind the names that it hands on.
                if other != name:
                    follow(other, (*path, name), done)
            done.add(name)

    done: set[str] = set()
    for name in MODULES:
        follow(name, (), done)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_only_what_every_machine_of_ours_has(name: str) -> None:
    tree = parsed(LIBRARY[name])
    others = PLAIN if name.startswith("lolcats_common") else NUMERICAL
    assert imports(tree.body) <= others | OURS | set(sys.stdlib_module_names)
    everywhere = imports([node for node in ast.walk(tree) if isinstance(node, ast.stmt)])
    assert not everywhere & NEVER


def test_no_command_of_the_program_needs_flows() -> None:
    for name, file in MODULES.items():
        if not name.startswith("flows"):
            found = imports([node for node in ast.walk(parsed(file)) if isinstance(node, ast.stmt)])
            assert "flows" not in found, name


def test_only_flows_know_prefect() -> None:
    for path in ROOT.glob("tasks/**/*.py"):
        found = imports([node for node in ast.walk(parsed(path)) if isinstance(node, ast.stmt)])
        assert "prefect" not in found, path


def test_files_stay_readable_in_one_sitting() -> None:
    for path in MODULES.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_no_folder_has_more_modules_than_one_look_takes_in() -> None:
    floors = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in floors.items() if count > FLOOR} == {}


def test_the_tasks_floor_holds_the_stages_alone() -> None:
    stages = ["evaluate", "finetune", "inputs", "prepare", "report", "select", "teacher", "transfer"]
    assert sorted(path.stem for path in (ROOT / "tasks").glob("*.py") if path.stem != "__init__") == stages


def test_the_distribution_holds_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in MODULES.values()} - {ROOT / APART} | {ROOT / "kernels", ROOT / "presets"}
    places = {
        "kernels": "lolcats_kernels",
        **{name: f"lolcats_pipeline.{name}" for name in ("flows", "presets", "tasks")},
    }
    names = {"lolcats_pipeline"}
    for folder in folders:
        top, *below = folder.relative_to(ROOT).parts
        names.add(".".join((places.get(top, top), *below)))
    assert names == set(settings["packages"]) - WITHOUT_MODULES


def test_a_legend_of_dimensions_stands_in_the_module_s_docstring() -> None:
    for path in MODULES.values():
        after = path.read_text(encoding="utf-8").split("from __future__", 1)[0].rpartition('"""')[2]
        assert not re.search(r"^# [A-Za-z]+ [a-z]", after, flags=re.MULTILINE), path


def test_documents_that_the_library_and_the_documents_refer_to_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("reports/*.md")]
    names = {path.name for path in documents}
    for path in MODULES.values():
        for reference in re.findall(r"(?:docs/)?\b[A-Za-z]\w+\.md\b", path.read_text(encoding="utf-8")):
            known = (ROOT / reference).is_file() if "/" in reference else reference in names | WRITTEN
            assert known, (path, reference)
    for path in documents:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), (path, link)
