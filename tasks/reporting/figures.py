"""Every plot of the pipeline, as matplotlib figures: of training histories, selections and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lolcats_common.records import (
    BRANCHES,
    SIDES,
    AllocationRecord,
    Audit,
    Measured,
    Positions,
    SelectionRecord,
    Side,
    TaskRecord,
)

Heads = Mapping[str, list[float]]  # a value for each head, by layer


def _axes(
    width: float = 7.0, height: float = 4.0, grid: Literal["both", "x", "y"] | None = "both"
) -> tuple[Figure, Axes]:
    """An empty figure of `width` by `height` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    if grid is not None:
        axes.grid(alpha=0.3, axis=grid)
    return figure, axes


def loss_figure(history: Sequence[dict[str, float]], title: str, log_scale: bool = False) -> Figure:
    """Training and validation loss by optimiser step."""
    figure, axes = _axes()
    for name, label, style in (("train_loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimiser step", ylabel="loss", title=title)
    if log_scale:
        axes.set_yscale("log")
    axes.legend()
    return figure


def selection_figure(selection: SelectionRecord) -> Figure:
    """What each layer or kv group scored, those that keep softmax attention in another colour."""
    found = [(entry, entry["score"]) for entry in selection["candidates"] if entry["score"] is not None]
    names = [str(e["layer"]) if e["group"] is None else f"{e['layer']}.{e['group']}" for e, _ in found]
    colours = ["tab:blue" if entry["kept"] is None else "tab:orange" for entry, _ in found]
    figure, axes = _axes(width=max(7.0, 0.22 * len(found)), grid="y")
    axes.bar(names, [score for _, score in found], color=colours)
    what = "layer" if all(entry["group"] is None for entry, _ in found) else "layer.kv group"
    what_kept = "Softmax kept" if "allocation" not in selection else "Softmax, all or a window"
    title = f"{what_kept} (orange): {selection['cache_ratio']:.1%} of the kv cache"
    axes.set(xlabel=what, ylabel=(selection["criterion"] or "transfer error").replace("_", " "), title=title)
    axes.tick_params(axis="x", rotation=90 if len(found) > 16 else 0)
    if min(score for _, score in found) > 0:
        axes.set_yscale("log")
    return figure


def allocation_figure(allocation: AllocationRecord) -> Figure:
    """What each kv group sees, layer by layer: everything, so many of the newest tokens, or linear attention."""
    from matplotlib.colors import LogNorm

    layers, length = allocation["layers"], allocation["length"]
    groups = max(map(len, layers.values()))
    figure, axes = _axes(width=max(7.0, 1.2 + 0.45 * len(layers)), height=1.6 + 0.5 * groups, grid=None)
    table = np.full((groups, len(layers)), np.nan)
    for column, seen in enumerate(layers.values()):
        for row, size in enumerate(seen):
            if size != "linear":
                table[row, column] = length if size == "all" else min(int(size), length)
            axes.text(column, row, str(size), ha="center", va="center", fontsize=7)
    image = axes.imshow(table, aspect="auto", cmap="Oranges", norm=LogNorm(vmin=64, vmax=4 * length, clip=True))
    share = allocation["bytes"] / allocation["teacher_bytes"]
    title = f"Tokens seen (white: linear): {share:.1%} of the teacher's cache at {length:,} tokens"
    axes.set(xlabel="layer", ylabel="kv group", title=title, yticks=range(groups))
    axes.set_xticks(range(len(layers)), labels=list(layers))
    image.axes.tick_params(length=0)
    return figure


def layer_figure(history: Sequence[dict[str, float]], title: str) -> Figure:
    """Transfer error of each layer at the first and at the best validation."""
    evaluations = [entry for entry in history if "validation_loss" in entry]
    best = min(evaluations, key=lambda entry: entry["validation_loss"])
    names = sorted(name for name in best if name.startswith("validation_layer_"))
    layers = [int(name.rpartition("_")[2]) for name in names]
    figure, axes = _axes(grid="y")
    for shift, entry, label in ((-0.2, evaluations[0], "before"), (0.2, best, f"best (step {best['step']:.0f})")):
        axes.bar([layer + shift for layer in layers], [entry[name] for name in names], width=0.4, label=label)
    axes.set(xlabel="layer", ylabel="mean squared error", title=title, yscale="log", xticks=layers)
    axes.legend()
    return figure


def perplexity_figure(perplexity: dict[str, float]) -> Figure:
    """Perplexity at each step, on a logarithmic axis because an untrained student is far off."""
    figure, axes = _axes(grid="y")
    bars = axes.bar(list(perplexity), list(perplexity.values()), width=0.6)
    axes.bar_label(bars, fmt="{:.4g}", padding=2)
    axes.set(ylabel="validation perplexity", yscale="log", title="Perplexity by step")
    axes.margins(y=0.15)
    return figure


def recall_figure(recall: Mapping[Side, Mapping[str, Measured]]) -> Figure:
    """Share of a random string copied right against its length, with standard errors."""
    figure, axes = _axes()
    for side, label in SIDES.items():
        gaps = sorted(recall[side], key=int)
        axes.errorbar(
            [int(gap) for gap in gaps],
            [recall[side][gap]["value"] for gap in gaps],
            yerr=[recall[side][gap]["stderr"] for gap in gaps],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(gap) for gap in gaps], labels=gaps)
    axes.set(xlabel="gap (tokens)", ylabel="copying recall", ylim=(-0.03, 1.03), title="Copying recall by gap")
    axes.legend()
    return figure


def tasks_figure(tasks: Mapping[str, TaskRecord]) -> Figure:
    """Each task's primary metric, teacher beside student, with standard errors."""
    figure, axes = _axes(grid="y")
    places = range(len(tasks))
    for (side, label), shift in zip(SIDES.items(), (-0.2, 0.2), strict=True):
        axes.bar(
            [place + shift for place in places],
            [task[side]["value"] for task in tasks.values()],
            yerr=[task[side]["stderr"] for task in tasks.values()],
            width=0.4,
            capsize=3,
            label=label,
        )
    labels = [f"{name}\n{task['metric']}" for name, task in tasks.items()]
    axes.set(title="lm-eval tasks", xticks=list(places), xticklabels=labels)
    axes.legend()
    return figure


def heads_figure(values: Heads, title: str, label: str, log_scale: bool = False) -> Figure:
    """A map of layers by heads; layers have as many heads as are linearized, the rest stays blank."""
    from matplotlib.colors import LogNorm

    layers = sorted(values, key=int)
    table = np.full((len(layers), max(len(values[layer]) for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        table[row, : len(values[layer])] = values[layer]
    figure, axes = _axes(height=0.7 + 0.36 * len(layers), grid=None)
    norm = LogNorm(vmin=max(1e-6, float(np.nanmin(table)))) if log_scale else None
    image = axes.imshow(table, aspect="auto", cmap="viridis", norm=norm)
    axes.set(xlabel="head", ylabel="layer", title=title, yticks=range(len(layers)), yticklabels=layers)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def positions_figure(positions: Mapping[Side, Positions], trained: int) -> Figure:
    """Loss by position; right of the line lie positions that training never reached."""
    figure, axes = _axes()
    for side, label in SIDES.items():
        ranges = positions[side]["ranges"]
        axes.errorbar(
            [(entry["start"] + entry["stop"]) / 2 for entry in ranges],
            [entry["loss"] for entry in ranges],
            yerr=[entry["stderr"] for entry in ranges],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.axvline(trained, linestyle="--", color="grey", label="training length")
    axes.set(xlabel="position (tokens)", ylabel="loss (nats)", xscale="log", title="Loss by position")
    axes.legend()
    return figure


def recovery_figure(tasks: Mapping[str, TaskRecord]) -> Figure | None:
    """Recovery of each task, chance-corrected where that is defined, with 95 % intervals; None where there is none."""
    found: dict[str, tuple[float, list[float]]] = {}
    for name, task in tasks.items():
        recovered = task.get("recovery")
        if recovered is None:
            continue
        kind, value, interval = "value", recovered["value"], recovered["interval"]
        if recovered.get("chance_corrected") is not None:
            kind, value = "chance corrected", recovered["chance_corrected"]
            interval = recovered["chance_corrected_interval"]
        if value is not None and interval is not None:
            found[f"{name}\n{kind}"] = (value, interval)
    if not found:
        return None
    figure, axes = _axes(height=1.2 + 0.5 * len(found), grid="x")
    for place, (value, (low, high)) in enumerate(found.values()):
        # A bootstrap interval need not hold the value itself where nearly all items are alike.
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([value], [place], xerr=errors, fmt="o", capsize=4, color="tab:blue")
    axes.axvline(1.0, linestyle="--", color="grey")
    axes.set(yticks=range(len(found)), yticklabels=list(found), xlabel="student / teacher", title="Recovery (1: all)")
    axes.margins(y=0.3)
    return figure


def audit_figure(audit: Audit) -> Figure:
    """Perplexity with parts of the model off."""
    measured = {name.replace("_", " "): audit[name] for name in BRANCHES}
    for layer, entry in audit["layers"].items():
        measured |= {f"layer {layer}: linear off": entry.get("linear_off")}
        measured |= {f"layer {layer}: softmax off": entry.get("softmax_off")}
    values = {name: value for name, value in measured.items() if value is not None}
    figure, axes = _axes(height=0.9 + 0.28 * len(values), grid=None)
    bars = axes.barh(list(values), list(values.values()), color=["tab:green"] + ["tab:orange"] * (len(values) - 1))
    axes.bar_label(bars, fmt="{:.4g}", padding=3)
    axes.set(xscale="log", xlabel="perplexity", title="With parts of the student off")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure


def entropy_figure(entropy: Heads, errors: Heads) -> Figure:
    """Transfer error against the teacher's entropy, one point per linearized layer."""
    figure, axes = _axes()
    layers = [layer for layer in sorted(errors, key=int) if layer in entropy]
    x = [float(np.mean(entropy[layer])) for layer in layers]
    y = [float(np.mean(errors[layer])) for layer in layers]
    axes.scatter(x, y)
    for layer, a, b in zip(layers, x, y, strict=True):
        axes.annotate(f" {layer}", (a, b))
    axes.set(xlabel="teacher's attention entropy (nats)", ylabel="relative transfer error", yscale="log")
    axes.set_title("Transfer error by layer, beside the teacher's entropy")
    return figure
