"""dvc.yaml lists what each stage really depends on: the code it imports and the parameters it reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests.tasks.imports import imported_files
from tests.tasks.recorded import parameters_read

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What a run may change without losing results or checkpoints, which differ by rounding alone.
NEUTRAL = {
    "compute.device",  # where, not what: a run that moves to another machine keeps its results
    # How many share the work. Order and size of batches do not depend on it, and any number continues a checkpoint.
    # `transfer.mode: auto` asks for it, and for the machine's memory, which is no parameter at all: the metric
    # `streamed` says how a run was done, and `joint` or `streamed` leaves nothing to the machine.
    "compute.processes",
}


def covered(path: str, deps: list[str]) -> bool:
    return any(path == dep or path.startswith(f"{dep}/") for dep in deps)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_it_imports_and_on_no_other(name: str) -> None:
    deps = [dep for dep in STAGES[name]["deps"] if not dep.startswith("outputs/")]
    imported = imported_files(ROOT, f"tasks.{name}")
    assert [path for path in sorted(imported) if not covered(path, deps)] == []
    assert [dep for dep in deps if not any(covered(path, [dep]) for path in imported)] == []
    for dep in deps:
        assert (ROOT / dep).exists(), dep


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each stage reads, by its name."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return parameters_read(tmp_path_factory.mktemp("recorded"), monkeypatch)


def undeclared(read: set[str], declared: Iterable[str]) -> set[str]:
    """Parameters that are read and do not count as listed, by themselves or with their section."""
    listed = set(declared)
    return {key for key in read - NEUTRAL if key not in listed and key.partition(".")[0] not in listed}


def test_a_stage_depends_on_the_parameters_it_reads(parameters: dict[str, set[str]]) -> None:
    assert parameters.keys() == STAGES.keys()
    missing = {name: undeclared(read, STAGES[name]["params"]) for name, read in parameters.items()}
    assert {name: keys for name, keys in missing.items() if keys} == {}


def test_every_parameter_that_a_stage_lists_is_read_so_that_it_would_be_missed(
    parameters: dict[str, set[str]],
) -> None:
    for name, read in parameters.items():
        for entry in STAGES[name]["params"]:
            assert undeclared(read, set(STAGES[name]["params"]) - {entry}), (name, entry)


def test_the_learning_rate_of_finetuning_concerns_no_stage_before_it_and_the_device_nobody() -> None:
    keys = {name: stage["params"] for name, stage in STAGES.items()}
    assert [name for name, params in keys.items() if "finetune" in params or "finetune.lr" in params] == [
        "finetune",
        "evaluate",  # whose control may take the same training
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
