"""The code a saved model needs, beside its weights: loads with `trust_remote_code=True` where this package is absent.

transformers imports such code from one flat folder with relative imports, so each module that `modeling` needs is
written as one file, `lolcats_core.model.attention` as `lolcats_core_model_attention.py`, with its imports of the others
made relative.

The Triton kernels stay behind: transformers refuses code that imports a package which the machine lacks, and not every
machine has triton. Whoever asks for them there gets an `ImportError` and takes the form in PyTorch.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from lolcats_common.files import write_text
from lolcats_common.import_closure import import_closure

ENTRY = "modeling_lolcats"
MODEL, VERSIONS = "lolcats_core.model.modeling", "lolcats_core.model.transformers_versions"
_OURS = re.compile(r"^(\s*)from (lolcats_(?:common|core|kernels)[\w.]*) import", re.MULTILINE)


def auto_map(classes: Mapping[str, type]) -> dict[str, str]:
    """What config.json says about where the classes, by their Auto classes, are."""
    return {auto: f"{ENTRY}.{each.__name__}" for auto, each in classes.items()}


def write_code(folder: Path | str, classes: Iterable[type], module: str = MODEL) -> None:
    """Write `modeling_lolcats.py`, which offers `classes` of `module`, and every module behind it."""
    folder = Path(folder)
    if not __name__.startswith("lolcats_core."):
        # This is such a copy itself; hand on its files.
        for file in Path(__file__).parent.glob("*lolcats*.py"):
            if file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        return
    modules = import_closure(module, root=Path(__file__).parents[2], skip=_needs_triton)
    for name, file in modules.items():
        source = file.read_text(encoding="utf-8")
        write_text(folder / f"{_flat(name)}.py", _OURS.sub(lambda m: f"{m[1]}from .{_flat(m[2])} import", source))
    write_text(folder / f"{ENTRY}.py", _entry(sorted(each.__name__ for each in classes), module, list(modules)))


def _entry(classes: list[str], offering: str, modules: list[str]) -> str:
    """The source of `modeling_lolcats.py`: a version that is out of the range is refused before anything else."""
    lines = [
        "from typing import TYPE_CHECKING",
        "",
        f"from .{_flat(VERSIONS)} import CACHE  # noqa: F401",
        f"from .{_flat(offering)} import {', '.join(classes)}  # noqa: F401",
        "",
        "if TYPE_CHECKING:  # old versions of transformers copy the files named here and none that those name",
        *(f"    from .{_flat(module)} import *" for module in modules),
    ]
    return "\n".join(lines) + "\n"


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _needs_triton(file: Path) -> bool:
    """A module `fused`, or one in a folder of that name; the folder's own `__init__` is what imports name."""
    return file.stem == "fused" or (file.parent.name == "fused" and file.name != "__init__.py")
