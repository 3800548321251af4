"""The files that a module needs, read from its imports, whatever form they have."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lolcats_common.import_closure import import_closure
from lolcats_core.model.modeling import LINEARIZED
from lolcats_core.model.remote_code import write_code
from tests.core.tiny import tiny_student

ROOT = Path(__file__).parents[2]
FILES = {
    "lolcats_core/__init__.py": "from lolcats_core.offered import thing\nfrom lolcats_core.unrelated import other\n",
    "lolcats_core/start.py": "import os\nfrom lolcats_core.direct import a\n",
    "lolcats_core/direct.py": "from lolcats_core import submodule, thing\n",
    "lolcats_core/submodule.py": "import lolcats_core.plain as p, torch\n",
    "lolcats_core/plain.py": "def f():\n    from .relative import x\n",
    "lolcats_core/relative.py": "from . import sibling\nfrom .folder import inside\n",
    "lolcats_core/sibling.py": "if TYPE_CHECKING:\n    from lolcats_core.typed import T\n",
    "lolcats_core/typed.py": "from lolcats_kernels import operator\n",
    "lolcats_core/offered.py": "from lolcats_core import start  # a circle\n",
    "lolcats_core/folder/__init__.py": "",
    "lolcats_core/folder/inside.py": "from ..upwards import y\n",
    "lolcats_core/upwards.py": "",
    "lolcats_core/unrelated.py": "",
    "kernels/operator/__init__.py": "from lolcats_kernels.operator.form import run\n",
    "kernels/operator/form.py": "def run():\n    from lolcats_kernels.operator import fused\n",
    "kernels/operator/fused.py": "import triton\n",
}
UNREACHED = {"lolcats_core/__init__.py", "lolcats_core/unrelated.py"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def reached(root: Path, module: str = "lolcats_core.start", **options: object) -> set[str]:
    files = import_closure(module, root=root, **options).values()  # type: ignore[arg-type]
    return {file.relative_to(root).as_posix() for file in files}


def test_every_form_of_import_is_followed_and_a_name_from_the_facade_to_where_it_is_defined(tree: Path) -> None:
    assert reached(tree) == FILES.keys() - UNREACHED


def test_an_installed_package_has_its_own_name_as_its_folder(tree: Path) -> None:
    (tree / "kernels").rename(tree / "lolcats_kernels")
    (tree / "kernels").mkdir()  # site-packages may hold somebody else's package of this name
    assert "lolcats_kernels/operator/fused.py" in reached(tree)


def test_a_file_that_is_left_out_takes_along_what_it_alone_imports(tree: Path) -> None:
    left = reached(tree, skip=lambda file: file.name == "form.py")
    assert FILES.keys() - UNREACHED - left == {"kernels/operator/form.py", "kernels/operator/fused.py"}


def test_an_import_without_a_file_is_an_error_and_no_smaller_answer(tree: Path) -> None:
    (tree / "lolcats_core" / "typed.py").write_text("from lolcats_core.gone import x\n")
    with pytest.raises(ModuleNotFoundError, match=r"lolcats_core\.typed imports lolcats_core\.gone, which has no file"):
        reached(tree)
    (tree / "lolcats_core" / "typed.py").write_text("from lolcats_core import nothing\n")
    with pytest.raises(ModuleNotFoundError, match=r"lolcats_core offers no `nothing`"):
        reached(tree)


def test_nothing_that_modeling_uses_once_imported_lies_outside_its_closure() -> None:
    tiny_student()
    closure = import_closure("lolcats_core.model.modeling", root=ROOT)
    used = set()
    for name in closure:
        for value in vars(sys.modules[name]).values() if name in sys.modules else ():
            origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(origin, str) and origin.startswith(("lolcats_common.", "lolcats_core.", "lolcats_kernels.")):
                used.add(origin)
    assert len(used) > 15
    assert used <= closure.keys()


def test_the_code_beside_a_saved_model_imports_only_what_is_beside_it(tmp_path: Path) -> None:
    write_code(tmp_path, LINEARIZED["llama"])
    for file in tmp_path.iterdir():
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [] if node.level else [node.module or ""]
                assert not node.level or (tmp_path / f"{node.module}.py").is_file(), (file.name, node.module)
            assert not [name for name in modules if name.startswith("lolcats") or name == "triton"], file.name
