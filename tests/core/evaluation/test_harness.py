"""lm-eval's own definitions, run on models whose answers are known, without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats_common.errors import UserError
from lolcats_core.evaluation.code_continuation import Item, write_task
from lolcats_core.evaluation.harness import run_lm_eval, task_hash
from lolcats_core.evaluation.task_files import task_folder

SHIPPED = Path(lm_eval.tasks.__file__).parent
TEXT = "".join(f"Line {n} of the text says that {n * n} is the square of {n}.\n" for n in range(60))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def continuation_items() -> list[Item]:
    lines = TEXT.splitlines()
    return [
        Item("\n".join(lines[n : n + 4]), ["\n" + lines[n + k] for k in (9, 8, 4, 7)], 2, 0) for n in range(0, 40, 2)
    ]


def shipped(folder: Path, file: str, docs: list[dict[str, Any]], splits: tuple[str, ...]) -> Path:
    """A folder with lm-eval's own task on local documents."""
    folder.mkdir(parents=True)
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    task = yaml.safe_load((SHIPPED / file).read_text(encoding="utf-8").replace("!function", ""))
    override = {
        "include": str(SHIPPED / file),
        "task": task["task"],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(data) for split in splits},
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(override), encoding="utf-8")
    return folder


def test_a_model_that_knows_the_text_answers_everything(
    memorizer: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no git checkout
    write_task(continuation_items(), tmp_path / "items.jsonl", tmp_path / "task")
    memorizer.know(tokenizer(TEXT)["input_ids"])
    result = run_lm_eval(memorizer, tokenizer, ["code_continuation"], task_dirs=[tmp_path / "task"], label="memorizer")[
        "code_continuation"
    ]
    assert (result.metric, result.value, result.stderr, result.items) == ("acc_norm", 1.0, 0.0, 20)
    assert (result.chance, result.higher_is_better) == (0.25, True)
    sample = result.samples[3]
    assert (sample["id"], sample["score"], sample["target"]) == (3, 1.0, "2")
    # Of four log-likelihoods, that of the right option is by far the highest.
    assert max(range(4), key=lambda option: sample["responses"][option][0]) == 2
    assert capfd.readouterr().err == ""


def test_two_models_get_the_same_questions_and_a_limit_cuts_them(
    model: LlamaForCausalLM, memorizer: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_task(continuation_items(), tmp_path / "items.jsonl", tmp_path / "task")
    memorizer.know(tokenizer(TEXT)["input_ids"])
    model.train()
    results = [
        run_lm_eval(one, tokenizer, ["code_continuation"], task_dirs=[tmp_path / "task"], limit=7)["code_continuation"]
        for one in (model, memorizer)
    ]
    assert results[0].hash == results[1].hash
    assert [len(result.samples) for result in results] == [7, 7]
    assert model.training
    model.eval()


def test_shipped_tasks_run_unmodified_on_local_documents_with_the_published_metric(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    arc = [
        {
            "id": str(n),
            "question": f"What is {n} and {n}?",
            "choices": {"text": [str(n), str(2 * n), "ten", "none of these"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        }
        for n in range(6)
    ]
    wikitext = [{"page": f" = Page {n} = \n The page number {n} ends ."} for n in range(3)]
    folders = [
        shipped(tmp_path / "easy", "arc/arc_easy.yaml", arc, ("train", "validation", "test")),
        shipped(tmp_path / "challenge", "arc/arc_challenge.yaml", arc, ("train", "validation", "test")),
        shipped(tmp_path / "wikitext", "wikitext/wikitext.yaml", wikitext, ("train", "validation", "test")),
    ]
    tasks = ["arc_easy", "arc_challenge", "wikitext"]
    results = run_lm_eval(model, tokenizer, tasks, task_dirs=folders)
    assert [results[name].metric for name in tasks] == ["acc", "acc_norm", "word_perplexity"]
    assert results["arc_easy"].value == results["arc_easy"].metrics["acc"]
    assert results["arc_easy"].items == 6
    assert results["wikitext"].value > 1
    assert "score" not in results["wikitext"].samples[0]


def test_an_unknown_task_is_refused_with_the_nearest_name(model: LlamaForCausalLM, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"names 'code_continuatoin'.*did you mean 'code_continuation'"):
        run_lm_eval(model, tokenizer, ["code_continuatoin"])


def test_data_out_of_reach_is_one_clear_error(
    model: LlamaForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"the data of piqa cannot be loaded .*connect to the network") as error:
        run_lm_eval(model, tokenizer, ["piqa"])
    assert "\n" not in str(error.value)


HOSTILE = """
task: hostile
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("unsafe_code: true\n", "hostile runs the code that the model writes"),
        ("include: base.yaml\n", "hostile runs the code that the model writes"),
        (
            "metric_list: [{metric: nobody/has_read_this}]\n",
            "nobody/has_read_this is code from the Hugging Face hub",
        ),
        ("process_results: !function code.score\n", "the metric code_eval is code from the Hugging Face hub"),
    ],
)
def test_a_task_that_would_run_code_of_the_model_or_of_the_hub_is_refused(
    tmp_path: Path, more: str, message: str
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"context": "a", "target": "b"}) + "\n")
    (tmp_path / "base.yaml").write_text("include: hostile.yaml\nunsafe_code: true\n")
    (tmp_path / "code.py").write_text("import evaluate\nevaluate.load('code_eval')\ndef score(*a): ...\n")
    (tmp_path / "hostile.yaml").write_text(HOSTILE.format(items=items) + more)
    with pytest.raises(UserError, match=message):
        task_hash("hostile", task_dirs=[tmp_path])


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_shipped_tasks_that_run_the_model_s_answers_are_refused_before_anything_is_loaded(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} runs the code that the model writes"):
        task_folder(name, ())


@pytest.mark.parametrize("name", ["/tmp/evil.yaml", "../evil", "!function os.system", "hostile.yaml"])
def test_a_task_is_named_and_not_a_file(name: str) -> None:
    with pytest.raises(UserError, match="which lm-eval does not know"):
        task_folder(name, ())
