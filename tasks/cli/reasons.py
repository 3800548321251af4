"""Why a stage would run, in a few words, and which stages a run with other parameters would run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lolcats_common.params import Params, load_params, read_yaml
from tasks.versioning import dvc_graph, package

PARAMETERS = "params.yaml"
SETTINGS = {PARAMETERS: "parameters", package.PACKAGE: "the installed package"}


def short(reasons: Iterable[str]) -> str:
    """DVC's reasons, each a kind and its files (``changed deps: a, b``), by what the files are."""
    kinds = dict(reason.partition(": ")[::2] for reason in reasons)
    names = [name for kind, files in kinds.items() if kind.endswith("deps") for name in files.split(", ")]
    earlier = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("outputs/"))
    settings = [SETTINGS[name] for name in names if name in SETTINGS]
    code = len(names) - sum(name.startswith("outputs/") for name in names) - len(settings)
    parts = [*([f"code ({code})"] if code else []), *settings, *_results(earlier)]
    return ", ".join(parts) or next(iter(kinds), "")


def _results(stages: Iterable[str]) -> list[str]:
    """The results of earlier stages as one part of a reason, or as none."""
    names = list(stages)
    if len(names) < 2:
        return [f"the result of {name}" for name in names]
    return [f"results of {', '.join(names[:-1])} and {names[-1]}"]


def planned(root: Path, params: Params) -> dict[str, list[str]]:
    """Stages that a run with these parameters would run here, with the reasons.

    Those that are stale now, those whose parameters differ, and all that need one of either. DVC's run cache may still
    have a result of theirs.
    """
    found = {name: [short(reasons)] for name, reasons in dvc_graph.changed(root).items()}
    before, after = (dataclasses.asdict(each) for each in (load_params(root / PARAMETERS), params))
    stages = read_yaml(root / "dvc.yaml").get("stages") or {}
    needs = dvc_graph.dependencies(root)
    for name in dvc_graph.stages(root):
        keys = [key for key in stages[name].get("params") or [] if isinstance(key, str)]
        differ = [key for key in keys if _value(before, key) != _value(after, key)]
        upstream = _results(sorted(needs[name] & found.keys()))
        if differ or (upstream and name not in found):
            found[name] = [", ".join([*(f"`{key}`" for key in differ), *upstream])]
    return found


def _value(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values
