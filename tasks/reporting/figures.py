"""Every plot of the pipeline, as matplotlib figures: of training histories, selections and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

MODELS = ("teacher", "finetuned")
LABELS = {"teacher": "teacher", "finetuned": "student"}
Heads = Mapping[str, list[float]]


def loss_figure(history: Sequence[dict[str, float]], title: str, log_scale: bool = False) -> Figure:
    """Training and validation loss by optimiser step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("train_loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimiser step", ylabel="loss", title=title)
    if log_scale:
        axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def selection_figure(selection: Mapping[str, Any]) -> Figure:
    """What each layer or kv group scored, those that keep softmax attention in another colour."""
    found = [entry for entry in selection["candidates"] if entry["score"] is not None]
    names = [str(e["layer"]) if e["group"] is None else f"{e['layer']}.{e['group']}" for e in found]
    colours = ["tab:blue" if entry["kept"] is None else "tab:orange" for entry in found]
    figure = Figure(figsize=(max(7.0, 0.22 * len(found)), 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(names, [entry["score"] for entry in found], color=colours)
    what = "layer" if all(entry["group"] is None for entry in found) else "layer.kv group"
    title = f"Softmax kept (orange): {selection['cache_ratio']:.1%} of the kv cache"
    axes.set(xlabel=what, ylabel=(selection["criterion"] or "transfer error").replace("_", " "), title=title)
    axes.tick_params(axis="x", rotation=90 if len(found) > 16 else 0)
    if min(entry["score"] for entry in found) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, axis="y")
    return figure


def layer_figure(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Transfer error of each layer at the first and at the best validation."""
    evaluations = [entry for entry in history if "validation_loss" in entry]
    best = min(evaluations, key=lambda entry: entry["validation_loss"])
    names = sorted(name for name in best if name.startswith("validation_layer_"))
    layers = [int(name.rpartition("_")[2]) for name in names]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for shift, entry, label in ((-0.2, evaluations[0], "before"), (0.2, best, f"best (step {best['step']:.0f})")):
        axes.bar([layer + shift for layer in layers], [entry[name] for name in names], width=0.4, label=label)
    axes.set(xlabel="layer", ylabel="mean squared error", title=title, yscale="log", xticks=layers)
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    return figure


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


def heads_figure(values: Heads, title: str, label: str, log_scale: bool = False) -> Figure:
    """A map of layers by heads; layers have as many heads as are linearized, the rest stays blank."""
    from matplotlib.colors import LogNorm

    layers = sorted(values, key=int)
    table = np.full((len(layers), max(len(values[layer]) for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        table[row, : len(values[layer])] = values[layer]
    figure = Figure(figsize=(7, 0.7 + 0.36 * len(layers)), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(vmin=max(1e-6, float(np.nanmin(table)))) if log_scale else None
    image = axes.imshow(table, aspect="auto", cmap="viridis", norm=norm)
    axes.set(xlabel="head", ylabel="layer", title=title, yticks=range(len(layers)), yticklabels=layers)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def positions_figure(positions: Mapping[str, Mapping[str, Any]], trained: int) -> Figure:
    """Loss by position; right of the line lie positions that training never reached."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for model in MODELS:
        ranges = positions[model]["ranges"]
        axes.errorbar(
            [(entry["start"] + entry["stop"]) / 2 for entry in ranges],
            [entry["loss"] for entry in ranges],
            yerr=[entry["stderr"] for entry in ranges],
            marker="o",
            capsize=3,
            label=LABELS[model],
        )
    axes.axvline(trained, linestyle="--", color="grey", label="training length")
    axes.set(xlabel="position (tokens)", ylabel="loss (nats)", xscale="log", title="Loss by position")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def recovery_figure(tasks: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Recovery of each task, chance-corrected where that is defined, with 95 % intervals; None where there is none."""
    found = {}
    for name, task in tasks.items():
        recovered = task.get("recovery") or {}
        key = "chance_corrected" if recovered.get("chance_corrected") is not None else "value"
        interval = "chance_corrected_interval" if key == "chance_corrected" else "interval"
        if recovered.get(key) is not None and recovered[interval] is not None:
            found[f"{name}\n{key.replace('_', ' ')}"] = (recovered[key], recovered[interval])
    if not found:
        return None
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, (value, (low, high)) in enumerate(found.values()):
        # A bootstrap interval need not hold the value itself where nearly all items are alike.
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([value], [place], xerr=errors, fmt="o", capsize=4, color="tab:blue")
    axes.axvline(1.0, linestyle="--", color="grey")
    axes.set(yticks=range(len(found)), yticklabels=list(found), xlabel="student / teacher", title="Recovery (1: all)")
    axes.margins(y=0.3)
    axes.grid(alpha=0.3, axis="x")
    return figure


def audit_figure(audit: Mapping[str, Any]) -> Figure:
    """Perplexity with parts of the model off."""
    values = {name.replace("_", " "): audit[name] for name in ("whole", "linear_off", "window_off")}
    for layer, entry in audit["layers"].items():
        values |= {f"layer {layer}: {part.replace('_', ' ')}": value for part, value in entry.items()}
    values = {name: value for name, value in values.items() if value is not None}
    figure = Figure(figsize=(7, 0.9 + 0.28 * len(values)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()), color=["tab:green"] + ["tab:orange"] * (len(values) - 1))
    axes.bar_label(bars, fmt="{:.4g}", padding=3)
    axes.set(xscale="log", xlabel="perplexity", title="With parts of the student off")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure


def entropy_figure(entropy: Heads, errors: Heads) -> Figure:
    """Transfer error against the teacher's entropy, one point per linearized layer."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = [layer for layer in sorted(errors, key=int) if layer in entropy]
    x = [float(np.mean(entropy[layer])) for layer in layers]
    y = [float(np.mean(errors[layer])) for layer in layers]
    axes.scatter(x, y)
    for layer, a, b in zip(layers, x, y, strict=True):
        axes.annotate(f" {layer}", (a, b))
    axes.set(xlabel="teacher's attention entropy (nats)", ylabel="relative transfer error", yscale="log")
    axes.set_title("Transfer error by layer, beside the teacher's entropy")
    axes.grid(alpha=0.3)
    return figure
