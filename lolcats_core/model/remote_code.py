"""The code a saved model needs, beside its weights: loads with `trust_remote_code=True` where this package is absent.

transformers imports such code from one flat folder with relative imports, so each module that `modeling` needs is
written as one file, `lolcats_core.model.attention` as `lolcats_core_model_attention.py`, with its imports of the others
made relative.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

from lolcats_common.files import write_text

ENTRY = "modeling_lolcats"
_OURS = re.compile(r"^(\s*)from (lolcats_(?:common|core|kernels)[\w.]*) import", re.MULTILINE)


def auto_map(config_class: str, model_class: str) -> dict[str, str]:
    """What config.json says about where the classes are."""
    return {"AutoConfig": f"{ENTRY}.{config_class}", "AutoModelForCausalLM": f"{ENTRY}.{model_class}"}


def write_code(folder: Path | str, classes: list[str]) -> None:
    """Write `modeling_lolcats.py`, which offers `classes`, and every module behind it."""
    folder = Path(folder)
    if not __name__.startswith("lolcats_core."):
        # This is such a copy itself; hand on its files.
        for file in Path(__file__).parent.glob("*lolcats*.py"):
            if file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        return
    pending, written = ["lolcats_core.model.modeling"], set[str]()
    while pending:
        module = pending.pop()
        if module in written:
            continue
        written.add(module)
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        pending += [found[1] for found in _OURS.findall(source)]
        write_text(folder / f"{_flat(module)}.py", _OURS.sub(lambda m: f"{m[1]}from .{_flat(m[2])} import", source))
    names = ", ".join(sorted(classes))
    write_text(folder / f"{ENTRY}.py", f"from .{_flat('lolcats_core.model.modeling')} import {names}  # noqa: F401\n")


def _flat(module: str) -> str:
    return module.replace(".", "_")
