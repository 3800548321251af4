"""An export holds all that others need: the model in either form, its code, its tokenizer and a card that tells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from lolcats_common.params import TeacherParams, load_params
from lolcats_core.evaluation.code_continuation import Item, write_task
from lolcats_core.evaluation.harness import run_lm_eval
from lolcats_core.teacher.pin import resolve_teacher, write_pin
from tasks.cli.export import export
from tasks.cli.generation import Sampling, stream
from tasks.registry import register
from tasks.versioning import dvc_graph
from tests.core.export.test_delta import trained
from tests.core.teacher.test_pin import make_teacher

EVALUATION = {
    "perplexity": {"teacher": 10.0, "finetuned": 12.0},
    "perplexity_tokens": 4096,
    "recall": {
        "teacher": {"128": {"value": 0.9, "stderr": 0.01}},
        "finetuned": {"128": {"value": 0.09, "stderr": 0.02}},
    },
    "tasks": {
        "piqa": {
            "metric": "acc",
            "items": 50,
            "teacher": {"value": 0.8, "stderr": 0.05},
            "finetuned": {"value": 0.7, "stderr": 0.06},
        }
    },
    "lm_eval_version": "0.4",
    "task_hashes": {},
}


@pytest.fixture
def finished(fake_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the outputs of a tiny teacher, up to date as far as DVC is asked."""
    root, outputs = fake_project, fake_project / "outputs"
    teacher = make_teacher(root / "tiny")
    pin = resolve_teacher(TeacherParams(source=str(teacher)), root)
    write_pin(pin, root, outputs / "teacher")
    softmax = LlamaForCausalLM.from_pretrained(teacher)
    model = trained(lc.linearize(softmax, lc.LinearizeConfig(window_size=8, feature_dim=8)))
    lc.save_delta(model, outputs / "finetune" / "adapter", pin)
    model.merge_and_unload().save_pretrained(outputs / "finetune" / "model")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(outputs / "finetune" / "model")
    write_json(outputs / "evaluate" / "evaluation.json", EVALUATION)
    stages = {
        "prepare": {"outs": [{"path": "outputs/prepare", "md5": "rows"}]},
        "finetune": {"outs": [{"path": "outputs/finetune", "md5": "out"}]},
        "evaluate": {"deps": [{"path": "outputs/finetune/model", "md5": "m1"}], "outs": []},
    }
    locked = {name: {"cmd": "true", **stage} for name, stage in stages.items()}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": locked}))
    monkeypatch.setattr(dvc_graph, "changed", lambda root, anew=False: {})
    monkeypatch.setattr(dvc_graph, "push_if_remote", lambda root: False)
    return root


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 280, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("source", [None, "candidate"])
def test_both_forms_are_the_finetuned_model_bitwise(
    finished: Path, source: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(finished / "outputs/finetune/model"))
    if source:
        register.register(finished, load_params(finished / "params.yaml"))
    merged = export(finished, source, form="merged")
    delta = export(finished, source, form="delta")
    assert (merged.name, delta.name) == ("lolcats-demo-merged", "lolcats-demo-delta")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(merged)), expected)
    assert torch.equal(logits(lc.load_delta(delta, merge=True)), expected)
    for folder in (merged, delta):
        assert AutoTokenizer.from_pretrained(folder)("def add")["input_ids"]
    assert not list(merged.parent.glob(".*"))
    for folder in (merged, delta):
        stream(folder, "def add", Sampling(8))
    first, second = capsys.readouterr().out.strip().split("def add")[1:]
    assert first.strip() == second.strip()


def test_shards_hold_the_same_weights(finished: Path, tmp_path: Path) -> None:
    folder = export(finished, None, to=tmp_path / "sharded", max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    whole = load_file(finished / "outputs/finetune/model/model.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    model = AutoModelForCausalLM.from_pretrained(finished / "outputs/finetune/model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


@pytest.mark.parametrize("form", ["merged", "delta"])
def test_the_card_tells_results_limits_lineage_and_recipe(finished: Path, form: str) -> None:
    register.register(finished, load_params(finished / "params.yaml"))
    card = ModelCard.load(export(finished, "lolcats-demo/1", form=form) / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {
        "perplexity": 12.0,
        "recall_128": 0.09,
        "recall_128_stderr": 0.02,
        "acc": 0.7,
        "acc_stderr": 0.06,
    }
    commit = subprocess.run(["git", "-C", finished, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for words in (
        "| piqa (acc, 50 items) | 0.800 ± 0.050 | 0.700 ± 0.060 |",
        "0.090 ± 0.020, the teacher 0.900 ± 0.010: 10% of its recall is left",
        f"| git.commit | {commit} |",
        "| dvc.md5.prepare | rows |",
        "| registered | lolcats-demo version 1 |",
        "lora_rank: 8",
        {"merged": "trust_remote_code=True", "delta": 'lc.load_delta("DIR")'}[form],
    ):
        assert words in re.sub(" +", " ", card.content)


def test_a_hub_teacher_is_named_as_the_base_model(finished: Path) -> None:
    path = finished / "outputs/teacher/teacher.json"
    pin = json.loads(path.read_text()) | {"kind": "hub", "source": "owner/name", "revision": "0" * 40}
    path.write_text(json.dumps(pin))
    card = ModelCard.load(export(finished, None) / "README.md")
    assert card.data.base_model == "owner/name"
    assert f"`owner/name` at {'0' * 40}" in card.content


def test_the_licence_is_the_one_that_the_teacher_s_own_card_names(finished: Path) -> None:
    path = finished / "outputs/teacher/teacher.json"
    pin = json.loads(path.read_text()) | {"kind": "directory", "source": "./teacher", "revision": None}
    path.write_text(json.dumps(pin))
    assert ModelCard.load(export(finished, None) / "README.md").data.license == "other"
    (finished / "teacher").mkdir()
    (finished / "teacher" / "README.md").write_text("---\nlicense: gemma\n---\n# Teacher\n")
    assert ModelCard.load(export(finished, None, force=True) / "README.md").data.license == "gemma"
    path.write_text(json.dumps(pin | {"kind": "builtin", "source": "builtin"}))
    assert ModelCard.load(export(finished, None, force=True) / "README.md").data.license == "apache-2.0"


def test_what_is_there_is_kept(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    export(finished, None, form="delta", to=folder)
    with pytest.raises(UserError, match="mine is not empty; give another directory, or --force"):
        export(finished, None, to=folder)
    assert (folder / "delta.json").is_file()
    export(finished, None, to=folder, force=True)
    assert not (folder / "delta.json").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds no earlier export, so --force does not replace it"):
        export(finished, None, to=tmp_path / "notes", force=True)
    with pytest.raises(UserError, match=r"README\.md is a file"):
        export(finished, None, to=tmp_path / "notes" / "README.md")

    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        export(finished, None, to=tmp_path / "notes" / "README.md" / "model")

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.cli.export.model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export(finished, None, to=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "project") == ["mine", "notes"]


def test_what_cannot_be_exported_is_refused_in_one_line(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="`--max-shard-size` is for `--form merged`"):
        export(finished, None, form="delta", max_shard_size="1GB")
    with pytest.raises(UserError, match="must be a number with KB, MB, GB or TB, got '3'"):
        export(finished, None, max_shard_size="3")
    with pytest.raises(UserError, match="no such directory or registered version"):
        export(finished, "champion")
    with monkeypatch.context() as patch:
        patch.setattr(dvc_graph, "changed", lambda root, anew=False: {"finetune": ["changed deps"]})
        with pytest.raises(UserError, match="finetune: outputs are not those"):
            export(finished, None)
    adapter = finished / "outputs/finetune/adapter/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is not the file that delta\.json was written for"):
        export(finished, None, form="delta")
    assert not (finished / "exports" / "lolcats-demo-delta").exists()


WITHOUT = """
import runpy, sys
for name in ("lolcats_core", "lolcats_kernels", "tasks"):
    sys.modules[name] = None
"""
BARE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
"""
LM_EVAL = """
sys.argv[0] = "lm_eval"
runpy.run_module("lm_eval", run_name="__main__")
"""


def without_this_package(code: str, folder: Path, *arguments: str) -> None:
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_sharded_export_loads_bitwise_without_this_package(finished: Path, tmp_path: Path) -> None:
    folder = export(finished, None, to=tmp_path / "sharded", max_shard_size="40KB")
    ids = torch.randint(3, 280, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids")
    without_this_package(BARE, tmp_path, str(folder), str(tmp_path / "ids"), str(tmp_path / "logits"))
    model = AutoModelForCausalLM.from_pretrained(finished / "outputs/finetune/model")
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), logits(model))


@pytest.mark.slow
def test_lm_eval_s_own_command_line_evaluates_an_export_without_this_package(finished: Path, tmp_path: Path) -> None:
    folder = export(finished, None, to=tmp_path / "model")
    items = [Item(f"x = {n}\n" * 12, [f"y = {m}" for m in range(4)], n % 4, 0) for n in range(12)]
    write_task(items, tmp_path / "items.jsonl", tmp_path / "task")
    command = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True", "--device", "cpu"]
    command += ["--tasks", "code_continuation", "--include_path", str(tmp_path / "task"), "--batch_size", "4"]
    without_this_package(LM_EVAL, tmp_path, *command, "--output_path", str(tmp_path / "results"))
    (written,) = (tmp_path / "results").rglob("results_*.json")
    answered = json.loads(written.read_text())["results"]["code_continuation"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (expected,) = run_lm_eval(model, tokenizer, ["code_continuation"], task_dirs=[tmp_path / "task"]).values()
    assert answered["acc_norm,none"] == expected.value
    assert answered["acc,none"] == expected.metrics["acc"]
