"""A GGUF file is a teacher: what it stands for, exactly, or one line before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import constants
from safetensors.torch import load_file

from lolcats_common.errors import UserError
from lolcats_common.params import TeacherParams, params_from_dict
from lolcats_common.sources import check_sources
from lolcats_core.estimation.doctor import doctor
from lolcats_core.teacher import gguf_model
from lolcats_core.teacher.checks import INDEX, WEIGHTS
from lolcats_core.teacher.pin import Teacher, describe, examine_teacher, resolve_teacher, write_pin
from tests.core.tiny import tiny_teacher, tiny_tokenizer, tokens

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def teacher(family: str = "llama", **changes: Any) -> Any:
    return tiny_teacher(family, **SHAPE | changes)


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's Llama files hold them: dims that turn together stand side by side."""
    firsts, seconds = np.split(rows.reshape(heads, -1, *rows.shape[1:]), 2, axis=1)
    return np.stack([firsts, seconds], axis=2).reshape(rows.shape)


def write(
    path: Path, model: Any, kind: Kind = Kind.F32, values: dict[str, Any] | None = None, extra: Any = None
) -> Path:
    """The model as llama.cpp would write it, its matrices in `kind`."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index < 6 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in (values or {}).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    table = gguf.get_tensor_name_map(writer_arch(config.model_type), config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        rows = parameter.detach().float().numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            rows = in_pairs(rows, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stored = kind if rows.ndim == 2 else Kind.F32
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), gguf.quantize(rows, stored), raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def writer_arch(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def pinned(source: str, root: Path) -> Teacher:
    out = root / "outputs" / "teacher"
    out.mkdir(parents=True, exist_ok=True)
    write_pin(resolve_teacher(TeacherParams(source=source), root), root, out)
    return Teacher.open(out)


@pytest.mark.parametrize("family", gguf_model.ARCHITECTURES)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_the_weights_are_exactly_those_that_the_file_stands_for(tmp_path: Path, family: str, kind: Kind) -> None:
    model = teacher(family)
    write(tmp_path / "m.gguf", model, kind)
    found = pinned("m.gguf", tmp_path)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            rows = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind)
            parameter.data = torch.from_numpy(rows.copy())
    stored = load_file(found.folder / WEIGHTS)
    assert stored.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name].float(), parameter), name
    ids = tokens(2, 40)
    assert torch.equal(found.load(torch.float32, "cpu")(ids).logits, model(ids).logits)
    kept = {Kind.F16: "F16", Kind.BF16: "BF16"}
    assert (found.pin.kind, found.pin.dtype) == ("gguf", kept.get(kind, "F32"))
    assert found.pin.architecture == gguf_model.ARCHITECTURES[family]


def test_the_tokenizer_comes_from_the_file(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", teacher())
    found, expected = pinned("m.gguf", tmp_path).tokenizer(), tiny_tokenizer()
    text = "def the quick brown fox: é\n\treturn 12 <|end|>"
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found.decode(found(text)["input_ids"]) == text
    assert (found.eos_token, found.chat_template) == ("<eos>", expected.chat_template)


def test_a_tied_head_is_tied(tmp_path: Path) -> None:
    model = teacher(tie_word_embeddings=True)
    write(tmp_path / "m.gguf", model)
    found = pinned("m.gguf", tmp_path)
    assert found.config.tie_word_embeddings
    ids = tokens(1, 20)
    assert torch.equal(found.load(torch.float32, "cpu")(ids).logits, model(ids).logits)


def test_llama_3_1s_rotary_frequencies_are_recognized(tmp_path: Path) -> None:
    rotary = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = teacher(rope_parameters=rotary)
    plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() == pytest.approx(8)
    write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors})
    assert pinned("m.gguf", tmp_path).config.rope_parameters == rotary
    write(tmp_path / "other.gguf", model, extra={"rope_freqs.weight": divisors + 1})
    with pytest.raises(UserError, match=r"holds other frequencies than Llama 3\.1's"):
        examine_teacher(TeacherParams(source="other.gguf"), tmp_path)


def test_large_files_become_shards_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "SHARD_BYTES", 100_000)
    model = teacher()
    write(tmp_path / "m.gguf", model)
    found = pinned("m.gguf", tmp_path)
    assert INDEX in found.pin.files
    assert len(list(found.folder.glob("*.safetensors"))) > 2
    ids = tokens(1, 20)
    assert torch.equal(found.load(torch.float32, "cpu")(ids).logits, model(ids).logits)


def test_a_directory_that_was_removed_is_made_again_with_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    source = write(tmp_path / "m.gguf", teacher(), Kind.Q8_0)
    found = pinned("m.gguf", tmp_path)
    first = found.folder
    first.rename(cache / "elsewhere")
    again = Teacher.open(tmp_path / "outputs" / "teacher")
    assert again.folder == first  # every byte was compared with the pin
    source.unlink()
    assert Teacher.open(tmp_path / "outputs" / "teacher").folder == first


def test_a_file_that_changed_after_pinning_is_seen_by_the_inputs_and_refused_by_the_pin(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", teacher())
    found = pinned("m.gguf", tmp_path)
    before = describe(TeacherParams(source="m.gguf"), tmp_path)
    assert before["files"] == {"m.gguf": found.pin.revision}
    write(tmp_path / "m.gguf", teacher(seed=1))
    assert describe(TeacherParams(source="m.gguf"), tmp_path) != before
    gguf_model.folder_of(str(found.pin.revision)).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"m\.gguf changed since it was pinned"):
        Teacher.open(tmp_path / "outputs" / "teacher").load(torch.float32, "cpu")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


REFUSED: dict[str, tuple[Any, str]] = {
    "no GGUF": (lambda p: p.write_text("not a model, but text that is long enough"), "is no GGUF file"),
    "empty": (lambda p: p.write_bytes(b""), "is no GGUF file"),
    "cut in the header": (lambda p: cut(write(p, teacher()), 3000), "is damaged"),
    "cut in the weights": (lambda p: cut(write(p, teacher()), 200_000), "is cut short in"),
    "another architecture": (lambda p: write_header(p, "t5"), "llama, qwen2, qwen3 are read .*, got 't5'"),
    "no model": (lambda p: write_header(p, "llama"), "does not say `llama.block_count`"),
    "one part of several": (lambda p: write(p, teacher(), values={"split.count": 2}), "one of 2 parts"),
    "experts": (lambda p: write(p, teacher(), values={"llama.expert_count": 8}), "`llama.expert_count` is 8"),
    "scaled positions": (
        lambda p: write(p, teacher(), values={"llama.rope.scaling.type": "yarn"}),
        "`llama.rope.scaling.type` is 'yarn'",
    ),
    "a tensor too many": (
        lambda p: write(p, teacher(), extra={"blk.0.attn_q.bias": np.zeros(64, np.float32)}),
        "has blk.0.attn_q.bias, which llama models do not have",
    ),
    "a tensor too few": (
        lambda p: write(p, teacher(num_hidden_layers=1), values={"llama.block_count": 2}),
        "lacks blk.1.attn_q.weight",
    ),
}


def write_header(path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_no_use_is_refused_in_one_line_before_anything_is_written(
    tmp_path: Path, cache: Path, case: str
) -> None:
    make, message = REFUSED[case]
    make(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=message) as error:
        examine_teacher(TeacherParams(source="m.gguf"), tmp_path)
    assert str(error.value).startswith("teacher m.gguf")
    assert "\n" not in str(error.value)
    assert not cache.exists()


def test_names_of_gguf_files_are_told_apart_without_reading_them(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.Q8_0.gguf").touch()
    check_sources(params_from_dict({"teacher": {"source": "models/m.Q8_0.gguf"}}), tmp_path)
    for source, message in (("models/other.gguf", "no such file"), ("models", r"give the file m\.Q8_0\.gguf in it")):
        with pytest.raises(UserError, match=message):
            check_sources(params_from_dict({"teacher": {"source": source}}), tmp_path)


def test_the_doctor_knows_the_file(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", teacher(), Kind.Q8_0)
    findings = {f.name: f for f in doctor(params_from_dict({"teacher": {"source": "m.gguf"}}), tmp_path)}
    assert findings["teacher"].status == "ok"
    assert "dequantized once" in findings["teacher"].detail
    assert "memory, transfer" in findings
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    findings = {f.name: f for f in doctor(params_from_dict({"teacher": {"source": "m.gguf"}}), tmp_path)}
    assert findings["teacher"].status == "missing"
    assert "is damaged" in findings["teacher"].detail
