"""Plots of a training stage, drawn from its history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


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
