"""How a run is called and described in MLflow: by what was asked for and by what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lolcats_common.params import Params
from lolcats_common.records import Summary

# What a split of the rows is for, in MLflow's words.
CONTEXTS = {"train": "training", "validation": "validation"}


def run(params: Params, label: str) -> str:
    """One sentence about what a run does."""
    asked = f"params.yaml with {label}" if label else "params.yaml as it was"
    return f"The teacher {_source(params.teacher)}, linearized on the text {_source(params.data)}; {asked}."


def _source(section: Any) -> str:
    return f"`{section.source}`" + (f" at `{section.revision[:12]}`" if section.revision else "")


def named(name: str, summary: Summary) -> str:
    """The run's name with the headline: the student's perplexity over the teacher's."""
    ratio = summary["perplexity_ratio"].get("finetuned")
    return f"{name}: {ratio:.3f}x" if ratio else name


def datasets(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The rows that the stages read: what for, their hash, and how many and how long they are."""
    for split, context in CONTEXTS.items():
        index = root / "outputs" / "prepare" / split / "rows.json"
        if index.is_file():
            found = json.loads(index.read_text(encoding="utf-8"))
            yield context, found["sha256"]["input_ids"], {key: found[key] for key in ("rows", "sequence_length")}
