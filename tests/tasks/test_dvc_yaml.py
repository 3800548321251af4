"""dvc.yaml lists what each stage really depends on: the code it imports and the parameters it reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.tasks.imports import imported_files

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# The device decides where, not what; a run moved to another machine keeps its results.
IRRELEVANT = {"compute.device"}


def covered(path: str, deps: list[str]) -> bool:
    return any(path == dep or path.startswith(f"{dep}/") for dep in deps)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_it_imports_and_on_no_other(name: str) -> None:
    deps = [dep for dep in STAGES[name]["deps"] if not dep.startswith("outputs/")]
    imported = imported_files(ROOT, ROOT / "tasks" / f"{name}.py")
    assert [path for path in sorted(imported) if not covered(path, deps)] == []
    unused = [dep for dep in deps if not any(covered(path, [dep]) for path in imported)]
    assert [dep for dep in unused if (ROOT / dep).suffix == ".py"] == []
    for dep in deps:
        assert (ROOT / dep).exists(), dep


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_parameters_it_reads(name: str) -> None:
    source = (ROOT / "tasks" / f"{name}.py").read_text()
    read = set(re.findall(r"\bstage\.params\.([a-z_]+(?:\.[a-z_]+)?)", source))
    if re.search(r"^ +params = stage\.params$", source, flags=re.MULTILINE):
        read |= set(re.findall(r"(?<![.\w])params\.([a-z_]+(?:\.[a-z_]+)?)", source))
    declared = STAGES[name]["params"]
    missing = {key for key in read - IRRELEVANT if key not in declared and key.partition(".")[0] not in declared}
    assert missing == set()


def test_the_learning_rate_of_finetuning_concerns_finetune_and_the_report_and_the_device_nobody() -> None:
    keys = {name: stage["params"] for name, stage in STAGES.items()}
    assert [name for name, params in keys.items() if "finetune" in params or "finetune.lr" in params] == [
        "finetune",
        "report",
    ]
    assert not any("compute" in params or "compute.device" in params for params in keys.values())


def test_another_softmax_budget_trains_no_maps_again() -> None:
    assert [name for name, stage in STAGES.items() if "select" in stage["params"]] == ["select", "report"]
    for name in ("finetune", "evaluate"):
        # What the student is made of comes from the selection alone.
        assert "linearize" not in STAGES[name]["params"]
        assert "outputs/select/selection.json" in STAGES[name]["deps"]
        assert not any(dep.startswith("outputs/transfer") for dep in STAGES[name]["deps"])


def test_no_stage_depends_on_files_that_differ_from_run_to_run() -> None:
    for stage in STAGES.values():
        for dep in stage["deps"]:
            assert dep not in {f"outputs/{name}" for name in STAGES}, f"{dep} holds run.json and metrics.json"
