"""The model card of an export: what it is, how to load it, what was measured, what is lost, where it comes from."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lolcats_common.errors import printable
from lolcats_common.records import SIDES, Evaluation, Measured, Side
from lolcats_common.tables import markdown_table, measured, number
from lolcats_core.model.transformers_versions import REQUIREMENT

# Parameters that decide the weights; the rest of params.yaml says where and how a run runs.
RECIPE = ("seed", "data", "linearize", "transfer", "select", "finetune")
# Beginnings of the tags that say where a model comes from.
ORIGIN = ("registered", "git.", "model.md5", "dvc.md5.", "run.", "teacher.", "data.")
SOFTWARE = ("lm_eval.", "version.", "gpu", "cpu")
TEMPLATE = Path(__file__).with_name("model_card.md.j2")


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        title: of the source in words. name: of the registered model. form: ``merged`` or ``delta``.
        config: of the model. teacher: its pin. params: params.yaml. evaluation: evaluation.json.
        lineage: as a registered version's tags. licence: the teacher's, by its name on the Hub, where it is known.
    """

    title: str
    name: str
    form: str
    config: dict[str, Any]
    teacher: dict[str, Any]
    params: dict[str, Any]
    evaluation: Evaluation
    lineage: Mapping[str, str]
    licence: str | None = None


def model_card(facts: Facts) -> ModelCard:
    """The card; its metadata holds the results as a model-index, which the Hub shows.

    Names come from elsewhere: each stays on one line, so that none of them adds a heading or metadata.
    """
    params = facts.params
    facts = Facts(**{field.name: _on_one_line(getattr(facts, field.name)) for field in dataclasses.fields(facts)})
    data = ModelCardData(
        model_name=facts.name,
        library_name="transformers" if facts.form == "merged" else "peft",
        pipeline_tag="text-generation",
        base_model=facts.teacher.get("source") if facts.teacher.get("kind") == "hub" else None,
        **_licence(facts),
        tags=["lolcats", "linear-attention", facts.config["model_type"]],
        eval_results=eval_results(facts) or None,
    )
    recipe = {key: _filled(params[key]) for key in RECIPE if key in params}
    shown = yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else ""
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=facts.name,
        form=facts.form,
        summary=_summary(facts),
        results=_results(facts),
        limits=list(limits(facts)),
        licence=_licence_note(facts),
        lineage=markdown_table(("what", "which"), _lineage(facts), align="left"),
        transformers=REQUIREMENT,
        recipe=shown,
        fence=max(["``", *re.findall("`+", shown)], key=len) + "`",
    )


def _on_one_line(value: Any) -> Any:
    """A value whose strings, in lists and mappings too, hold no line breaks."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_on_one_line(key): _on_one_line(item) for key, item in value.items()}
    return [_on_one_line(item) for item in value] if isinstance(value, list) else value


def eval_results(facts: Facts) -> list[EvalResult]:
    """The student's results; a standard error is a metric of its own, named as lm-eval names it."""
    evaluation = facts.evaluation
    found: list[EvalResult] = []

    def add(task: str, dataset: str, metric: str, value: float | None, name: str) -> None:
        if value is not None:
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=dataset,
                    metric_type=metric,
                    metric_value=value,
                    metric_name=name,
                )
            )

    def add_measured(task: str, dataset: str, metric: str, result: Measured, name: str) -> None:
        add(task, dataset, metric, result["value"], name)
        add(task, dataset, f"{metric}_stderr", result.get("stderr"), f"{name}, standard error")

    perplexity = evaluation.get("perplexity", {}).get("finetuned")
    add("validation", f"{_data(facts)}, validation rows", "perplexity", perplexity, "perplexity")
    for gap, result in _recall(facts, "finetuned").items():
        add_measured("copying_recall", "random tokens", f"recall_{gap}", result, f"copying recall at gap {gap}")
    for task, compared in evaluation.get("tasks", {}).items():
        metric = compared.get("metric", "acc")
        add_measured(task, task, metric, compared["finetuned"], metric)
    return found


def limits(facts: Facts) -> Iterator[str]:
    """What a reader must know before relying on the model, from what was measured."""
    perplexity, recall = facts.evaluation.get("perplexity", {}), _recall(facts, "finetuned")
    if {*SIDES} <= perplexity.keys():
        ratio = perplexity["finetuned"] / perplexity["teacher"]
        yield f"Perplexity is {ratio:.3f} times the teacher's, which hides the loss of long-range recall."
    for gap, student in recall.items():
        teacher = _recall(facts, "teacher").get(gap)
        if teacher and teacher["value"] > 0:
            share = student["value"] / teacher["value"]
            yield (
                f"Copying a random string over {gap} tokens: {measured(student)}, the teacher {measured(teacher)}: "
                f"{share:.0%} of its recall is left."
            )
    if not recall:
        yield "Long-range recall was not measured; students of this recipe usually lose it beyond the window."
    if context := facts.teacher.get("context"):
        yield f"The teacher was trained for {context} tokens; nothing is known beyond, though decoding goes on."
    yield (
        "The decode state is a sum over the past, so tokens cannot be taken back: assisted and prompt-lookup decoding "
        "are refused."
    )


def _recall(facts: Facts, side: Side) -> dict[str, Measured]:
    """Recall by gap, the shortest first."""
    recall = facts.evaluation.get("recall", {}).get(side, {})
    return {gap: recall[gap] for gap in sorted(recall, key=int)}


def _licence(facts: Facts) -> dict[str, Any]:
    """The card's metadata; a student is a derivative of its teacher, so the teacher's licence is its own."""
    if facts.licence:
        return {"license": facts.licence}
    link = f"https://huggingface.co/{facts.teacher.get('source')}"
    linked = {"license_link": link} if facts.teacher.get("kind") == "hub" else {}
    return {"license": "other", "license_name": "teacher", **linked}


def _licence_note(facts: Facts) -> str:
    of = f"`{facts.licence}`" if facts.licence else "not known here; look it up before you pass the model on"
    return f"The weights are a derivative of the teacher's, and its licence applies to them: {of}."


def _filled(section: Any) -> Any:
    """A section of the parameters without lists and mappings that hold nothing."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if value not in ([], {})}


def _kept(settings: Mapping[str, Any]) -> str:
    """What keeps softmax attention, in words; empty where nothing does."""
    layers, heads = settings.get("softmax_layers") or [], settings.get("softmax_heads") or {}
    windows = Counter(size for sizes in (settings.get("softmax_windows") or {}).values() for size in sizes.values())
    parts = [f"layers {', '.join(map(str, layers))}"] if layers else []
    parts += [f"key/value heads {', '.join(map(str, heads[key]))} of layer {key}" for key in sorted(heads, key=int)]
    if windows:
        sizes = [f"{count} see {size:,} tokens" for size, count in sorted(windows.items(), reverse=True)]
        parts[-1] += f" ({', '.join(sizes)})"
    return ", ".join(parts)


def _decode_state(facts: Facts, settings: Mapping[str, Any]) -> str:
    """How the decode state grows: as it was measured or, without that, as the settings say."""
    state: Mapping[str, Any] = facts.evaluation.get("state") or {}
    window, kept = settings.get("softmax_window"), _kept(settings)
    if not state.get("per_token", kept and window is None):
        bound = f": what keeps softmax attention sees the {window} newest tokens" if kept and window else ""
        return f"The decode state does not grow{bound}."
    whole = state.get("teacher_per_token")
    share = f", {state['per_token'] / whole:.1%} of the teacher's" if whole else ""
    size = f" by {state['per_token']:,} bytes a token{share}" if state else ""
    return f"The key/value cache of what keeps softmax attention grows{size}; the rest of the decode state does not."


def _summary(facts: Facts) -> str:
    settings = facts.config.get("linearize", {})
    kept = f"; softmax attention is kept in {_kept(settings)}" if _kept(settings) else ""
    return (
        f"{_teacher(facts)} with its softmax attention replaced by learned linear attention and a softmax window "
        f"(LoLCATs, [arXiv 2410.10254](https://arxiv.org/abs/2410.10254)): window {settings.get('window')} of "
        f"{settings.get('window_size')}, feature map {settings.get('feature_map')} of {settings.get('feature_dim')}"
        f"{kept}. {_decode_state(facts, settings)} Exported from {facts.title} in {facts.form} form."
    )


def _teacher(facts: Facts) -> str:
    source = facts.teacher.get("source") or facts.lineage.get("teacher.source", "unknown")
    revision = facts.teacher.get("revision")
    return f"`{source}` at {revision}" if revision else f"The teacher `{source}`"


def _data(facts: Facts) -> str:
    return str(facts.params.get("data", {}).get("source", facts.lineage.get("data.source", "the data set")))


def _results(facts: Facts) -> str:
    evaluation, rows = facts.evaluation, []
    if "finetuned" in evaluation.get("perplexity", {}):
        tokens = f" ({evaluation['perplexity_tokens']:,} tokens)" if "perplexity_tokens" in evaluation else ""
        values = (number(evaluation["perplexity"].get(side)) for side in SIDES)
        rows.append((f"perplexity on {_data(facts)}{tokens}", *values))
    for gap in _recall(facts, "finetuned"):
        rows.append((f"copying recall at gap {gap}", *(measured(_recall(facts, side).get(gap)) for side in SIDES)))
    for task, compared in evaluation.get("tasks", {}).items():
        items = f", {compared['items']} items" if "items" in compared else ""
        label = f"{task} ({compared.get('metric', 'acc')}{items})"
        rows.append((label, *(measured(compared.get(side)) for side in SIDES)))
    return markdown_table(("", "teacher", "this model"), rows) if rows else ""


def _lineage(facts: Facts) -> list[tuple[str, str]]:
    known = {key: value for key, value in facts.lineage.items() if value != "None"}
    rows = [(key, value) for key, value in sorted(known.items()) if key.startswith(ORIGIN + SOFTWARE)]
    if facts.teacher:
        rows.append(("teacher files, SHA-256", str(facts.teacher.get("digest"))))
    return rows
