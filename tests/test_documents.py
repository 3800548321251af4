"""The reference pages say what the code says, and the site's menu leads to every page."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import yaml

import lolcats_core
from lolcats_common.params import Params
from tasks.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_writes_now(reference: ModuleType) -> None:
    for name, text in reference.pages().items():
        assert (PAGES / name).read_text(encoding="utf-8") == text, f"{name}: `make reference` writes it anew"


def test_every_parameter_command_and_public_name_has_its_place(reference: ModuleType) -> None:
    sections: dict[str, Any] = {
        name: hint for name, hint in get_type_hints(Params).items() if dataclasses.is_dataclass(hint)
    }
    page = reference.parameters()
    for name, section in sections.items():
        part = re.split(r"(?m)^## ", page.partition(f"\n## {name}\n")[2])[0]
        for field in dataclasses.fields(section):
            assert f"| `{field.name}` |" in part, (name, field.name)
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names
    for name in names - {"stage"}:
        assert f"## `lolcats {name}`" in reference.commands()
    assert all(f".{name}\n" in reference.python() for name in lolcats_core.__all__)


def test_the_menu_of_the_site_leads_to_every_page_once() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [leaf for part in parts for leaf in leaves(part)]

    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(leaves(menu)) == sorted(pages)
