"""A teacher is checked and pinned before anything expensive, and loads only while it is unchanged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from lolcats_common.errors import UserError
from lolcats_common.params import TeacherParams
from lolcats_core.data.arrays import ArrayRows
from lolcats_core.data.sources import stdlib_documents
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.pretraining.data import encode, save_tokenizer, train_tokenizer
from lolcats_core.teacher.checks import INDEX, WEIGHTS
from lolcats_core.teacher.pin import BUILTIN, Teacher, resolve_teacher, write_pin
from lolcats_core.training.perplexity import bigram_perplexity, perplexity
from tests.core.tiny import tiny_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n",
]


def make_teacher(folder: Path, *, vocab_size: int = 300, tokens: int = 280, sharded: bool = False) -> Path:
    """A tiny random Llama with a tokenizer, in the files that transformers writes."""
    model = tiny_teacher(
        vocab_size=vocab_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    save_tokenizer(train_tokenizer(TEXTS, tokens), folder, context=64)
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "teacher")


def resolve(source: Path | str, root: Path, **values: Any) -> Any:
    return resolve_teacher(TeacherParams(source=str(source), **values), root)


def pinned(source: Path | str, root: Path) -> Path:
    out = root / "outputs" / "teacher"
    out.mkdir(parents=True)
    write_pin(resolve(source, root), root, out)
    return out


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_pinned_directory_loads_back_with_the_same_weights(tmp_path: Path, sharded: bool) -> None:
    source = make_teacher(tmp_path / "teacher", sharded=sharded)
    assert (source / INDEX).exists() == sharded
    out = pinned("teacher", tmp_path)  # relative to the root
    pin = Teacher.open(out).pin
    model = Teacher.open(out).load(torch.float32, "cpu")
    assert pin.kind == "directory"
    assert (pin.vocab_size, pin.layers, pin.context, pin.dtype) == (300, 2, 64, "F32")
    assert pin.parameters == sum(p.numel() for p in model.parameters())
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(p.requires_grad for p in model.parameters())
    expected = LlamaForCausalLM.from_pretrained(source)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    tokenizer = Teacher.open(out).tokenizer()
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]


def test_pinning_twice_gives_the_same_pin(teacher: Path, tmp_path: Path) -> None:
    assert resolve(teacher, tmp_path) == resolve(teacher, tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_teacher_that_changed_after_pinning_is_refused(teacher: Path, tmp_path: Path, name: str) -> None:
    out = pinned(teacher, tmp_path)
    data = bytearray((teacher / name).read_bytes())
    data[-3] ^= 1  # same size
    (teacher / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} changed since the teacher was pinned") as error:
        Teacher.open(out).load(torch.float32, "cpu")
    assert "dvc repro --force teacher" in one_line(error)


def test_a_file_that_is_gone_after_pinning_is_named(teacher: Path, tmp_path: Path) -> None:
    out = pinned(teacher, tmp_path)
    (teacher / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS} is gone"):
        Teacher.open(out).load(torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chat_template.jinja", "chat_template.jinja was added since the teacher was pinned"),
        ("adapter_config.json", "adapter_config.json says that an adapter belongs onto the weights"),
        (INDEX, "cannot both be the weights"),
    ],
)
def test_a_file_that_transformers_would_read_besides_those_pinned_is_refused(
    teacher: Path, tmp_path: Path, name: str, said: str
) -> None:
    out = pinned(teacher, tmp_path)
    (teacher / name).write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))
    with pytest.raises(UserError, match=said):
        Teacher.open(out).load(torch.float32, "cpu")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is damaged"),
    "config is not UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "config.json is damaged"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a mapping"),
    "config with impossible values": (
        lambda d: edit_json(d / "config.json", hidden_size="wide"),
        "`hidden_size` in config.json must be a whole number from 1",
    ),
    "other architecture": (lambda d: edit_json(d / "config.json", model_type="t5"), "architecture 't5' cannot be"),
    "odd architecture": (lambda d: edit_json(d / "config.json", model_type=[1]), r"architecture \[1\] cannot be"),
    "no architecture": (lambda d: edit_json(d / "config.json", model_type=None), "architecture None cannot be"),
    "already linearized": (lambda d: edit_json(d / "config.json", model_type="lolcats_llama"), "already a linearized"),
    "quantized": (lambda d: edit_json(d / "config.json", quantization_config={"bits": 4}), "quantized"),
    "quantized by a named method": (
        lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "quantized weights cannot be linearized .config.json says awq.; give the unquantized model, or a GGUF file",
    ),
    "compressed tensors as older files say it": (
        lambda d: edit_json(d / "config.json", compression_config={"quant_method": "compressed-tensors"}),
        "says compressed-tensors",
    ),
    "8-bit floats of which config.json says nothing": (
        lambda d: replace(d / WEIGHTS, "model.norm.weight", torch.zeros(32).to(torch.float8_e4m3fn)),
        "model.norm.weight is F8_E4M3",
    ),
    "4-bit integers of which config.json says nothing": (
        lambda d: replace(d / WEIGHTS, "model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 32, dtype=torch.int32)),
        "up_proj.qweight is I32",
    ),
    "bitsandbytes of which config.json says nothing": (
        lambda d: replace(d / WEIGHTS, "model.layers.0.mlp.up_proj.weight.absmax", torch.zeros(4)),
        "up_proj.weight.absmax is F32",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "weights are missing"),
    "pickled weights only": (pickle_only, "pickled weights are not loaded"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "damaged"),
    "weights cut in the header": (lambda d: truncate(d / WEIGHTS, 50), "header is cut short"),
    "weights cut in the data": (lambda d: truncate(d / WEIGHTS, 20_000), "its header says"),
    "weights of noise": (lambda d: (d / WEIGHTS).write_bytes(bytes(range(256)) * 9), "header is cut short"),
    "weights whose header is no JSON": (
        lambda d: (d / WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"notjson!"),
        "header is not JSON",
    ),
    "weights whose header is malformed": (
        lambda d: (d / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b'{"a": [] '[:8] + b"}"),
        "header is malformed",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer is missing"),
    "tokenizer is no JSON": (lambda d: (d / "tokenizer.json").write_text("{}}"), "tokenizer.json is damaged"),
    "tokenizer of another kind": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_before_weights_are_loaded(teacher: Path, tmp_path: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(teacher)
    with pytest.raises(UserError, match=message) as error:
        resolve(teacher, tmp_path)
    assert one_line(error).startswith(f"teacher {teacher}")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "teacher", sharded=True)
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}, named in {INDEX}, is missing"):
        resolve(source, tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "teacher", sharded=True)
    shard = sorted(source.glob("model-*.safetensors"))[0]
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(UserError, match=f"{shard.name} lacks the tensor"):
        resolve(source, tmp_path)


def test_an_index_may_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "teacher", sharded=True)
    (source / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="outside the model's directory"):
        resolve(source, tmp_path)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "teacher", vocab_size=270, tokens=280)
    with pytest.raises(UserError, match="token 279, the model embeddings for 270 tokens only"):
        resolve(source, tmp_path)


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_noise(teacher: Path, tmp_path: Path) -> None:
    weights = load_file(teacher / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, teacher / WEIGHTS, metadata={"format": "pt"})
    out = pinned(teacher, tmp_path)
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        Teacher.open(out).load(torch.float32, "cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such directory, and not a Hugging Face id"),
        ("builtn", "did you mean `builtin`"),
        ("a/b/c", "not a Hugging Face id"),
    ],
)
def test_a_source_that_is_nothing_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(source, tmp_path)


def test_a_plain_name_is_a_hub_id_as_people_write_them(hub: FakeHub, tmp_path: Path) -> None:
    pin = resolve("gpt2", tmp_path, revision=COMMIT)
    assert (pin.kind, pin.source) == ("hub", "gpt2")


def test_a_file_in_place_of_a_directory_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        resolve(teacher / WEIGHTS, tmp_path)


def test_a_damaged_pin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.json is missing; run `dvc repro teacher`"):
        Teacher.open(tmp_path).tokenizer()
    (tmp_path / "teacher.json").write_text('{"source": "builtin"')
    with pytest.raises(UserError, match="is damaged"):
        Teacher.open(tmp_path).tokenizer()


# The hub: a fake one that serves a local directory.


class FakeHub:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.error, self.fetched = folder, None, []  # type: Path, Exception | None, list[str]
        self.cached = False
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "is_offline_mode", lambda: constants.HF_HUB_OFFLINE)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def list_repo_files(self, repo: str, revision: str) -> list[str]:
        if self.error:
            raise self.error
        return [path.name for path in self.folder.iterdir()]

    def model_info(self, repo: str, revision: str | None, timeout: float) -> Any:
        if self.error:
            raise self.error
        return dataclasses.make_dataclass("Info", ["sha"])(COMMIT)

    def snapshot(self, repo: str, *, revision: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only and not self.cached:
            raise errors.LocalEntryNotFoundError("not cached")
        if self.error and not local_files_only:
            raise self.error
        self.fetched += allow_patterns
        return str(self.folder)


@pytest.fixture
def hub(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(teacher, monkeypatch)


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/x"))
    return kind(f"{status} Client Error\nmore lines", response=response)


def test_a_hub_id_is_pinned_by_commit_and_content(hub: FakeHub, tmp_path: Path) -> None:
    out = pinned_hub(tmp_path)
    pin = Teacher.open(out).pin
    assert (pin.kind, pin.revision) == ("hub", COMMIT)
    assert pin.files == resolve(hub.folder, tmp_path).files
    assert Teacher.open(out).load(torch.bfloat16, "cpu").dtype == torch.bfloat16


def pinned_hub(root: Path) -> Path:
    out = root / "outputs" / "teacher"
    out.mkdir(parents=True)
    write_pin(resolve("owner/name", root, revision=COMMIT), root, out)
    return out


def test_only_needed_files_are_fetched_and_weights_last(hub: FakeHub, tmp_path: Path) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"never")
    (hub.folder / "modeling_x.py").write_text("raise SystemExit")
    resolve("owner/name", tmp_path, revision=COMMIT)
    assert not {"pytorch_model.bin", "modeling_x.py"} & set(hub.fetched)
    assert hub.fetched.index(WEIGHTS) > hub.fetched.index("tokenizer.json")


def test_no_weights_are_fetched_for_an_unsupported_architecture(hub: FakeHub, tmp_path: Path) -> None:
    edit_json(hub.folder / "config.json", model_type="mamba")
    with pytest.raises(UserError, match="architecture 'mamba' cannot be linearized"):
        resolve("owner/name", tmp_path, revision=COMMIT)
    assert WEIGHTS not in hub.fetched


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_a_revision_that_is_no_commit_is_refused_with_the_commit_to_take(
    hub: FakeHub, tmp_path: Path, revision: str | None
) -> None:
    with pytest.raises(UserError, match=f"set `teacher.revision: {COMMIT}`") as error:
        resolve("owner/name", tmp_path, revision=revision)
    assert "40 hexadecimal digits" in one_line(error)
    assert not hub.fetched


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError, 401), "is gated; accept its licence at https://huggingface.co/owner/name"),
        (http_error(errors.HfHubHTTPError, 403), "is gated"),
        (http_error(errors.RepositoryNotFoundError, 404), "is not on the Hugging Face hub, or is private"),
        (http_error(errors.RepositoryNotFoundError, 401), "set HF_TOKEN"),
        (http_error(errors.RevisionNotFoundError, 404), f"has no revision {COMMIT}"),
        (http_error(errors.HfHubHTTPError, 503), "could not be fetched"),
        (httpx2.ConnectError("no route"), "the Hugging Face hub cannot be reached"),
        (errors.OfflineModeIsEnabled("off"), "hf download owner/name --revision"),
        (errors.HFValidationError("bad"), "not a valid Hugging Face id"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("where", ["listing", "download"])
def test_what_the_hub_refuses_ends_in_one_line_that_says_what_to_do(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, where: str
) -> None:
    hub.error = error
    if where == "download":
        names = [path.name for path in hub.folder.iterdir()]
        monkeypatch.setattr(hub, "list_repo_files", lambda repo, revision: names)
    with pytest.raises(UserError, match=message) as raised:
        resolve("owner/name", tmp_path, revision=COMMIT)
    assert "owner/name" in one_line(raised)


def test_an_unreachable_hub_is_no_obstacle_when_everything_is_cached(hub: FakeHub, tmp_path: Path) -> None:
    hub.cached, hub.error = True, httpx2.ConnectError("no route")
    assert resolve("owner/name", tmp_path, revision=COMMIT).kind == "hub"


def test_offline_without_a_cache_says_how_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set and the cache lacks") as error:
        resolve("owner/name", tmp_path, revision=COMMIT)
    assert f"hf download owner/name --revision {COMMIT}" in one_line(error)
    with pytest.raises(UserError, match=r"take one from https://huggingface\.co/owner/name/commits"):
        resolve("owner/name", tmp_path)


# The builtin teacher


def test_the_builtin_teacher_is_what_its_record_says(tmp_path: Path) -> None:
    record = json.loads((BUILTIN / "TEACHER.json").read_text())
    out = pinned("builtin", tmp_path)
    pin = Teacher.open(out).pin
    assert {name: pin.files[name] for name in record["files"] if name in pin.files} == {
        name: digest for name, digest in record["files"].items() if name in pin.files
    }
    assert pin.parameters == record["parameters"]
    assert 3e6 <= pin.parameters <= 6e6
    assert (BUILTIN / WEIGHTS).stat().st_size <= 12_000_000
    assert (pin.dtype, pin.model_type) == ("BF16", "llama")
    assert pin.layers >= 6
    assert pin.context is not None
    assert pin.context >= 1024
    assert Teacher.open(out).load(torch.float32, "cpu").config.head_dim >= 32


def test_the_builtin_teacher_was_trained_on_permissive_sources_without_the_standard_library() -> None:
    record = json.loads((BUILTIN / "TEACHER.json").read_text())
    sources = record["data"]["train"] + record["data"]["validation"]
    assert len(sources) > 50
    assert all(len(source["sha256"]) == 64 and source["bytes"] > 0 for source in sources)
    assert not any("GPL" in source["licence"] or "MPL" in source["licence"] for source in sources)
    assert not {"importlib-metadata", "typing-extensions", "zipp"} & {source["name"] for source in sources}


def test_the_builtin_teacher_predicts_the_standard_library_and_recalls_what_it_saw(tmp_path: Path) -> None:
    out = pinned("builtin", tmp_path)
    model = Teacher.open(out).load(torch.float32, "cpu")
    texts = [text for _, (_, text) in zip(range(120), stdlib_documents(), strict=False)]
    tokens = encode(Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")), texts)
    rows = ArrayRows(tokens, 512, 4096, max_rows=16)
    # A bigram model fitted to these very modules, which favours it.
    bigram = bigram_perplexity(ArrayRows(tokens, 512, 4096), rows, 4096).perplexity
    assert perplexity(model, rows, batch_size=4).perplexity < bigram / 2
    recall = copy_recall(model, 4096, [128, 256], samples=4, seed=0, batch_size=4, exclude_ids=(0,))
    assert all(result.value > 0.9 for result in recall.values())
