"""Writes the reference pages from the code (``python docs/reference.py``), and what mkdocs needs to show the others.

params.yaml gives the order, the defaults and a line on each parameter; the dataclasses give types and what a section is
about. Typer gives the commands, `lolcats_core.__all__` the names of the Python API.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lolcats_common.params import Params

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
NOTE = "<!-- Written by docs/reference.py: change the code, then `make reference`. -->\n"
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}


def parameters() -> str:
    """Every key of params.yaml with its type, its value there and what it is for."""
    page = [
        NOTE,
        "# Parameters",
        "",
        "All of params.yaml, in its order. `--set SECTION.KEY=VALUE` changes one for a run.",
    ]
    hints, lines = typing.get_type_hints(Params), dict(_described())
    for name, hint in hints.items():
        if not dataclasses.is_dataclass(hint):
            page += ["", f"## {name}", "", *_table([_row(name, name, hint, lines)])]
            continue
        page += ["", f"## {name}", "", _prose(inspect.getdoc(hint) or "")]
        inner = typing.get_type_hints(hint)
        keys = [field.name for field in dataclasses.fields(hint)]
        page += ["", *_table([_row(f"{name}.{key}", key, inner[key], lines) for key in keys])]
    return "\n".join(page) + "\n"


def _described() -> Iterator[tuple[str, tuple[str, str]]]:
    """From params.yaml: each key, dotted, with its value and its comment as text."""
    section = ""
    for line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines():
        found = re.match(r"^( *)([a-z_0-9]+):(?: +(.*?))?(?: +# (.*)|# (.*))?$", line)
        if not found:
            continue
        indent, key, value, comment, _ = found.groups()
        if value is None or value.startswith("#"):
            section, comment = key, comment or (value or "").removeprefix("# ")
            yield section, ("", comment)
        else:
            yield f"{section}.{key}" if indent else key, (value, comment or "")


def _row(dotted: str, key: str, hint: Any, lines: dict[str, tuple[str, str]]) -> tuple[str, str, str, str]:
    value, comment = lines.get(dotted, ("", ""))
    return f"`{key}`", _type(hint), f"`{value}`" if value else "", comment


def _type(hint: Any) -> str:
    """A type in words: ``whole number or null``."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if hint in WORDS:
        return WORDS[hint]
    if origin in (tuple, list):
        return f"list of {_type(inside[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if inside:
        return " or ".join(_type(part) for part in inside)
    return f"`{getattr(hint, '__name__', hint)}`"


def _prose(text: str) -> str:
    """A docstring as Markdown: double backquotes are single ones there, and attributes are a list."""
    before, _, attributes = text.partition("\nRaises:")[0].replace("``", "`").partition("Attributes:\n")
    items = re.sub(r"(?m)^(\w+): ", r"- `\1`: ", inspect.cleandoc("\n" + attributes))
    return f"{before}{items}".rstrip()


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    cells = ((*row[:3], row[3].replace("|", "\\|")) for row in rows)
    return ["| key | type | in params.yaml | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]


def commands() -> str:
    """Every command with its arguments and options, as Typer knows them."""
    import typer.cli
    import typer.main
    from typer import Context

    from tasks.cli.main import app

    group = typer.main.get_command(app)
    text = typer.cli.get_docs_for_click(obj=group, ctx=Context(group, info_name="lolcats"), name="lolcats")
    return f"{NOTE}\n{text.rstrip()}\n"


def python() -> str:
    """The names of `lolcats_core`, each where it is defined, for mkdocstrings to fill in."""
    import lolcats_core

    page = [NOTE, "# Python", "", (lolcats_core.__doc__ or "").strip(), ""]
    for name in lolcats_core.__all__:
        page += [f"::: {getattr(lolcats_core, name).__module__}.{name}", ""]
    return "\n".join(page)


def pages() -> dict[str, str]:
    """The reference by file name."""
    return {"parameters.md": parameters(), "commands.md": commands(), "python.md": python()}


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Hook of mkdocs: a link to a file outside docs/ leads somewhere in a checkout alone, so here it is its text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!reference/)[^)]+\)", r"\1", markdown)


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for file, text in pages().items():
        (PAGES / file).write_text(text, encoding="utf-8")
