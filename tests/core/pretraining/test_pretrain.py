"""Pretraining: rows that teach copying, a loss that is the model's own, and runs that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats_common.errors import UserError
from lolcats_core.data.arrays import ArrayRows
from lolcats_core.pretraining import corpus, pretrain
from lolcats_core.pretraining.config import PretrainConfig
from lolcats_core.pretraining.data import (
    END_OF_TEXT,
    IGNORED,
    WindowStarts,
    copy_rows,
    encode,
    sample_texts,
    train_tokenizer,
    training_rows,
)
from tests.core.pretraining.test_corpus import code, install

TEXTS = [code(name) for name in ("alpha", "beta", "gamma")]
TOKENIZER = train_tokenizer(TEXTS, 300)


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < 300 for i in ids)


def test_a_line_break_with_its_indentation_is_one_token() -> None:
    ids = TOKENIZER.encode("def f(value):\n    return value").ids
    assert "\n    " in [TOKENIZER.decode([i]) for i in ids]


def test_a_corpus_too_small_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="`vocab_size` asks for 4096"):
        train_tokenizer(["a = 1\n"], 4096)


def test_each_text_is_encoded_after_one_end_of_text_token() -> None:
    end = TOKENIZER.token_to_id(END_OF_TEXT)
    tokens = encode(TOKENIZER, TEXTS, chunk=2)
    assert end == 0
    assert int((tokens == end).sum()) == len(TEXTS)
    assert TOKENIZER.decode(tokens.tolist(), skip_special_tokens=True) == "".join(TEXTS)


def test_the_tokenizer_sample_is_fixed_and_bounded() -> None:
    first, again = (list(sample_texts(TEXTS * 5, 1000, seed=3)) for _ in range(2))
    assert first == again
    assert sum(map(len, first[:-1])) < 1000


def test_array_rows_spread_over_the_whole_array() -> None:
    rows = ArrayRows(np.arange(100, dtype=np.int16), 10, 128, max_rows=3)
    assert rows.batch([0, 1, 2])["input_ids"][:, 0].tolist() == [0, 40, 90]
    assert len(ArrayRows(np.arange(105, dtype=np.int16), 10, 128)) == 10


def test_a_copy_row_repeats_its_strings_at_its_own_distance() -> None:
    torch.manual_seed(0)
    length, vocab, max_gap = 400, 5000, 150
    corpus_tokens = torch.randint(0, vocab, (100_000,), dtype=torch.int16)
    text = torch.randint(0, vocab, (64, length))
    rows, known = copy_rows(text, corpus_tokens, vocab, max_gap)
    gaps = []
    for row, mask in zip(rows, known, strict=True):
        places = mask.nonzero().flatten()
        matching = [g for g in range(8, max_gap + 1) if bool((row[places] == row[places - g]).all())]
        assert len(matching) == 1
        gaps.append(matching[0])
        # The token before a known one is a copy too, so there is something to recognise it by.
        assert bool((row[places - 1] == row[places - 1 - matching[0]]).all())
    assert min(gaps) < 40
    assert max(gaps) > 110
    assert 0.2 < known.float().mean() < 0.5


def test_targets_are_the_next_tokens_and_unknowable_ones_are_ignored() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(5000, dtype=torch.int16)
    starts = WindowStarts(5000, 64).batch(range(20))["start"]
    inputs, targets = training_rows(tokens, starts, 64, 6000, copy_share=0.25, max_gap=32)
    assert inputs.shape == targets.shape == (20, 64)
    assert torch.equal(targets[5:], inputs[5:] + 1)  # running text: 0, 1, 2, …
    counted = targets[:5] != IGNORED
    assert 0 < counted.sum() < counted.numel()
    assert torch.equal(targets[:5, :-1][counted[:, :-1]], inputs[:5, 1:][counted[:, :-1]])


def test_no_window_leaves_the_corpus() -> None:
    rows = WindowStarts(1000, 64)
    tokens = torch.zeros(1000, dtype=torch.int16)
    last = torch.full((200,), int(rows.batch([len(rows) - 1])["start"]))
    training_rows(tokens, last, 64, 100, copy_share=0.0, max_gap=32)  # an index error otherwise
    assert len(WindowStarts(64, 64)) == 0


def tiny(tmp_path: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "out": str(tmp_path / "out"),
        "scratch": str(tmp_path / "scratch"),
        "max_steps": 6,
        "device": "cpu",
        "vocab_size": 300,
        "hidden_size": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "intermediate_size": 32,
        "context": 128,
        "sequence_length": 64,
        "batch_rows": 4,
        "gradient_accumulation": 2,
        "warmup_steps": 2,
        "eval_every": 2,
        "log_every": 1,
        "evaluation_rows": 4,
        "recall_samples": 2,
        "search_paths": (str(tmp_path / "site"),),
    }
    return PretrainConfig(**values | changes)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three installed distributions, and a standard library of one module."""
    for name in ("one", "two", "three"):
        install(tmp_path / "site", name, {f"{name}.py": code(name, 60)})
    library = tmp_path / "library.py"
    library.write_text(code("library", 60))
    monkeypatch.setattr(corpus, "standard_library_files", lambda: [library])
    monkeypatch.setattr(pretrain, "stdlib_documents", lambda: [("library.py", library.read_text())])
    monkeypatch.setattr(pretrain.os, "cpu_count", lambda: 1)
    return tmp_path / "site"


def test_the_loss_is_the_cross_entropy_of_the_hugging_face_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny(tmp_path)
    model: Any = pretrain.build_model(config)
    inputs, targets = torch.randint(0, 300, (2, 3, 64)).unbind()
    targets[0, :9] = IGNORED
    losses = pretrain._loss_function(model, config, torch.device("cpu"))(inputs, targets)
    logits = model(input_ids=inputs, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_a_run_writes_a_model_that_transformers_loads_and_a_record_of_it(site: Path, tmp_path: Path) -> None:
    logged: list[int] = []
    record = pretrain.pretrain(tiny(tmp_path), log=lambda values, step: logged.append(step))
    out = tmp_path / "out"
    assert json.loads((out / "TEACHER.json").read_text()) == record
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert AutoTokenizer.from_pretrained(out).eos_token == END_OF_TEXT
    assert {"perplexity", "bigram_perplexity", "unigram_perplexity"} <= set(record["evaluation"]["standard_library"])
    assert set(record["evaluation"]["recall"]) == {"64"}
    assert record["training"]["steps"] == 6
    assert 0 < record["training"]["tokens"] <= 6 * 8 * 64
    sources = record["data"]["train"] + record["data"]["validation"]
    assert {source["name"] for source in sources} == {"one", "two", "three"}
    assert str(tmp_path) not in (out / "TEACHER.json").read_text()
    assert max(logged) == 6


def test_a_killed_run_continues_to_the_same_weights(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tiny(tmp_path, out=str(tmp_path / "straight"), scratch=str(tmp_path / "scratch-straight"))
    pretrain.pretrain(straight)

    def kill(values: dict[str, float], step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tiny(tmp_path), log=kill)
    # The corpus is not read again: what was prepared is kept.
    monkeypatch.setattr(corpus, "installed_corpus", None)
    pretrain.pretrain(tiny(tmp_path))
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_minutes_become_steps_once(site: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, max_steps=None, max_minutes=0.01, eval_every=1000)
    record = pretrain.pretrain(config)
    assert record["training"]["steps"] >= 1
    assert (
        json.loads(next((tmp_path / "scratch").glob("model-*/plan.json")).read_text())["steps"]
        == record["training"]["steps"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "give one of `max_steps` and `max_minutes`"),
        ({"max_minutes": 1.0}, "give one of `max_steps` and `max_minutes`"),
        ({"max_steps": 0}, "must be above 0"),
        ({"vocab_size": 40_000}, "`vocab_size` must lie in"),
        ({"hidden_size": 33}, "`hidden_size` must be a multiple of `heads`, got 33"),
        ({"kv_heads": 3}, "`heads` must be a multiple of `kv_heads`"),
        ({"sequence_length": 256}, "`sequence_length` must lie between 16 and `context`, got 256"),
        ({"copy_share": 1.5}, "`copy_share` must lie in"),
        ({"lr": 0.0}, "`lr` must be greater than 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(tmp_path, **changes)


def test_the_command_line_ends_in_one_line_and_code_1(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert pretrain.main(["--out", str(tmp_path), "--max-steps", "1", "--search-paths", str(tmp_path / "none")]) == 1


def test_the_recorded_command_has_the_settings_and_no_paths(tmp_path: Path) -> None:
    command = PretrainConfig(out=str(tmp_path), max_minutes=8.2, held_out=(str(tmp_path),)).command()
    assert command == "lolcats teacher --max-minutes 8.2"


def test_special_tokens_never_enter_copy_strings() -> None:
    torch.manual_seed(0)
    text = torch.ones(50, 100, dtype=torch.long)
    rows, _ = copy_rows(text, torch.ones(10, dtype=torch.int16), 40, 20)
    assert int(rows.min()) >= 1
