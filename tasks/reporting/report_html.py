"""The report's HTML: every number of a run in tables and figures, with no script and no address of another machine.

This module makes the tables' rows; report.html.j2 is the page around them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.records import (
    BIGRAM,
    BRANCHES,
    CONTROL,
    SIDES,
    STEPS,
    Audit,
    Evaluation,
    Measured,
    Speed,
    StateBytes,
    control_line,
    training_of,
)
from lolcats_common.tables import LARGE, interval, measured, number

TEMPLATE = "report.html.j2"
CAPTIONS = {
    "perplexity": "Perplexity on validation text, step by step.",
    "recall": "Share of a random string that is copied right, by its length.",
    "recovery": "What the student keeps of the teacher's score, with 95 % bootstrap intervals over the items.",
    "positions": "Loss by position, in rows longer than those of training.",
    "audit": "Perplexity with branches and layers switched off.",
    "linear_mass": "Where the student's attention goes: near 0, a head relies on its window alone.",
    "head_errors": "Squared error of each head over the square of the softmax output, under teacher forcing.",
    "entropy": "Sharp attention (left) beside spread-out attention: one point per layer.",
    "transfer_loss": "Stage 1, attention transfer.",
    "transfer_layers": "Stage 1, error by layer.",
    "allocation": "What each kv group sees: everything, so many of the newest tokens, or linear attention (white).",
    "selection": "Between the stages: the score of each layer or kv group, and which of them keep softmax attention.",
    "finetune_loss": "Stage 2, low-rank finetuning.",
}
WINDOW_ALONE = 1.02  # below this ratio of perplexities, the student hardly uses its linear branch


@dataclass(frozen=True)
class Facts:
    """What the report is made of: the stages' JSON files, as they are. `made`: the day, as ``2026-11-29``."""

    made: str
    evaluation: Evaluation
    speed: Speed
    metrics: dict[str, dict[str, float]]
    runs: dict[str, dict[str, str]]
    teacher: dict[str, Any]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text; without rows the page leaves the table out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def page(facts: Facts, svgs: Mapping[str, str]) -> str:
    """The whole document.

    Args:
        svgs: figures by name, as SVG documents; put in as data, so that their identifiers cannot clash.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    evaluation, audit = facts.evaluation, facts.evaluation["audit"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=f"Linearized student of {facts.teacher.get('source', 'its teacher')}",
        made=facts.made,
        run=facts.runs.get("evaluate", {}).get("run_id"),
        lm_eval_version=evaluation.get("lm_eval_version"),
        left_out=evaluation.get("left_out"),
        headlines=_headlines(evaluation),
        figures={name: (CAPTIONS[name], base64.b64encode(svg.encode()).decode()) for name, svg in svgs.items()},
        perplexity=_perplexity(evaluation["perplexity"]),
        tasks=_tasks(evaluation),
        recall=_recall(evaluation),
        control=_control(evaluation),
        cells=_cells(evaluation),
        state=_state(evaluation["state"]),
        generation=evaluation["generation"],
        continuations=_continuations(evaluation),
        costs=_costs(facts.speed),
        audit=_audit(audit) if audit else None,
        window_alone=_leans_on_its_window(audit),
        stages=_stages(facts.metrics),
        lineage=_lineage(facts),
    )


def _headlines(evaluation: Evaluation) -> Iterable[str]:
    """What a reader should know before any table."""
    teacher, student = (evaluation["perplexity"][side] for side in SIDES)
    yield f"Perplexity {student:,.2f}, {student / teacher:.3f} times the teacher's {teacher:,.2f}."
    recall = [evaluation["recall"].get(side) for side in SIDES]
    if recall[0] and recall[1]:
        gap = max(recall[0], key=int)
        before, after = recall[0][gap]["value"], recall[1][gap]["value"]
        yield f"Copying over {gap} tokens: {after:.3f} of a string right, the teacher {before:.3f}."
    for name, task in evaluation["tasks"].items():
        before, after = (task[side]["value"] for side in SIDES)
        yield f"{name}: {_share(after)}, the teacher {_share(before)} ({task['metric']})."
    control = evaluation.get("control")
    if control is not None:
        outcome = "better" if student < control["perplexity"] else "worse"
        yield (
            f"A plain window of the student's bytes ({control['window']} tokens and the first {control['sinks']}),"
            f" {training_of(control)}, has perplexity {control['perplexity']:,.2f}: the student is {outcome}."
        )
    whole, off = evaluation["audit"].get("whole"), evaluation["audit"].get("linear_off")
    if whole is not None and off is not None:
        yield f"Without its linear branch, the student's perplexity is {number(off / whole)} times as high."


def _perplexity(perplexity: Mapping[str, float]) -> Table:
    labels: dict[str, str] = {**STEPS, "bigram": BIGRAM}  # type: ignore[dict-item]
    rows = [
        (label, f"{perplexity[step]:,.2f}", f"{perplexity[step] / perplexity['teacher']:,.3f}x")
        for step, label in labels.items()
        if step in perplexity
    ]
    return Table(("model", "perplexity", "to the teacher"), rows)


def _tasks(evaluation: Evaluation) -> Table:
    rows = []
    for name, task in evaluation["tasks"].items():
        recovered, paired, chance = task.get("recovery"), task.get("paired"), task.get("chance")
        row = [
            f"{name} ({task['metric']}, {task['items']} items)",
            *(measured(task[side]) for side in SIDES),
            _share(chance),
        ]
        if recovered is None:
            row += ["", "", ""]
        else:
            bounds = recovered.get("chance_corrected_interval") or recovered["interval"]
            row += [_share(recovered["value"]), _share(recovered.get("chance_corrected")), interval(bounds)]
        difference = paired["difference"] if paired else recovered.get("difference") if recovered else None
        rows.append([*row, _share(difference, "+"), _share(paired.get("p_value") if paired else None)])
    header = ("task", *SIDES.values(), "chance", "recovery", "above chance", "95 %", "difference", "McNemar p")
    return Table(header, rows)


def _share(value: float | None, sign: str = "") -> str:
    """A share, a score or a probability with three decimals, as `measured` writes them; empty where there is none."""
    if value is None or abs(value) >= LARGE:
        return number(value)
    return f"{value:{sign}.3f}"


def _recall(evaluation: Evaluation) -> Table:
    recall, control = evaluation["recall"], evaluation.get("control")
    plain = control["recall"] if control else {}
    rows = [
        (f"copying at gap {gap}", *(measured(recall[side][gap]) for side in SIDES), measured(plain.get(gap)))
        for gap in sorted(recall.get("teacher", {}), key=int)
    ]
    return Table(("measure", *SIDES.values(), CONTROL), rows)


def _control(evaluation: Evaluation) -> tuple[str, Table] | None:
    """What the control is, and the losses by position of teacher, student and control with the paired difference."""
    control = evaluation.get("control")
    if control is None:
        return None
    ranges = [evaluation["positions"][side]["ranges"] for side in SIDES] if evaluation["positions"] else []
    ranges += [control["positions"]["ranges"]] if control["positions"] else []
    differences = {entry["start"]: entry for entry in control["differences"]}
    rows = []
    for entries in zip(*ranges, strict=True):
        start, stop = entries[0]["start"], entries[0]["stop"]
        found = differences.get(start)
        paired = "" if found is None else f"{found['difference']:+.3f} ± {found['stderr']:.3f}"
        rows.append((f"{start} to {stop}", *(f"{entry['loss']:.3f}" for entry in entries), paired))
    return control_line(control), Table(("tokens", *SIDES.values(), CONTROL, f"student less {CONTROL}"), rows)


def _cells(evaluation: Evaluation) -> list[Table]:
    """A table for each synthetic task: its scores by length and by the depth of the answer."""
    tables = []
    for name, task in evaluation["tasks"].items():
        if "cells" in task:
            pairs = zip(*(task["cells"][side] for side in SIDES), strict=True)
            rows = [(f"{a['length']:.0f}", f"{a['depth']:.1f}", measured(a), measured(b)) for a, b in pairs]
            tables.append(Table(("tokens", "depth", *SIDES.values()), rows, name))
    return tables


def _state(state: StateBytes) -> Table:
    constant = state["linear"] + state["exact"]
    rows = [
        ("linear attention: sums and window", number(state["linear"]), ""),
        ("kept softmax, bounded", number(state["exact"]), ""),
        ("constant in all", number(constant), f"{constant / state['published']:.2f}x the published recipe's"),
        ("each token more, student", number(state["per_token"]), ""),
        ("each token more, teacher", number(state["teacher_per_token"]), ""),
    ]
    return Table(("of one sequence", "bytes", ""), rows)


def _continuations(evaluation: Evaluation) -> Table:
    found = evaluation["generation"]
    if not found:
        return Table((), ())
    values: dict[str, Measured] = {
        "equal tokens from the start": found["exact_prefix"],
        "token F1 against the teacher's text": found["token_f1"],
        "same stop": found["same_stop"],
        "repeated 4-grams, teacher": found["repetition_teacher"],
        "repeated 4-grams, student": found["repetition_finetuned"],
        "stopped by itself, teacher": found["stopped_teacher"],
        "stopped by itself, student": found["stopped_finetuned"],
    }
    return Table(("measure", "value"), [(label, measured(value)) for label, value in values.items()])


def _costs(speed: Speed) -> Table:
    by_side: list[Mapping[str, Any]] = [speed[side] for side in SIDES if side in speed]
    names = sorted({name for cost in by_side for name in cost})
    rows = [(name.replace("_", " "), *(number(cost.get(name)) for cost in by_side)) for name in names]
    return Table(("cost", *SIDES.values()), rows)


def _leans_on_its_window(audit: Audit) -> bool:
    whole, off = audit.get("whole"), audit.get("linear_off")
    return whole is not None and off is not None and off < WINDOW_ALONE * whole


def _audit(audit: Audit) -> tuple[Table, Table]:
    """Perplexity without each branch, and what is known of each layer."""
    branches = [(name.replace("_", " "), number(audit[name])) for name in BRANCHES]
    layers = []
    for layer, entry in audit["layers"].items():
        entropy = audit["entropy"].get(layer)
        heads = (audit["linear_mass"].get(layer), audit["head_errors"].get(layer), entropy)
        means = [number(sum(values) / len(values)) if values else "" for values in heads]
        keys = number(sum(map(math.exp, entropy)) / len(entropy)) if entropy else ""
        layers.append((layer, number(entry.get("linear_off")), number(entry.get("softmax_off")), *means, keys))
    measures = ("PPL, linear off", "PPL, softmax off", "linear mass", "transfer error", "teacher's entropy")
    return Table(("student", "perplexity"), branches), Table(("layer", *measures, "effective keys"), layers)


def _stages(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    counts, peaks = ("tokens", "stage_seconds", "tokens_per_second"), ("peak_memory_bytes", "peak_gpu_bytes")
    rows = [
        (stage, *(number(values.get(name)) for name in counts), *(_gib(values.get(name)) for name in peaks))
        for stage, values in metrics.items()
    ]
    return Table(("stage", "tokens", "seconds", "tokens/s", "peak memory, GiB", "peak GPU memory, GiB"), rows)


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _lineage(facts: Facts) -> list[Table]:
    teacher = [(str(key), str(value)) for key, value in sorted(facts.teacher.items()) if not isinstance(value, dict)]
    runs = [(name, run.get("run_id", ""), run.get("key", "")) for name, run in facts.runs.items()]
    settings = [
        (f"{section}.{key}" if isinstance(values, dict) else section, str(value))
        for section, values in facts.recipe.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    return [
        Table(("teacher", ""), teacher),
        Table(("stage", "MLflow run", "key of the inputs"), runs),
        Table(("task", "hash of the questions"), list(facts.evaluation["task_hashes"].items())),
        Table(("parameter", "value"), settings),
    ]
