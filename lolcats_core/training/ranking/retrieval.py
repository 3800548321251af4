"""What single kv groups of a teacher are for: its next-token distributions with one of them cut to a window.

# B rows, L tokens of a row, n counted positions, d hidden size
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, local_layers
from lolcats_common.params import SelectParams
from lolcats_common.progress import progress
from lolcats_core.model.kv_groups import Group, KVGroups
from lolcats_core.model.modeling import attention_layers, linearize
from lolcats_core.model.softmax_attention import KeptGroups, SoftmaxWindow
from lolcats_core.training.loop import Rows
from lolcats_core.training.losses import KL, summed_loss
from lolcats_core.training.ranking.criteria import Retrieval
from lolcats_core.training.ranking.probes import Probe, make_probes

# Tokens of a forward pass; the outputs of every layer stay in memory while the groups take their turns.
TOKENS = 16384


def retrieval_of(teacher: PreTrainedModel, rows: Rows, tokenizer: Any, params: SelectParams, seed: int) -> Retrieval:
    """`cut_losses` of a teacher on probes from its training rows, which are made when it is asked for the first time.

    Args:
        rows: training rows. params: how many probes, how long, and what a cut group sees.

    Raises:
        UserError: there is no tokenizer.
    """
    if tokenizer is None:
        raise UserError("`select.criterion: retrieval` needs the teacher's tokenizer, got none")

    def measure(cuts: Sequence[frozenset[Group]]) -> list[dict[str, float]]:
        config, reach = teacher.config, params.probe_window
        context = getattr(config, "max_position_embeddings", None) or 2 * rows.sequence_length
        length = params.probe_length or min(context, 2 * rows.sequence_length)
        probes = make_probes(
            rows, tokenizer, config.vocab_size, count=params.rows, length=length, reach=reach, seed=seed
        )
        return cut_losses(teacher, probes, cuts, SoftmaxWindow(reach, params.first_tokens))

    return measure


@torch.no_grad()
def cut_losses(
    teacher: PreTrainedModel, probes: Sequence[Probe], cuts: Sequence[frozenset[Group]], window: SoftmaxWindow
) -> list[dict[str, float]]:
    """Mean KL in nats of the teacher's next-token distribution from its own with some kv groups cut to `window`.

    Layers in front of the cut one are not run again.

    Args:
        cuts: kv groups that are cut together, all of one layer.

    Returns:
        For each cut, the mean over the counted positions of each probe, by the probe's name.

    Raises:
        UserError: the window is as wide as the teacher's own or sees whole rows: the cut would show nothing.
    """
    _check(teacher.config, probes, window)
    model = linearize(teacher, LinearizeConfig(softmax_layers=tuple(range(teacher.config.num_hidden_layers))))
    attention = attention_layers(model)
    blocks = list(cast(Any, model).base_model.layers)
    sums = [dict.fromkeys((probe.name for probe in probes), 0.0) for _ in cuts]
    batches = [(probe, rows) for probe in probes for rows in _batches(probe)]
    with progress(len(batches) * len(cuts), "retrieval") as bar:
        for probe, rows in batches:
            ids, counted = (x[rows].to(model.device) for x in (probe.input_ids, probe.counted))
            with _recorded(blocks) as outputs:
                wanted = _hidden(model, ids, counted)
            for place, cut in enumerate(cuts):
                ((layer, *others),) = [sorted({layer for layer, _ in cut})]
                assert not others, "a cut is of one layer"
                with _cut(attention[layer], cut, window), _resumed(blocks, layer, outputs):
                    found = _hidden(model, ids, counted)
                sums[place][probe.name] += _divergence(model, wanted, found)
                bar.update()
    totals = {probe.name: int(probe.counted.sum()) for probe in probes}
    return [{name: value / totals[name] for name, value in each.items()} for each in sums]


def _check(config: Any, probes: Sequence[Probe], window: SoftmaxWindow) -> None:
    assert window.size is not None
    own = None if local_layers(config) else getattr(config, "sliding_window", None)
    if own is not None and window.size >= own:
        raise UserError(
            f"`select.probe_window` must be below the teacher's own sliding window of {own}, got {window.size}"
        )
    length = min(probe.input_ids.shape[1] for probe in probes)
    if 2 * window.size >= length:
        raise UserError(
            f"`select.probe_length` must be above twice `select.probe_window` ({window.size}), got {length}"
        )


def _batches(probe: Probe) -> Iterator[slice]:
    rows, length = probe.input_ids.shape
    step = max(1, TOKENS // length)
    return (slice(start, start + step) for start in range(0, rows, step))


def _hidden(model: Any, ids: Tensor, counted: Tensor) -> Tensor:
    """Final hidden states [n, d] of the counted positions."""
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[counted]


def _divergence(model: Any, wanted: Tensor, found: Tensor) -> float:
    """Summed KL of two sets of final hidden states [n, d]."""
    none = torch.zeros(1, len(found), dtype=torch.long, device=found.device)
    return float(summed_loss(model, found[None], none, torch.ones_like(none, dtype=torch.bool), KL, wanted[None]))


@contextlib.contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What the decoder layers put out inside the block, in order."""
    outputs: list[Any] = []
    handles = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _cut(layer: Any, cut: frozenset[Group], window: SoftmaxWindow) -> Iterator[None]:
    """Inside the block, these kv groups of an attention layer see `window`, the others everything."""
    whole: KeptGroups = layer.kept
    groups: KVGroups = whole.groups
    heads = tuple(sorted(head for _, head in cut))
    rest = tuple(head for head in range(groups.count) if head not in heads)
    layer.kept = KeptGroups(groups, ({SoftmaxWindow(): rest} if rest else {}) | {window: heads})
    try:
        yield
    finally:
        layer.kept = whole


@contextlib.contextmanager
def _resumed(blocks: Sequence[nn.Module], layer: int, outputs: Sequence[Any]) -> Iterator[None]:
    """Inside the block, the decoder layers before `layer` pass on what the last of them once put out."""
    skipped = blocks[:layer]
    for block in skipped:
        cast(Any, block).forward = lambda *args, **kwargs: outputs[layer - 1]
    try:
        yield
    finally:
        for block in skipped:
            del cast(Any, block).forward
