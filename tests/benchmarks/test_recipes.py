"""The recipe benchmark: its shipped file, one run on a tiny teacher by two processes' worth of seeds, and its table."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig

from benchmarks import recipes as benchmark
from lolcats_common.errors import UserError
from lolcats_common.params import FinetuneParams, LinearizeConfig, TransferParams
from lolcats_core.data.rows import TokenRowsWriter
from lolcats_core.experiments import trials
from lolcats_core.model.decoding.state_size import state_size, teacher_size
from lolcats_core.training.allocation import all_groups, allocate
from lolcats_core.training.selection import budget_count, candidates
from tests.core.tiny import VOCAB, tiny_teacher, tiny_tokenizer, tokens

SHIPPED = Path(benchmark.__file__).with_suffix(".yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory as `--from` takes it, and tiny.yaml beside it."""
    tiny_teacher().save_pretrained(tmp_path / "from" / "teacher")
    for name, rows in (("train", 12), ("validation", 6)):
        with TokenRowsWriter(tmp_path / "from" / name, sequence_length=40, vocab_size=VOCAB) as writer:
            writer.append(input_ids=tokens(rows, 40, seed=rows).numpy())
    training = {"max_steps": 2, "batch_size": 4, "max_eval_rows": 2}
    values = {
        "defaults": {"linearize": {"window_size": 8, "feature_dim": 8}, "transfer": training, "finetune": training},
        "measures": {"perplexity_rows": 4, "recall_gaps": [8], "recall_samples": 2, "generation_tokens": 4},
        "recipes": {"published": None, "kept": {"select": {"softmax_budget": {"layers": 1}}}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def call(folder: Path, *arguments: str) -> None:
    paths = ["--from", str(folder / "from"), "--recipes", str(folder / "tiny.yaml"), "--out", str(folder / "out.json")]
    benchmark.main([*paths, "--device", "cpu", *arguments])


def test_runs_with_other_seeds_fill_one_table_and_finished_rows_are_not_trained_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(folder, "--seeds", "0")
    call(folder, "--seeds", "1", "--only", "pub")
    call(folder, "--seeds", "1", "--only", "kept")
    capsys.readouterr()
    monkeypatch.setattr(trials, "_train_and_measure", lambda *_, **__: pytest.fail("trained again"))
    call(folder, "--seeds", "0", "1", "--table")
    table = capsys.readouterr().out
    table = re.sub(" +", " ", table)
    assert "| published | 2 |" in table
    assert "| kept | 2 |" in table
    assert " ± " in table
    beside = table.partition("Beside a plain window")[2]
    assert "| recipe | PPL / teacher | PPL / teacher, plain window | loss |" in beside
    assert len([line for line in beside.splitlines() if line.startswith(("| published |", "| kept |"))]) == 2
    results = json.loads((folder / "out.json").read_text())
    assert {(row["recipe"], row["seed"]) for row in results["rows"]} >= {("kept", 0), ("kept", 1)}
    assert results["teacher"]["parameters"] == sum(p.numel() for p in tiny_teacher().parameters())
    kept = next(row for row in results["rows"] if row["recipe"] == "kept")
    assert kept["finetuned"]["state"]["per_token"] == 2 * 2 * 8 * 4  # one layer's k and v in float32


def test_the_shipped_recipes_fit_a_teacher_of_twelve_layers_and_the_token_budget() -> None:
    config = tiny_teacher(num_hidden_layers=12, num_attention_heads=6, hidden_size=48).config
    suite = benchmark.RecipeSuite.read(SHIPPED)
    rows: Any = type("Rows", (), {"sequence_length": 1024, "__len__": lambda self: 20_000})()
    counts = {}
    for recipe in suite.trials:
        assert recipe.tokens(rows) <= benchmark.TOKEN_LIMIT
        chosen = recipe.select
        counts[recipe.name] = budget_count(chosen, recipe.linearize, config)
        if chosen.softmax_budget and "cache_ratio" in chosen.softmax_budget:
            assert counts[recipe.name] / len(candidates(chosen, config)) <= chosen.softmax_budget["cache_ratio"]
    published = next(recipe for recipe in suite.trials if recipe.name == "published")
    assert published.linearize == LinearizeConfig()
    same = ("lr", "weight_decay", "schedule", "batch_size", "max_grad_norm")
    for stage, default in (
        (published.transfer, TransferParams()),
        (published.finetune, FinetuneParams()),
    ):
        assert all(getattr(stage, name) == getattr(default, name) for name in same)
    assert counts["published"] == 0
    assert set(counts.values()) >= {1, 2, 3, 6}
    assert suite.settings.recall_gaps == (200, 400, 900)


def test_every_tier_of_the_quality_table_fits_its_bytes_and_the_token_budget() -> None:
    # The shape of SmolLM2-135M.
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(**shape, hidden_size=576, max_position_embeddings=8192)
    suite = benchmark.RecipeSuite.read(SHIPPED.with_name("quality.yaml"))
    rows: Any = type("Rows", (), {"sequence_length": 4096, "__len__": lambda self: 20_000})()
    shares = {}
    for recipe in suite.trials:
        assert recipe.tokens(rows) <= benchmark.TOKEN_LIMIT
        if recipe.select.cache_budget is not None:
            found = allocate(all_groups(config), recipe.select, recipe.linearize, config, torch.bfloat16)
            size = state_size(config, found.settings, torch.bfloat16).at(8192)
            shares[recipe.name] = size / teacher_size(config, torch.bfloat16).at(8192)
            assert shares[recipe.name] <= recipe.select.cache_budget
            assert bool(feature_map_groups(found.settings)) == ("small state" in recipe.name)
    for tier in ("8 %", "16 %", "constant"):
        assert sum(name.startswith(tier) for name in shares) == 2


def feature_map_groups(settings: LinearizeConfig) -> int:
    """kv groups of the thirty layers of three that are linearized."""
    return sum(3 - sum(map(len, settings.softmax_parts(layer, 3).values())) for layer in range(30))


def test_losses_by_position_and_needles_are_columns_of_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_teacher(vocab_size=400).save_pretrained(folder / "from" / "teacher")
    tiny_tokenizer().save_pretrained(folder / "from" / "teacher")
    for name, rows in (("train", 12), ("validation", 24)):
        with TokenRowsWriter(folder / "from" / f"{name}-400", sequence_length=40, vocab_size=400) as writer:
            writer.append(input_ids=tokens(rows, 40, seed=rows).numpy())
        shutil.rmtree(folder / "from" / name)
        (folder / "from" / f"{name}-400").rename(folder / "from" / name)
    values = yaml.safe_load((folder / "tiny.yaml").read_text())
    values["measures"] |= {"context": 160, "long_rows": 2, "needle_lengths": [150, 160], "needle_samples": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    call(folder, "--only", "published")
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| recipe"))
    for column in ("loss 0-64", "loss 64-128", "loss 128-160", "needle 150", "needle 160"):
        assert column in header
    results = json.loads((folder / "out.json").read_text())
    assert [len(hits) for hits in results["teacher"]["needles"].values()] == [2, 2]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"recipes": None}, (), "must hold `recipes`"),
        ({"recipe": {}}, (), "must hold `recipes`"),
        ({"measures": {"gaps": [8]}}, (), "measures are .*, got 'gaps'"),
        ({}, ("--only", "none"), "no recipe is called none; there are kept, published"),
        ({"recipes": {"long": {"transfer": {"max_steps": 100_000, "epochs": 10**6}}}}, (), "above the 10000000 of all"),
    ],
)
def test_a_wrong_file_is_one_line(folder: Path, change: dict[str, Any], arguments: Any, message: str) -> None:
    values = yaml.safe_load((folder / "tiny.yaml").read_text()) | change
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        call(folder, *arguments)


def test_a_directory_without_a_teacher_is_one_line(folder: Path) -> None:
    (folder / "from" / "teacher" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no teacher/config\.json"):
        call(folder)


def test_a_diverged_seed_leaves_a_gap_and_no_wrong_mean(folder: Path) -> None:
    call(folder, "--only", "published")
    results = json.loads((folder / "out.json").read_text())
    results["rows"].append(json.loads(json.dumps(results["rows"][0])))
    results["rows"][1]["finetuned"] = None
    line = next(line for line in benchmark.markdown(results).splitlines() if line.startswith("| published"))
    before, after = (cell.strip() for cell in line.split("|")[3:5])
    assert (after, " ± " in before) == ("-", True)


def test_any_teacher_and_token_files_of_any_length_take_the_place_of_a_directory(folder: Path) -> None:
    for name, seed in (("train", 0), ("validation", 1)):
        np.save(folder / f"{name}.npy", tokens(1, 600, seed=seed).numpy()[0].astype(np.uint16))
    teacher = (folder / "from" / "teacher").rename(folder / "teacher")
    paths = ["--teacher", teacher, "--train-tokens", folder / "train.npy"]
    paths += ["--validation-tokens", folder / "validation.npy", "--recipes", folder / "tiny.yaml"]
    common = [*map(str, paths), "--device", "cpu", "--only", "published"]
    ratios = []
    for length in (24, 40):
        out = folder / f"{length}.json"
        benchmark.main([*common, "--sequence-length", str(length), "--out", str(out)])
        results = json.loads(out.read_text())
        assert results["sequence_length"] == length
        ratios.append(results["rows"][0]["finetuned"]["perplexity"])
    assert ratios[0] != ratios[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --from or --teacher must be given"),
        (("--teacher", "{}/from/teacher"), "must be given together, or --from"),
        (("--from", "{}/from", "--train-tokens", "{}/train.npy"), "must be given together"),
        (("--teacher", "{}/none", "--from", "{}/from"), "none: has no none/config.json"),
    ],
)
def test_half_a_command_line_is_one_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [argument.format(folder) for argument in arguments]
    with pytest.raises(UserError, match=message):
        benchmark.main([*given, "--recipes", str(folder / "tiny.yaml"), "--out", str(folder / "out.json")])
