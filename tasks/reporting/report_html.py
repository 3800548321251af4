"""The report's HTML: tables and embedded figures, no script and no address of another machine."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tasks.reporting.figures import MODELS

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d6dbe3; }
p.note { color: #55607a; } .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); }
figure { margin: 0.5rem; } img { max-width: 100%; }
table { border-collapse: collapse; margin: 0.8rem 0; } th, td { padding: 0.25rem 0.6rem; text-align: right; }
th { border-bottom: 2px solid #9aa5b8; } td { border-bottom: 1px solid #e4e8ee; }
td { white-space: nowrap; } td:first-child { white-space: normal; }
th:first-child, td:first-child, .text th, .text td { text-align: left; } .bad { color: #b3261e; font-weight: 600; }
pre { background: #f4f6f9; padding: 0.8rem; overflow-x: auto; }
"""
STEPS = {
    "teacher": "teacher",
    "swapped": "swapped, without transfer",
    "transferred": "after attention transfer",
    "finetuned": "after low-rank finetuning",
    "bigram": "bigram model, for scale",
}
CAPTIONS = {
    "perplexity": "Perplexity on validation text, step by step.",
    "recall": "Share of a random string that is copied right, by its length.",
    "recovery": "What the student keeps of the teacher's score, with 95 % bootstrap intervals over the items.",
    "positions": "Loss by position, in rows longer than those of training.",
    "audit": "Perplexity with branches and layers switched off.",
    "linear_mass": "Where the student's attention goes: near 0, a head leans on its window alone.",
    "head_errors": "Squared error of each head over the square of the softmax output, under teacher forcing.",
    "entropy": "Sharp attention (left) beside spread-out attention: one point per layer.",
    "transfer_loss": "Stage 1, attention transfer.",
    "transfer_layers": "Stage 1, error by layer.",
    "selection": "Between the stages: what each layer or kv group scored, and what keeps softmax attention.",
    "finetune_loss": "Stage 2, low-rank finetuning.",
}
GENERATION = {
    "exact_prefix": "tokens alike from the start",
    "token_f1": "token F1 against the teacher's text",
    "same_stop": "same stop",
    "repetition_teacher": "repeated 4-grams, teacher",
    "repetition_finetuned": "repeated 4-grams, student",
    "stopped_teacher": "stopped by itself, teacher",
    "stopped_finetuned": "stopped by itself, student",
}


@dataclass(frozen=True)
class Facts:
    """What the report is made of: the stages' JSON files, as they are."""

    evaluation: dict[str, Any]
    speed: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    teacher: dict[str, Any]
    recipe: dict[str, Any]


def page(facts: Facts, svgs: Mapping[str, str]) -> str:
    """The whole document.

    Args:
        svgs: figures by name, as SVG documents; put in as data, so that their identifiers cannot clash.
    """
    evaluation = facts.evaluation

    def shown(*names: str) -> str:
        chosen = (
            f'<figure><img alt="{escape(CAPTIONS[name])}" src="data:image/svg+xml;base64,'
            f'{base64.b64encode(svgs[name].encode()).decode()}"><figcaption>{escape(CAPTIONS[name])}</figcaption></figure>'
            for name in names
            if name in svgs
        )
        return f'<div class="figures">{"".join(chosen)}</div>'

    title = f"Linearized student of {facts.teacher.get('source', 'its teacher')}"
    parts = [
        f"<h1>{escape(title)}</h1><p class='note'>Student beside its own teacher, same text, same questions, same "
        f"settings. lm-eval {escape(str(evaluation.get('lm_eval_version')))}.{_left_out(evaluation)}</p>"
        + _summary(evaluation),
        "<h2>Perplexity</h2>" + _perplexity(evaluation["perplexity"]) + shown("perplexity", "positions"),
        "<h2>Recovery</h2>" + _tasks(evaluation["tasks"]) + shown("recovery"),
        "<h2>Recall and length</h2>" + _recall(evaluation) + shown("recall") + _cells(evaluation["tasks"]),
        "<h2>Decode state</h2>" + _state(evaluation["state"]),
        "<h2>Generation</h2>" + _generation(evaluation["generation"], facts.speed),
        "<h2>Audit</h2>" + _audit(evaluation["audit"]) + shown("audit", "linear_mass", "head_errors", "entropy"),
        "<h2>Training</h2>" + shown("transfer_loss", "transfer_layers", "selection", "finetune_loss"),
        "<h2>Cost</h2>" + _cost(facts.metrics),
        f'<h2>Lineage</h2><div class="text">{_lineage(facts)}</div>',
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; cells are text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def number(value: Any) -> str:
    """Four digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _left_out(evaluation: Mapping[str, Any]) -> str:
    names = evaluation.get("left_out")
    reason = " The models do not fit the device, so perplexity was measured layer by layer, and these were left out: "
    return f"{reason}{escape(', '.join(names))}." if names else ""


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _measured(result: Mapping[str, Any]) -> str:
    return f"{result['value']:.3f} ± {result['stderr']:.3f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} … {interval[1]:.3f}"


def _summary(evaluation: Mapping[str, Any]) -> str:
    """What a reader should know before any table."""
    teacher, student = (evaluation["perplexity"][step] for step in MODELS)
    said = [f"Perplexity {number(student)}, {number(student / teacher)} times the teacher's {number(teacher)}."]
    recall = [evaluation["recall"].get(step) for step in MODELS]
    if all(recall):
        gap = max(recall[0], key=int)
        values = [measured[gap]["value"] for measured in recall]
        said.append(f"Copying over {gap} tokens: {values[1]:.3f} of a string right, the teacher {values[0]:.3f}.")
    for name, task in evaluation["tasks"].items():
        before, after = (number(task[step]["value"]) for step in MODELS)
        said.append(f"{name}: {after}, the teacher {before} ({task['metric']}).")
    whole, off = (evaluation["audit"].get(name) for name in ("whole", "linear_off"))
    if whole is not None and off is not None:
        said.append(f"Without its linear branch, the student's perplexity is {number(off / whole)} times as high.")
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in said)}</ul>"


def _perplexity(perplexity: Mapping[str, float]) -> str:
    teacher = perplexity["teacher"]
    rows = [
        (label, number(perplexity[step]), f"{number(perplexity[step] / teacher)}x")
        for step, label in STEPS.items()
        if step in perplexity
    ]
    return table(("model", "perplexity", "to the teacher"), rows)


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    if not tasks:
        return "<p class='note'>No task was asked for.</p>"
    rows = []
    for name, task in tasks.items():
        recovered, paired = task.get("recovery") or {}, task.get("paired") or {}
        rows.append(
            (
                f"{name} ({task['metric']}, {task['items']} items)",
                *(
                    _measured(task[step]) if task[step]["value"] < 10_000 else number(task[step]["value"])
                    for step in MODELS
                ),
                "" if task.get("chance") is None else f"{task['chance']:.2f}",
                number(recovered.get("value")),
                number(recovered.get("chance_corrected")),
                _range(recovered.get("chance_corrected_interval") or recovered.get("interval")),
                number(paired.get("difference", recovered.get("difference"))),
                number(paired.get("p_value")),
            )
        )
    header = ("task", "teacher", "student", "chance", "recovery", "above chance", "95 %", "difference", "McNemar p")
    note = "Recovery above chance is empty where the teacher itself is within two standard errors of guessing."
    return table(header, rows) + f"<p class='note'>{note}</p>"


def _recall(evaluation: Mapping[str, Any]) -> str:
    recall = evaluation["recall"]
    rows = [
        (f"copying at gap {gap}", *(_measured(recall[step][gap]) for step in MODELS))
        for gap in sorted(recall.get("teacher", {}), key=int)
    ]
    return table(("measure", "teacher", "student"), rows) if rows else ""


def _cells(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, task in tasks.items():
        if "cells" in task:
            pairs = zip(*(task["cells"][step] for step in MODELS), strict=True)
            rows = [(f"{a['length']:.0f}", f"{a['depth']:.1f}", _measured(a), _measured(b)) for a, b in pairs]
            parts.append(f"<h3>{escape(name)}</h3>" + table(("tokens", "depth", "teacher", "student"), rows))
    return "".join(parts)


def _generation(measures: Mapping[str, Any], speed: Mapping[str, Mapping[str, float]]) -> str:
    if not measures:
        return "<p class='note'>Not measured.</p>"
    note = (
        f"{measures['prompts']} prompts of {measures['prompt_tokens']} tokens, continued greedily by "
        f"{measures['new_tokens']} tokens. A softmax cache grows with every token, a linear one does not."
    )
    rows = [(label, _measured(measures[name])) for name, label in GENERATION.items()]
    costs = sorted({name for cost in speed.values() for name in cost})
    cost_rows = [(name.replace("_", " "), *(number(speed[step].get(name)) for step in MODELS)) for name in costs]
    cost = table(("cost", "teacher", "student"), cost_rows)
    return f"<p class='note'>{note}</p>" + table(("measure", "value"), rows) + cost


def _audit(audit: Mapping[str, Any]) -> str:
    if not audit:
        return "<p class='note'>Not measured.</p>"
    rows = [(name.replace("_", " "), number(audit[name])) for name in ("whole", "linear_off", "window_off")]
    layers = []
    for layer, entry in audit["layers"].items():
        means = [audit[name].get(layer) for name in ("linear_mass", "head_errors", "entropy")]
        shown = [number(sum(values) / len(values)) if values else "" for values in means]
        entropy = means[2]
        keys = number(sum(map(math.exp, entropy)) / len(entropy)) if entropy else ""
        layers.append((layer, number(entry.get("linear_off")), number(entry.get("softmax_off")), *shown, keys))
    header = (
        "layer",
        "PPL, linear off",
        "PPL, softmax off",
        "linear mass",
        "transfer error",
        "teacher's entropy",
        "effective keys",
    )
    whole, off = audit["whole"], audit["linear_off"]
    leans = ""
    if whole is not None and off is not None and off < 1.02 * whole:
        leans = (
            "<p class='bad'>The student leans on its window alone: without the linear branch it loses under 2 %.</p>"
        )
    note = "<p class='note'>Over the first validation rows alone, so not the perplexities above.</p>"
    return leans + note + table(("student", "perplexity"), rows) + table(header, layers)


def _state(state: Mapping[str, int]) -> str:
    constant = state["linear"] + state["exact"]
    rows = [
        ("linear attention: sums and window", number(state["linear"]), ""),
        ("kept softmax, bounded", number(state["exact"]), ""),
        ("constant in all", number(constant), f"{constant / state['published']:.2f}x the published recipe's"),
        ("each token more, student", number(state["per_token"]), ""),
        ("each token more, teacher", number(state["teacher_per_token"]), ""),
    ]
    return table(("of one sequence", "bytes", ""), rows)


def _cost(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("tokens", "stage_seconds", "tokens_per_second")
    peaks = ("peak_memory_bytes", "peak_gpu_bytes")
    rows = [
        (name, *(number(values.get(c)) for c in columns), *(_gib(values.get(peak)) for peak in peaks))
        for name, values in metrics.items()
    ]
    return table(("stage", "tokens", "seconds", "tokens/s", "peak memory, GiB", "peak GPU memory, GiB"), rows)


def _lineage(facts: Facts) -> str:
    teacher = [(str(key), str(value)) for key, value in sorted(facts.teacher.items()) if not isinstance(value, dict)]
    runs = [(name, str(run.get("run_id", "")), str(run.get("key", ""))) for name, run in facts.runs.items()]
    hashes = [(name, str(value)) for name, value in facts.evaluation["task_hashes"].items()]
    settings = [
        (f"{section}.{key}" if isinstance(values, dict) else section, str(value))
        for section, values in facts.recipe.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    return (
        table(("teacher", ""), teacher)
        + table(("stage", "MLflow run", "key of the inputs"), runs)
        + (table(("task", "hash of the questions"), hashes) if hashes else "")
        + table(("parameter", "value"), settings)
    )
