"""The doctor tells needs and gaps from the parameters alone, before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import Params, apply_overrides, params_from_dict, presets, read_preset, read_yaml
from lolcats_core.estimation.doctor import doctor, duration, flops_per_token, model_shape, planned_tokens
from lolcats_core.estimation.memory import GIB, KNOWN_MODELS, ModelShape, evaluated_by_layers, train_memory
from tests.core.tiny import tiny_teacher

ROOT = Path(__file__).parents[3]


def preset(name: str, **changes: Any) -> Params:
    values = apply_overrides(read_yaml(ROOT / "params.yaml"), read_preset(name))
    return params_from_dict(apply_overrides(values, changes))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_has_a_full_report(name: str) -> None:
    findings = {finding.name: finding for finding in doctor(preset(name), ROOT)}
    assert {"device", "access", "data", "memory, transfer", "memory, finetune", "disk", "time, transfer"} <= set(
        findings
    )
    gated = KNOWN_MODELS[preset(name).teacher.source].gated
    assert findings["access"].status == ("missing" if gated else "warn")


def test_a_missing_commit_is_named() -> None:
    findings = {finding.name: finding for finding in doctor(preset("llama3_1_405b"), ROOT)}
    assert findings["revision"].status == "missing"
    assert "--set teacher.revision=" in findings["revision"].detail


def test_text_that_no_reader_takes_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    findings = {f.name: f for f in doctor(params_from_dict({"data": {"source": str(tmp_path / "rows.csv")}}), ROOT)}
    assert (findings["data"].status, "rows.csv must end in" in findings["data"].detail) == ("missing", True)


def test_offline_without_a_cache_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    findings = {finding.name: finding for finding in doctor(preset("mistral_7b"), ROOT)}
    assert findings["access"].status == "missing"
    assert "HF_HUB_OFFLINE" in findings["access"].detail


def test_parameter_counts_are_those_of_the_real_models() -> None:
    for source, billions in (("meta-llama/Llama-3.1-8B", 8.03), ("meta-llama/Llama-3.1-70B", 70.55)):
        assert KNOWN_MODELS[source].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_shape_of_a_local_model_is_read_from_its_config(tmp_path: Path) -> None:
    model = tiny_teacher()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        model_shape(params_from_dict({"teacher": {"source": "damaged"}}), tmp_path)
    shape = model_shape(params_from_dict({"teacher": {"source": "m"}}), tmp_path)
    assert isinstance(shape, ModelShape)
    norms = 32 * (2 * 3 + 1)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) - norms


def test_checkpointing_and_smaller_batches_need_less_memory() -> None:
    shape = KNOWN_MODELS["meta-llama/Llama-3.1-8B"]
    full = train_memory(preset("llama3_1_8b"), shape)
    checkpointed = train_memory(preset("llama3_1_8b", **{"compute.gradient_checkpointing": True}), shape)
    assert checkpointed["finetune"] < full["finetune"]
    assert full["transfer"] < full["finetune"]
    assert full["transfer"] > 2 * shape.parameters


@pytest.mark.parametrize(
    ("stage", "rows", "gib"), [("transfer", 8, 16.0), ("finetune", 8, 77.0), ("finetune", 4, 46.1)]
)
def test_memory_is_what_was_measured_on_a_gpu(stage: str, rows: int, gib: float) -> None:
    """Peaks of docs/performance.md, Llama-3.1-8B shapes, rows of 1024 tokens."""
    changes = {f"{stage}.batch_size": rows, "data.sequence_length": 1024, "compute.gradient_checkpointing": False}
    estimate = train_memory(preset("llama3_1_8b", **changes), KNOWN_MODELS["meta-llama/Llama-3.1-8B"])[stage]
    assert estimate == pytest.approx(gib * GIB, rel=0.05)


def test_models_that_fill_the_device_are_evaluated_layer_by_layer() -> None:
    params, shape = preset("llama3_1_70b"), KNOWN_MODELS["meta-llama/Llama-3.1-70B"]
    weights = 2 * shape.parameters
    assert [evaluated_by_layers(params, shape, times * weights) for times in (1.0, 1.2)] == [True, False]


def test_planned_tokens_follow_steps_and_bounds() -> None:
    assert planned_tokens(preset("llama3_1_8b")) == {"transfer": 20_000_000, "finetune": 20_000_000}
    assert planned_tokens(preset("llama3_1_70b", **{"data.max_train_tokens": None})) == {
        "transfer": 2500 * 8 * 1024,
        "finetune": None,
    }


def test_work_is_at_least_the_projections_forward_pass() -> None:
    shape = KNOWN_MODELS["meta-llama/Llama-3.1-8B"]
    work = flops_per_token(preset("llama3_1_8b"), shape)
    assert 2 * 6.9e9 < work["transfer"] < work["finetune"] < 6 * 8.1e9


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (600, "10 min"), (36000, "10.0 h"), (10 * 86400, "10.0 days")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("source", ["./missing", "/nowhere/model", "a/b/c", "weights.gguf", "damaged", "encoder"])
def test_a_path_that_is_no_model_is_one_line_and_no_traceback(source: str, tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    for name, content in (("damaged", "{"), ("encoder", '{"model_type": "bert"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    params = params_from_dict({"teacher": {"source": source}}, "params.yaml")
    missing = {finding.name: finding.detail for finding in doctor(params, tmp_path) if finding.status == "missing"}
    assert source in missing["teacher"]
