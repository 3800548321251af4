"""Two and four processes give the result of one, and continue each other's checkpoints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lolcats_common.errors import UserError
from lolcats_core.compute import distributed
from tests.core.distributed_work import MaskedRows
from tests.core.tiny import tiny_teacher

ROOT = Path(__file__).parents[3]


def launch(processes: int, work: Path, *arguments: str) -> int:
    """Exit code of the two stages in `work` under torchrun."""
    torchrun = distributed.torchrun(processes)
    command = [sys.executable, *torchrun, "-m", "tests.core.distributed_work", str(work), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or arguments, done.stderr[-4000:]
    return done.returncode


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    tiny_teacher().save_pretrained(folder / "teacher", max_shard_size="20KB")
    launch(1, folder)
    return folder


def result(work: Path) -> dict[str, Any]:
    return torch.load(work / "result.pt", weights_only=True)


def copy(work: Path, to: Path) -> Path:
    """A fresh place for the same work."""
    shutil.copytree(work / "teacher", to / "teacher")
    return to


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses to 1e-5 at every logged step (what sums in another order change), weights to 1e-3."""
    assert found["weights"] == expected["weights"]
    for stage, tensors in expected["tensors"].items():
        histories = found["histories"][stage], expected["histories"][stage]
        for mine, theirs in zip(*histories, strict=True):
            for name in (n for n in theirs if n == "step" or "loss" in n or "layer_" in n):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (stage, name)
        assert found["tensors"][stage].keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(
                found["tensors"][stage][name], value, rtol=1e-3, atol=1e-4, msg=f"{stage} {name}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_result_of_one(work: Path, tmp_path: Path, processes: int) -> None:
    assert_equal(result_of(processes, copy(work, tmp_path)), result(work))


def result_of(processes: int, work: Path) -> dict[str, Any]:
    launch(processes, work)
    return result(work)


@pytest.mark.slow
def test_killed_runs_continue_with_another_number_of_processes(work: Path, tmp_path: Path) -> None:
    copy(work, tmp_path)
    assert launch(2, tmp_path, "streamed") != 0
    assert launch(1, tmp_path, "finetune") != 0
    assert_equal(result_of(2, tmp_path), result(work))


@pytest.mark.slow
def test_what_is_merged_from_files_is_what_was_trained(work: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    lora = result(work)["tensors"]["finetune"]
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora"
    product = lora[f"{prefix}_B.default.weight"] @ lora[f"{prefix}_A.default.weight"] * 16 / 2
    teacher = tiny_teacher().model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, teacher + product)
    maps = result(work)["tensors"]["joint"]
    for name, value in maps.items():
        torch.testing.assert_close(model.get_parameter(name), value)
    assert (work / "model" / "model.safetensors.index.json").is_file()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "8"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="at most the 4 CUDA devices of this machine, got 8"):
        distributed.start(torch.device("cuda"))


def test_one_process_takes_everything() -> None:
    indices = np.arange(5)
    mine, share = distributed.part(indices)
    assert (mine is indices, share) == (True, 1.0)
    assert list(distributed.rounds([3, 4])) == [(3, 1.0), (4, 1.0)]
    assert MaskedRows(4).batch(indices[:2])["loss_mask"].sum(1).tolist() == [39, 38]
