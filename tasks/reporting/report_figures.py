"""Figures of the report, from evaluation.json and the training histories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tasks.reporting.evaluation_figures import LABELS, MODELS

Heads = Mapping[str, list[float]]


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
