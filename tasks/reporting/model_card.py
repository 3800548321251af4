"""The model card of an export: what it is, how to load it, what was measured, what is lost, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Parameters that decide the weights; the rest of params.yaml says where and how a run runs.
RECIPE = ("seed", "data", "linearize", "transfer", "select", "finetune")
LINEAGE = (
    "registered",
    "git.",
    "model.md5",
    "dvc.md5.",
    "run.",
    "teacher.",
    "data.",
    "lm_eval.",
    "version.",
    "gpu",
    "cpu",
)
LOAD = {
    "merged": """\
The directory holds the code that the model needs, so transformers alone loads it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

`lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True` evaluates it. With `lolcats_core` installed,
import that first and leave `trust_remote_code` out.""",
    "delta": """\
A delta holds what was trained (LoRA factors and feature maps) and names its base exactly; the base is not in it.

```python
import lolcats_core as lc
from transformers import AutoTokenizer

model = lc.load_delta("DIR")  # the adapter on the linearized base
model = lc.load_delta("DIR", merge=True)  # or merged, a plain transformers model
model = lc.load_delta("DIR", base="the/base")  # where the base lies in another directory
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

Any other base is refused. `PeftModel.from_pretrained(linearized_base, "DIR")` works too, without that check; on the
softmax model peft refuses it, because the module `linearized` is missing there.""",
}


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        title: of the source in words. name: of the registered model. form: ``merged`` or ``delta``.
        config: of the model. teacher: its pin. params: params.yaml. evaluation: evaluation.json.
        lineage: as a registered version's tags.
    """

    title: str
    name: str
    form: str
    config: dict[str, Any]
    teacher: dict[str, Any]
    params: dict[str, Any]
    evaluation: dict[str, Any]
    lineage: Mapping[str, str]


def model_card(facts: Facts) -> ModelCard:
    """The card, its metadata with a model-index in Hugging Face's format."""
    results = eval_results(facts)
    data = ModelCardData(
        model_name=facts.name,
        library_name="transformers" if facts.form == "merged" else "peft",
        pipeline_tag="text-generation",
        base_model=facts.teacher.get("source") if facts.teacher.get("kind") == "hub" else None,
        tags=["lolcats", "linear-attention", facts.config["model_type"]],
        eval_results=results or None,
    )
    sections = {
        "How to load": LOAD[facts.form],
        "Results": _results(facts),
        "Limits": "\n".join(f"- {line}" for line in limits(facts)),
        "Lineage": _table(("what", "which"), _lineage(facts)),
        "Recipe": _block({key: facts.params[key] for key in RECIPE if key in facts.params}),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {facts.name}\n\n{_summary(facts)}\n\n{body}\n")


def eval_results(facts: Facts) -> list[EvalResult]:
    """The student's results; a standard error is a metric of its own, named as lm-eval names it."""
    evaluation, data = facts.evaluation, f"{_data(facts)}, validation rows"
    found = []

    def add(task: str, dataset: str, metric: str, result: Mapping[str, Any], name: str | None = None) -> None:
        for key, suffix in (("value", ""), ("stderr", "_stderr")):
            if result.get(key) is not None:
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=task,
                        dataset_name=dataset,
                        metric_type=metric + suffix,
                        metric_value=result[key],
                        metric_name=f"{name or metric}{', standard error' if suffix else ''}",
                    )
                )

    if "finetuned" in evaluation.get("perplexity", {}):
        add("validation", data, "perplexity", {"value": evaluation["perplexity"]["finetuned"]})
    for gap, result in evaluation.get("recall", {}).get("finetuned", {}).items():
        add("copying_recall", "random tokens", f"recall_{gap}", result, f"copying recall at gap {gap}")
    for task, compared in evaluation.get("tasks", {}).items():
        add(task, task, compared.get("metric", "acc"), compared["finetuned"])
    return found


def limits(facts: Facts) -> list[str]:
    """What a reader must know before relying on the model, from what was measured."""
    evaluation = facts.evaluation
    perplexity, recall = evaluation.get("perplexity", {}), evaluation.get("recall", {})
    lines = []
    if {"teacher", "finetuned"} <= perplexity.keys():
        ratio = perplexity["finetuned"] / perplexity["teacher"]
        lines.append(f"Perplexity is {ratio:.3f} times the teacher's, which hides the loss of long-range recall.")
    for gap, student in recall.get("finetuned", {}).items():
        teacher = recall.get("teacher", {}).get(gap)
        if teacher and teacher["value"] > 0:
            share = student["value"] / teacher["value"]
            lines.append(
                f"Copying a random string over {gap} tokens: {_measured(student)}, the teacher {_measured(teacher)}: "
                f"{share:.0%} of its recall is left."
            )
    if not recall.get("finetuned"):
        lines.append("Long-range recall was not measured; students of this recipe usually lose it beyond the window.")
    context = facts.teacher.get("context")
    if context:
        lines.append(f"The teacher was trained for {context} tokens; nothing is known beyond, though decoding goes on.")
    lines.append(
        "The decode state is a sum over the past, so tokens cannot be taken back: assisted and prompt-lookup decoding "
        "are refused."
    )
    return lines


def _summary(facts: Facts) -> str:
    settings = facts.config.get("linearize", {})
    kept = settings.get("softmax_layers") or []
    layers = f"; layers {', '.join(map(str, kept))} keep softmax attention" if kept else ""
    return (
        f"{_teacher(facts)} with its softmax attention replaced by learned linear attention and a softmax window "
        f"(LoLCATs, [arXiv 2410.10254](https://arxiv.org/abs/2410.10254)): window {settings.get('window')} of "
        f"{settings.get('window_size')}, feature map {settings.get('feature_map')} of {settings.get('feature_dim')}"
        f"{layers}. The decode state does not grow. Exported from {facts.title} in {facts.form} form."
    )


def _teacher(facts: Facts) -> str:
    source = facts.teacher.get("source") or facts.lineage.get("teacher.source", "unknown")
    revision = facts.teacher.get("revision")
    return f"`{source}` at {revision}" if revision else f"The teacher `{source}`"


def _data(facts: Facts) -> str:
    return str(facts.params.get("data", {}).get("source", facts.lineage.get("data.source", "the data set")))


def _results(facts: Facts) -> str:
    evaluation = facts.evaluation
    rows = []
    perplexity, recall = evaluation.get("perplexity", {}), evaluation.get("recall", {})
    if "finetuned" in perplexity:
        tokens = f" ({evaluation['perplexity_tokens']:,} tokens)" if "perplexity_tokens" in evaluation else ""
        sides = (f"{perplexity[side]:.4g}" if side in perplexity else "" for side in ("teacher", "finetuned"))
        rows.append((f"perplexity on {_data(facts)}{tokens}", *sides))
    for gap, result in recall.get("finetuned", {}).items():
        teacher = recall.get("teacher", {}).get(gap)
        rows.append((f"copying recall at gap {gap}", _measured(teacher), _measured(result)))
    for task, compared in evaluation.get("tasks", {}).items():
        items = f", {compared['items']} items" if "items" in compared else ""
        sides = (_measured(compared.get(side)) for side in ("teacher", "finetuned"))
        rows.append((f"{task} ({compared.get('metric', 'acc')}{items})", *sides))
    if not rows:
        return "None were kept with this version."
    return _table(("", "teacher", "this model"), rows) + "\n\nValue ± standard error."


def _lineage(facts: Facts) -> list[tuple[str, str]]:
    known = {key: value for key, value in facts.lineage.items() if value != "None"}
    rows = [(key, value) for key, value in sorted(known.items()) if key.startswith(LINEAGE)]
    if facts.teacher:
        rows.append(("teacher files, SHA-256", str(facts.teacher.get("digest"))))
    return rows


def _measured(result: Mapping[str, Any] | None) -> str:
    if not result:
        return ""
    error = result.get("stderr")
    return f"{result['value']:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _block(values: dict[str, Any]) -> str:
    if not values:
        return "Not kept with this version."
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False).strip()}\n```"
