"""Stage `evaluate`: the student beside its teacher, in what a user would lose.

Perplexity at each step, copying recall, lm-eval tasks, loss by position, generated text, an audit of the student.
Each finished measurement is kept (`tasks.measurements.suite`), so a killed evaluation continues after the last one. Of
models that do not fit the device only perplexity is measured, layer by layer (`tasks.measurements.models`).
"""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("evaluate", preflight=True)  # before the imports below, which take seconds

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lolcats_common.files import write_json, write_text
from lolcats_common.records import (
    BRANCHES,
    SIDES,
    STEPS,
    Audit,
    Evaluation,
    Generation,
    Positions,
    Side,
    TaskRecord,
    TaskScore,
)
from lolcats_core.evaluation import generation, synthetic
from lolcats_core.evaluation.harness import lm_eval_version
from lolcats_core.evaluation.paired import loss_comparison, paired_comparison, recovery
from tasks.measurements.suite import Measurements, measured_value
from tasks.reporting.figures import perplexity_figure, recall_figure, tasks_figure
from tasks.runner.stage import Stage

# The steps whose model the audit looks into.
AUDITED = ("teacher", "transferred", "finetuned")


def run(stage: Stage) -> Mapping[str, float]:
    """Write evaluation.json, speed.json, samples/<task>.jsonl and plots; the same numbers, flat, are the metrics."""
    measured = Measurements(stage)
    params = measured.params
    stage.log_dataset("validation", stage.params.data.source, measured.rows.digest, "evaluation")
    measured.write_items()
    ends = measured.teacher_facts()["end"] if params.generation_prompts else []
    # One model after the other, so that each is loaded once.
    perplexities: dict[str, dict[str, Any]] = {}
    recalls: dict[Side, dict[str, Any]] = {}
    results: dict[Side, dict[str, Any]] = {}
    positions: dict[Side, Positions] = {}
    generations: dict[Side, dict[str, Any]] = {}
    audits: dict[str, Audit] = {}
    for step in STEPS:
        perplexities[step] = measured.perplexity(step)
        if step == "teacher" or step == "finetuned":
            recalls[step] = {str(gap): measured.recall(step, gap) for gap in params.recall_gaps}
            results[step] = {name: measured.task(step, name) for name in params.tasks}
            if params.long_rows:
                positions[step] = measured.positions(step)
            if params.generation_prompts:
                generations[step] = measured.generations(step)
        if step == "teacher":
            measured.measure_control()  # now, since it shares the teacher's weights
        if step in AUDITED and params.audit_rows:
            audits[step] = measured.audit(step)
    perplexities["bigram"] = measured.bigram()

    evaluation: Evaluation = {
        "perplexity": {step: result["perplexity"] for step, result in perplexities.items()},
        "perplexity_tokens": perplexities["teacher"]["tokens"],
        "recall": {
            side: {gap: measured_value(result) for gap, result in by_gap.items()} for side, by_gap in recalls.items()
        },
        "recall_samples": params.recall_samples,
        "tasks": {name: compare_task(results["teacher"][name], results["finetuned"][name]) for name in params.tasks},
        "positions": positions,
        "control": measured.control(),
        "generation": compare_generation(generations, ends) if generations else {},
        "state": measured.state(),
        "audit": {**audits["teacher"], **audits["transferred"], **audits["finetuned"]} if audits else {},
        "left_out": measured.left_out,
        "lm_eval_version": lm_eval_version(),
        "task_hashes": {name: results["teacher"][name]["hash"] for name in params.tasks},
    }
    write_json(stage.out / "evaluation.json", evaluation)
    # Apart, because it is the only result that differs from run to run.
    write_json(stage.out / "speed.json", {step: result["cost"] for step, result in generations.items()})
    for name in params.tasks:
        write_samples(stage.out / "samples" / f"{name}.jsonl", results["teacher"][name], results["finetuned"][name])
    draw(stage, evaluation)
    return flat_metrics(evaluation)


def compare_generation(generations: Mapping[Side, Mapping[str, Any]], end: list[int]) -> Generation:
    """Both models' texts compared, with how many and how long they were."""
    teacher, student = (generations[side]["tokens"] for side in SIDES)
    return {
        **generation.compare_writing(teacher, student, end),
        "prompts": len(teacher),
        "prompt_tokens": generations["teacher"]["prompt_tokens"],
        "new_tokens": len(teacher[0]),
    }


def compare_task(teacher: dict[str, Any], finetuned: dict[str, Any]) -> TaskRecord:
    """Both models' results on a task; recovery and the paired comparison where items have scores.

    Raises:
        RuntimeError: the two did not answer the same questions.
    """
    if teacher["hash"] != finetuned["hash"]:
        raise RuntimeError(f"teacher and student were asked different questions in {teacher['name']}")
    compared: TaskRecord = {
        "metric": teacher["metric"],
        "items": teacher["items"],
        "version": teacher["version"],
        "chance": teacher["chance"],
        "higher_is_better": teacher["higher_is_better"],
        "teacher": _score(teacher),
        "finetuned": _score(finetuned),
    }
    samples = teacher["samples"], finetuned["samples"]
    if all("score" in sample for sample in samples[0]):
        before, after = ([sample["score"] for sample in answered] for answered in samples)
        compared["paired"] = paired_comparison(before, after)
        if teacher["higher_is_better"]:
            compared["recovery"] = recovery(before, after, teacher["chance"])
    elif all("loss" in sample for sample in samples[0]):
        compared["recovery"] = loss_comparison(*samples)
    if teacher["name"] in synthetic.TASKS:
        compared["cells"] = {side: synthetic.by_cell(answered) for side, answered in zip(SIDES, samples, strict=True)}
    return compared


def _score(result: Mapping[str, Any]) -> TaskScore:
    return {"value": result["value"], "stderr": result["stderr"], "metrics": result["metrics"]}


def write_samples(path: Path, teacher: dict[str, Any], finetuned: dict[str, Any]) -> None:
    """One line per item: what was asked, and both models' scores and answers."""
    lines = []
    for before, after in zip(teacher["samples"], finetuned["samples"], strict=True):
        line = {key: before[key] for key in ("id", "prompt", "target", "length", "depth") if key in before}
        for step, sample in (("teacher", before), ("finetuned", after)):
            line |= {step: sample.get("score", sample.get("loss")), f"{step}_responses": sample["responses"]}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def draw(stage: Stage, evaluation: Evaluation) -> None:
    """Plots, logged and beside the results."""
    figures = {"perplexity.png": perplexity_figure(evaluation["perplexity"])}
    if any(evaluation["recall"].values()):
        figures["recall.png"] = recall_figure(evaluation["recall"])
    if evaluation["tasks"]:
        figures["tasks.png"] = tasks_figure(evaluation["tasks"])
    for name, figure in figures.items():
        stage.log_figure(name, figure)
        figure.savefig(stage.out / name, metadata={"Software": None})


def flat_metrics(evaluation: Evaluation) -> dict[str, float]:
    """evaluation.json's numbers by flat names, such as ``recall_128_teacher`` and ``hellaswag_acc_norm_finetuned``."""
    perplexities = evaluation["perplexity"]
    metrics: dict[str, float] = {f"perplexity_{step}": value for step, value in perplexities.items()}
    metrics["ratio_finetuned_to_teacher"] = perplexities["finetuned"] / perplexities["teacher"]
    metrics["tokens"] = evaluation["perplexity_tokens"]
    state = evaluation["state"]
    metrics |= {f"state_{name}_bytes": float(cast(int, value)) for name, value in state.items()}
    metrics["state_over_published"] = (state["linear"] + state["exact"]) / state["published"]
    for step, by_gap in evaluation["recall"].items():
        for gap, result in by_gap.items():
            metrics[f"recall_{gap}_{step}"] = result["value"]
            metrics[f"recall_{gap}_{step}_stderr"] = result["stderr"]
    control = evaluation["control"]
    if control is not None:
        metrics |= {"control_window": control["window"], "control_perplexity": control["perplexity"]}
        metrics |= {f"control_recall_{gap}": result["value"] for gap, result in control["recall"].items()}
    long: dict[str, Positions | None] = {side: found for side, found in evaluation["positions"].items()}
    long["control"] = None if control is None else control["positions"]
    for side, found in long.items():
        if found is not None and found["ranges"]:
            metrics[f"loss_at_{found['length']}_{side}"] = found["ranges"][-1]["loss"]
    for name, task in evaluation["tasks"].items():
        for side in SIDES:
            metrics[f"{name}_{task['metric']}_{side}"] = task[side]["value"]
            metrics[f"{name}_{task['metric']}_{side}_stderr"] = task[side]["stderr"]
        paired, recovered = task.get("paired"), task.get("recovery")
        if paired is not None:
            metrics[f"{name}_difference"] = paired["difference"]
            if "p_value" in paired:
                metrics[f"{name}_p_value"] = paired["p_value"]
        if recovered is not None:
            if (value := recovered["value"]) is not None:
                metrics[f"{name}_recovery"] = value
            if (value := recovered.get("chance_corrected")) is not None:
                metrics[f"{name}_recovery_chance_corrected"] = value
    for name, measure in evaluation["generation"].items():
        if isinstance(measure, dict):
            metrics[f"generation_{name}"] = measure["value"]
    for branch in BRANCHES:
        if (value := evaluation["audit"].get(branch)) is not None:
            metrics[f"audit_{branch}"] = value
    return metrics
