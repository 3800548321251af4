"""One step of a batch: every sequence's new tokens through the parts of a layer, from and to the pages of their states.

# T new tokens of all sequences, B sequences, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lolcats_kernels.hybrid_attention import HybridConfig, HybridState, HybridWeights, attend, decode_
from lolcats_vllm.state import LayerPlan, StateLayout

Operands = tuple[HybridWeights, HybridConfig]


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, those with a single new token first, as vLLM's metadata has them.

    Attributes:
        decodes, prefills: how many have a single new token, and how many come after them.
        starts: [B + 1], where each sequence's new tokens begin. `lengths`: [B], tokens with the new ones.
        slots: [B], pages of the states.
    """

    decodes: int
    prefills: int
    starts: Tensor
    lengths: Tensor
    slots: Tensor


@torch.no_grad()
def run_step(
    plan: LayerPlan,
    layout: StateLayout,
    operands: Sequence[Operands],
    cache: Sequence[Tensor],
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> list[Tensor]:
    """The outputs of the layer's parts; their states in `cache` are replaced.

    Args:
        operands: of each part. `cache`: the two rows of every page (`StateLayout`).
        q: [1, T, H, D]; `k`, `v`: [1, T, Hk, D], all heads of the layer; tokens after the last sequence are padding.

    Returns:
        For each part [1, T, its query heads, D], zero at padding.
    """
    inputs = [tuple(plan.groups.take(x, part.members) for x in (q, k, v)) for part in plan.parts]
    outputs = [torch.zeros_like(x[0]) for x in inputs]

    def run(first: int, last: int, rows: slice, *, single: bool) -> None:
        slots = batch.slots[first:last].long()
        new = 1 if single else rows.stop - rows.start
        states = layout.read(cache, slots, batch.lengths[first:last] - new)
        for i, (x, (weights, config), y) in enumerate(zip(inputs, operands, outputs, strict=True)):
            # One token of each sequence, or all of one sequence.
            taken = [t[:, rows].transpose(0, 1) if single else t[:, rows] for t in x]
            if single:
                y[0, rows] = decode_(*cast(Any, taken), weights, config, states[i])[:, 0]
            else:
                found = attend(*cast(Any, taken), weights, config, initial_state=states[i], return_state=True)
                y[:, rows], states[i] = cast(tuple[Tensor, HybridState], found)
        layout.write(cache, slots, states)

    if batch.decodes:
        run(0, batch.decodes, slice(0, batch.decodes), single=True)
    starts = batch.starts.tolist() if batch.prefills else []
    for i in range(batch.decodes, batch.decodes + batch.prefills):
        run(i, i + 1, slice(starts[i], starts[i + 1]), single=False)
    return outputs
