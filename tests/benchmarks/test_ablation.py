"""The ablation from a bare checkout: a teacher with its rows, then the rows of the table, no DVC and no MLflow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, teacher
from lolcats_core.data.arrays import ArrayRows
from lolcats_core.data.rows import TokenRows
from lolcats_core.pretraining import corpus, pretrain
from tests.core.pretraining.test_corpus import code, install

ROOT = Path(__file__).parents[2]
TINY = "--layers 2 --hidden-size 32 --heads 2 --kv-heads 1 --intermediate-size 32 --vocab-size 300 --batch-rows 2"
FAST = "--max-steps 2 --device cpu --recall-samples 2 --context 1024 --warmup-steps 1"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of installed packages."""
    monkeypatch.setattr(corpus, "standard_library_files", lambda: [])
    monkeypatch.setattr(pretrain, "stdlib_documents", lambda: [("library.py", code("library", 60))])
    monkeypatch.setattr(pretrain.os, "cpu_count", lambda: 1)
    folder = tmp_path / "packages"
    for name in ("alpha", "beta", "gamma", "delta"):
        install(folder, name, {f"{name}{i}.py": code(f"{name}{i}") for i in range(20)})
    return folder


def test_a_teacher_and_its_rows_become_the_report(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    flags = ["--search-paths", str(installed), *TINY.split(), *FAST.split()]
    assert teacher.main(["--out", str(folder), *flags]) == 0
    for name in ("train", "validation"):
        rows = TokenRows.open(folder / name, verify=True)
        assert rows.sequence_length == 1024
        assert len(rows) >= 1
    arguments = [
        "--from",
        str(folder),
        "--out",
        str(tmp_path / "reports"),
        "--device",
        "cpu",
        "--sections",
        "lora_rank",
    ]
    small = "--steps 1 --batch-size 1 --eval-rows 1 --recall-gap 8 --recall-samples 1 --feature-dim 8 --window-size 8"
    assert ablation.main([*arguments, *small.split()]) == 0
    report = json.loads((tmp_path / "reports" / "ablation.json").read_text())
    assert [row["label"] for row in report["rows"]] == ["rank 4", "rank 8", "rank 16", "rank 64"]
    assert report["teacher"]["source"] == "tiny/teacher"
    assert "| rank 64 |" in re.sub(" +", " ", (tmp_path / "reports" / "ablation.md").read_text())
    capsys.readouterr()
    assert ablation.main([*arguments[:-1], "ranks"]) == 1
    assert capsys.readouterr().err == (
        "error: a section must be one of grid, lora_rank, projections, window_size, transfer_steps, softmax_layers, "
        "got 'ranks'\n"
    )


def test_rows_are_a_spread_of_the_corpus_in_random_order(tmp_path: Path) -> None:
    tokens = np.repeat(np.arange(50, dtype=np.int16), teacher.ROW_TOKENS)
    assert teacher.write_rows(tokens, 64, 10 * teacher.ROW_TOKENS, tmp_path / "rows", seed=0) == 10
    found = TokenRows.open(tmp_path / "rows").batch(range(10))["input_ids"][:, 0].tolist()
    expected = ArrayRows(tokens, teacher.ROW_TOKENS, 64, 10).batch(range(10))["input_ids"][:, 0].tolist()
    assert sorted(found) == expected != found


def test_none_needs_what_a_gpu_machine_may_lack() -> None:
    absent = ("mlflow", "prefect", "dvc", "datasets", "lm_eval", "pydantic", "pandera", "tasks", "flows")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import benchmarks.attention\n"
        "import benchmarks.teacher, benchmarks.ablation, benchmarks.recipes\n"
        "import lolcats_core.training.low_rank_finetune, lolcats_core.model.modeling"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
