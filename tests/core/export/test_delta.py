"""What stage 2 saves loads onto its linearized base bitwise, and onto nothing else."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.params import FinetuneParams, TeacherParams
from lolcats_core.export.delta import ADAPTER, DELTA, fingerprint, read_delta
from lolcats_core.export.merging import save_merged
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.model.transformers_versions import minor_version
from lolcats_core.streaming.weights import WeightFiles
from lolcats_core.teacher.pin import TeacherPin, resolve_teacher
from lolcats_core.training import low_rank_finetune
from lolcats_core.training.low_rank_finetune import add_lora
from tests.core.teacher.test_pin import make_teacher
from tests.core.tiny import tiny_teacher, tiny_tokenizer

SETTINGS = lc.LinearizeConfig(window_size=8, feature_dim=8)
TARGETS = {"phi3": ("qkv_proj", "o_proj"), "gpt_neox": ("query_key_value", "dense")}


def trained(student: Any, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> PeftModel:
    """`student` with adapters and feature maps that are not where they started."""
    model = add_lora(student, FinetuneParams(lora_rank=2, target_modules=targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(3, vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, vocabulary: int = 97) -> torch.Tensor:
    result: torch.Tensor = model(tokens(vocabulary)).logits
    return result


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A tiny Llama in a directory."""
    return make_teacher(tmp_path / "teacher")


@pytest.fixture
def pin(teacher: Path) -> TeacherPin:
    return resolve_teacher(TeacherParams(source=str(teacher)), teacher.parent)


def base(teacher: Path, dtype: torch.dtype = torch.float32) -> Any:
    return LlamaForCausalLM.from_pretrained(teacher, dtype=dtype)


# peft by itself


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_peft_loads_the_adapter_onto_the_saved_linearized_base_and_refuses_the_softmax_teacher(
    family: str, tmp_path: Path
) -> None:
    teacher = tiny_teacher(family)
    teacher.save_pretrained(tmp_path / "teacher")
    lc.linearize(teacher, SETTINGS).save_pretrained(tmp_path / "base")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(student, TARGETS.get(family, ("q_proj", "o_proj")))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    softmax = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"\{'linearized'\} not found in the base model"):
        PeftModel.from_pretrained(softmax, tmp_path / "adapter")


def test_the_linearized_base_is_found_by_the_adapter_s_own_config(tmp_path: Path, pin: TeacherPin) -> None:
    lc.linearize(tiny_teacher(), SETTINGS).save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    lc.save_delta(model, tmp_path / "adapter", pin)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "base").resolve())
    # Before 5.18, transformers' own loading of adapters missed the modules that one saves whole.
    whole = minor_version(transformers.__version__) >= (5, 18)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM)[: 1 + whole]:
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path, teacher: Path, pin: TeacherPin) -> None:
    model = trained(lc.linearize(base(teacher), SETTINGS))
    for name in ("a", "b"):
        lc.save_delta(model, tmp_path / name, pin)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == ""
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", ADAPTER, DELTA]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merging_keeps_the_function(family: str) -> None:
    model = trained(lc.linearize(tiny_teacher(family), SETTINGS), TARGETS.get(family, ("q_proj", "o_proj")))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).norm() < 1e-5 * expected.norm()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "modules_to_save" in name]


# The delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["pinned", "teacher directory", "teacher", "base directory", "base"])
def test_a_delta_gives_the_adapted_and_the_merged_student_bitwise(
    given: str, dtype: torch.dtype, tmp_path: Path, teacher: Path, pin: TeacherPin
) -> None:
    lc.linearize(base(teacher, dtype), SETTINGS, seed=3).save_pretrained(tmp_path / "base")
    model = trained(lc.linearize(base(teacher, dtype), SETTINGS))
    lc.save_delta(model, tmp_path / "delta", pin)

    def argument() -> Any:
        return {
            "pinned": lambda: None,
            "teacher directory": lambda: teacher,
            "teacher": lambda: base(teacher, dtype),
            "base directory": lambda: tmp_path / "base",
            "base": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        }[given]()

    expected = logits(model, 280)
    assert torch.equal(logits(lc.load_delta(tmp_path / "delta", argument()), 280), expected)
    softmax = argument()
    before = None if not isinstance(softmax, LlamaForCausalLM) else logits(softmax, 280)
    merged = lc.load_delta(tmp_path / "delta", softmax, merge=True)
    for (name, parameter), expected_one in zip(
        merged.named_parameters(), model.merge_and_unload().parameters(), strict=True
    ):
        assert torch.equal(parameter, expected_one), name
    assert before is None or given == "base" or torch.equal(logits(softmax, 280), before)


def test_adapters_on_a_tied_output_embedding_load_unmerged_and_are_never_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What versions that did not refuse them have written."""
    monkeypatch.setattr(low_rank_finetune, "check_target_modules", lambda *arguments: None)
    tiny_teacher(tie_word_embeddings=True, vocab_size=300).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    pin = resolve_teacher(TeacherParams(source=str(tmp_path / "teacher")), tmp_path)
    model = trained(lc.linearize(base(tmp_path / "teacher"), SETTINGS), ("q_proj", "lm_head"))
    lc.save_delta(model, tmp_path / "delta", pin)
    assert torch.equal(logits(lc.load_delta(tmp_path / "delta")), logits(model))
    with pytest.raises(UserError, match=r"adapts the output embedding, which .* ties to its input embeddings"):
        lc.load_delta(tmp_path / "delta", merge=True)
    with (
        closing(WeightFiles(tmp_path / "teacher")) as files,
        pytest.raises(RuntimeError, match=r"1 trained tensors belong to no weight .*, such as lm_head\.weight"),
    ):
        save_merged(model, files, torch.float32, tmp_path / "merged")


def test_a_delta_is_under_a_hundredth_of_a_large_model() -> None:
    """At Llama 3 8B's shape, counted: LoRA of rank 8 on four projections and the maps of every head, in float32."""
    layers, heads, key_heads, width, features, rank = 32, 32, 8, 128, 64, 8
    maps = layers * (2 * heads * width * features + heads)
    projections = [(heads * width,) * 2, (heads * width,) * 2, *[(heads * width, key_heads * width)] * 2]
    lora = layers * rank * sum(rows + columns for rows, columns in projections)
    assert 4 * (maps + lora) < 0.01 * 2 * 8.03e9


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_weights, r"belongs on .*teacher \(files \w{12}\) with weights \w{12}, but .*wrong has weights \w{12}"),
        (lambda folder: other_config(folder, rms_norm_eps=0.1), r"whose `rms_norm_eps` is 1e-06; .*wrong has 0.1"),
        (lambda folder: other_config(folder, num_hidden_layers=1), r"whose `num_hidden_layers` is 2; .*wrong has 1"),
        (lambda folder: tiny_teacher("qwen3").save_pretrained(folder), r"`model_type` is 'llama'; .*wrong has 'qwen3'"),
        (lambda folder: (folder / "config.json").unlink(), r"wrong has no config.json, so it is no model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "wrong does not load"),
    ],
)
def test_another_base_is_refused_and_both_are_named(
    spoil: Any, said: str, tmp_path: Path, teacher: Path, pin: TeacherPin
) -> None:
    lc.save_delta(trained(lc.linearize(base(teacher), SETTINGS)), tmp_path / "delta", pin)
    spoil(make_teacher(tmp_path / "wrong"))
    with pytest.raises(UserError, match=said) as caught:
        lc.load_delta(tmp_path / "delta", tmp_path / "wrong")
    assert "\n" not in str(caught.value)


def test_a_base_linearized_with_other_settings_or_in_another_dtype_is_refused(
    tmp_path: Path, teacher: Path, pin: TeacherPin
) -> None:
    lc.save_delta(trained(lc.linearize(base(teacher), SETTINGS)), tmp_path / "delta", pin)
    other = lc.linearize(base(teacher), lc.LinearizeConfig(window_size=16, feature_dim=8))
    with pytest.raises(UserError, match="delta: made with `window_size` 8, but the model has 16"):
        lc.load_delta(tmp_path / "delta", other)
    with pytest.raises(UserError, match=r"in float32, but .* is in torch\.bfloat16"):
        lc.load_delta(tmp_path / "delta", base(teacher, torch.bfloat16))


def test_a_base_that_moved_is_asked_for(tmp_path: Path, teacher: Path, pin: TeacherPin) -> None:
    lc.save_delta(trained(lc.linearize(base(teacher), SETTINGS)), tmp_path / "delta", pin)
    teacher.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="not at that path here; give its directory as `base`"):
        lc.load_delta(tmp_path / "delta")
    lc.load_delta(tmp_path / "delta", tmp_path / "moved")


def test_a_damaged_delta_is_one_line(tmp_path: Path, teacher: Path, pin: TeacherPin) -> None:
    folder = tmp_path / "delta"
    lc.save_delta(trained(lc.linearize(base(teacher), SETTINGS)), folder, pin)
    for name in (ADAPTER, "adapter_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-40])
        with pytest.raises(UserError, match=f"{name} is not the file that delta.json was written for"):
            read_delta(folder)
        (folder / name).write_bytes(content)
    text = (folder / DELTA).read_text()
    values = json.loads(text)
    for broken in (
        "{",
        "{}",
        "[]",
        json.dumps(values | {"dtype": "nn"}),
        json.dumps(values | {"linearize": {"window": "round"}}),
    ):
        (folder / DELTA).write_text(broken)
        with pytest.raises(UserError, match=r"delta\.json is damaged"):
            read_delta(folder)
    (folder / DELTA).unlink()
    with pytest.raises(UserError, match=r"no delta\.json in it, so it is no delta"):
        read_delta(folder)


def test_the_fingerprint_is_of_the_teacher_s_weights_and_sees_every_change(teacher: Path) -> None:
    softmax = base(teacher)
    expected = fingerprint(softmax)
    student = lc.linearize(softmax, SETTINGS)
    assert fingerprint(student) == expected
    assert fingerprint(trained(student)) == expected
    assert fingerprint(softmax.bfloat16()) != expected
    changed = base(teacher)
    with torch.no_grad():
        weight = changed.model.layers[0].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]]
    assert fingerprint(changed) != expected


def test_maps_trained_in_stage_2_travel_with_the_adapter(tmp_path: Path, teacher: Path, pin: TeacherPin) -> None:
    model = add_lora(
        lc.linearize(base(teacher), SETTINGS), FinetuneParams(lora_rank=2, train_feature_maps=True), seed=0
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in trainable} == {"weight", "w_q", "w_k", "window_factor"}
    lc.save_delta(trained(lc.linearize(base(teacher), SETTINGS)), tmp_path / "delta", pin)
    untrained = named_map_parameters(lc.linearize(base(teacher), SETTINGS))
    for name, parameter in named_map_parameters(lc.load_delta(tmp_path / "delta", merge=True)).items():
        assert not torch.equal(parameter, untrained[name])
