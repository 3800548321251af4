"""An audit of a linearized model: each branch and each layer switched off, and where its attention goes.

Hybrids can reach a good perplexity by their window alone (arXiv 2510.05901); these numbers show it.

# B batch, T tokens, N keys, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lolcats_common.errors import UserError
from lolcats_common.records import Audit, LayerAblation
from lolcats_core.model.branches import Branch, without_branch
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.forward import causal_logits, evaluating, model_device
from lolcats_core.model.modeling import attention_layers
from lolcats_core.training import attention_transfer
from lolcats_core.training.loop import Rows
from lolcats_core.training.perplexity import perplexity
from lolcats_kernels.hybrid_attention import attention_weights, window_mask, window_scores

# Queries per block of the quadratic weights.
BLOCK = 128


@contextlib.contextmanager
def branch_off(student: nn.Module, branch: Branch, layers: Sequence[int] | None = None) -> Iterator[None]:
    """`without_branch` in `layers` (all by default)."""
    chosen = []
    for layer in attention_layers(student):
        maps = getattr(layer, "feature_maps", None)
        if maps is not None and (layers is None or layer.layer_idx in layers):
            chosen.append(maps)
    with without_branch(chosen, branch):
        yield


@contextlib.contextmanager
def softmax_off(student: PreTrainedModel, layer_index: int) -> Iterator[None]:
    """Inside the block, the heads of one layer that keep softmax attention put out zeros."""
    layer = next(x for x in attention_layers(student) if x.layer_idx == layer_index)
    maps = getattr(layer, "feature_maps", None)
    projection = layer.o_proj if hasattr(layer, "o_proj") else layer.dense

    def silence(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if maps is None:
            return (torch.zeros_like(given[0]), *given[1:])
        groups = given[0].unflatten(-1, (maps.groups.count, -1)).clone()
        groups[..., list(maps.groups.softmax), :] = 0
        return (groups.flatten(-2), *given[1:])

    handle = projection.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def ablations(student: PreTrainedModel, rows: Rows, *, batch_size: int, max_rows: int) -> Audit:
    """Perplexity of the model as it is and with parts of it off, over the same rows.

    Returns:
        ``whole``, ``linear_off``, ``window_off``, and ``layers``: by number its ``linear_off`` (that layer alone)
        where it has linear heads and its ``softmax_off`` where it has softmax heads. None where the loss is not finite.
    """

    def measured() -> float | None:
        try:
            return perplexity(student, rows, batch_size=batch_size, max_rows=max_rows).perplexity
        except UserError:
            return None

    found: Audit = {"whole": measured(), "layers": {}}
    with branch_off(student, "linear"):
        found["linear_off"] = measured()
    with branch_off(student, "window"):
        found["window_off"] = measured()
    for layer in attention_layers(student):
        index, maps = layer.layer_idx, getattr(layer, "feature_maps", None)
        entry: LayerAblation = {}
        if maps is not None:
            with branch_off(student, "linear", [index]):
                entry["linear_off"] = measured()
        if maps is None or maps.groups.softmax:
            with softmax_off(student, index):
                entry["softmax_off"] = measured()
        found["layers"][str(index)] = entry
    return found


@contextlib.contextmanager
def probed(model: PreTrainedModel, probe: Callable[[Any, Tensor, Tensor, Scores], None]) -> Iterator[bool]:
    """Inside the block, `probe` sees (attention module, q [B, H, T, D], k [B, Hk, T, D], scores) of every layer.

    Yields False where the model's attention function is not one of transformers' registered ones; nothing is then seen.
    """
    name = str(model.config._attn_implementation)
    original = ALL_ATTENTION_FUNCTIONS.get(name)
    if original is None:
        yield False
        return

    def watched(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        probe(module, query, key, Scores(query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap")))
        return original(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, watched)
    try:
        yield True
    finally:
        AttentionInterface.register(name, original)


def _run(model: PreTrainedModel, rows: Rows, max_rows: int) -> None:
    device = model_device(model)
    with evaluating(model):
        for row in range(min(max_rows, len(rows))):
            batch = rows.batch([row])
            # One document per row: the weights that are looked at know no borders inside a row.
            causal_logits(model, batch["input_ids"].to(device))


class _Means:
    """Running means of per-head values by layer."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def add(self, layer: int, values: Tensor, count: int) -> None:
        """Sums over `count` terms per head, [H]."""
        values = values.double().cpu()
        self.sums[layer] = self.sums[layer] + values if layer in self.sums else values
        self.counts[layer] = self.counts.get(layer, 0) + count

    def result(self) -> dict[str, list[float]]:
        return {str(layer): (self.sums[layer] / self.counts[layer]).tolist() for layer in sorted(self.sums)}


def linear_mass(student: PreTrainedModel, rows: Rows, max_rows: int) -> dict[str, list[float]]:
    """Share of attention that falls on keys outside the window, by layer, one value per linearized query head.

    Only queries that have such keys count: the first tokens of a row see their window alone.
    """
    means = _Means()

    def look(module: Any, query: Tensor, key: Tensor, scores: Scores) -> None:
        maps: FeatureMaps | None = getattr(module, "feature_maps", None)
        if maps is None:
            return
        q, k = (maps.groups.take_linear(x.transpose(1, 2)).float() for x in (query, key))
        operands, config = maps(scores)
        positions = torch.arange(q.shape[1], device=q.device)
        for start in range(0, q.shape[1], BLOCK):
            queries = positions[start : start + BLOCK]
            weights = attention_weights(q[:, start : start + BLOCK], k, operands, config, start)
            inside = window_mask(config.window, queries[:, None], positions[None], config.window_size)
            past = (positions[None] <= queries[:, None]) & ~inside
            counted = past.any(1)
            mass = (weights * past).sum(-1)[:, :, counted]
            if bool(counted.any()):
                means.add(module.layer_idx, mass.sum((0, 2)), len(q) * int(counted.sum()))

    with probed(student, look):
        _run(student, rows, max_rows)
    return means.result()


def attention_entropy(teacher: PreTrainedModel, rows: Rows, max_rows: int) -> dict[str, list[float]]:
    """Mean entropy of the softmax attention in nats, by layer, one value per query head; empty where unknown.

    exp of it is the effective number of keys. A sliding window of the layer is taken into account.
    """
    means = _Means()

    def look(module: Any, query: Tensor, key: Tensor, scores: Scores) -> None:
        keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        positions = torch.arange(key.shape[2], device=key.device)
        window = getattr(module, "sliding_window", None) or key.shape[2]
        for start in range(0, query.shape[2], BLOCK):
            queries = positions[start : start + BLOCK, None]
            seen = (positions[None] <= queries) & (positions[None] > queries - window)
            products = query[:, :, start : start + BLOCK].float() @ keys.mT
            logits = window_scores(products, scores.scale, scores.softcap).masked_fill(~seen, float("-inf"))
            log_weights = logits.log_softmax(-1)
            entropy = -(log_weights.exp() * log_weights.masked_fill(~seen, 0)).sum(-1)
            means.add(module.layer_idx, entropy.sum((0, 2)), len(query) * queries.shape[0])

    with probed(teacher, look):
        _run(teacher, rows, max_rows)
    return means.result()


def head_errors(student: PreTrainedModel, rows: Rows, max_rows: int) -> dict[str, list[float]]:
    """Transfer error of each head: squared error over the square of the softmax output, under teacher forcing.

    Args:
        student: after attention transfer, before LoRA, so that its projections are the teacher's.

    Returns:
        By layer, one value per linearized query head.
    """
    with evaluating(student):
        found = attention_transfer.head_errors(student, rows, max_rows, batch_size=1)
    return {
        str(layer): [error / max(power, 1e-12) for error, power in zip(each["error"], each["power"], strict=True)]
        for layer, each in found.items()
    }
