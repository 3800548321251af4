"""Plots of the evaluation, drawn from evaluation.json."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

MODELS = ("teacher", "finetuned")
LABELS = {"teacher": "teacher", "finetuned": "student"}


def perplexity_figure(perplexity: dict[str, float]) -> Figure:
    """Perplexity at each step, on a logarithmic axis because an untrained student is far off."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(perplexity), list(perplexity.values()), width=0.6)
    axes.bar_label(bars, fmt="{:.4g}", padding=2)
    axes.set(ylabel="validation perplexity", yscale="log", title="Perplexity by step")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3, axis="y")
    return figure


def recall_figure(recall: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """Share of a random string copied right against its length, with standard errors."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for model in MODELS:
        gaps = sorted(recall[model], key=int)
        axes.errorbar(
            [int(gap) for gap in gaps],
            [recall[model][gap]["value"] for gap in gaps],
            yerr=[recall[model][gap]["stderr"] for gap in gaps],
            marker="o",
            capsize=3,
            label=LABELS[model],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(gap) for gap in gaps], labels=gaps)
    axes.set(xlabel="gap (tokens)", ylabel="copying recall", ylim=(-0.03, 1.03), title="Copying recall by gap")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def tasks_figure(tasks: dict[str, dict[str, Any]]) -> Figure:
    """Each task's primary metric, teacher beside student, with standard errors."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(tasks))
    for model, shift in zip(MODELS, (-0.2, 0.2), strict=True):
        axes.bar(
            [place + shift for place in places],
            [task[model]["value"] for task in tasks.values()],
            yerr=[task[model]["stderr"] for task in tasks.values()],
            width=0.4,
            capsize=3,
            label=LABELS[model],
        )
    labels = [f"{name}\n{task['metric']}" for name, task in tasks.items()]
    axes.set(title="lm-eval tasks", xticks=list(places), xticklabels=labels)
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    return figure
