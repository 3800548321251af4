"""Initial feature maps from the teacher's own keys, so that attention transfer starts close to softmax attention.

The columns of both maps are centres of clusters of keys, times the scale of the scores. Softmax over the features then
gives a key its cluster and a query its attention over the clusters' centres, and their product is nearly the attention
that the query pays to the key's cluster. The balance of the two parts (and decays) come from the error itself, per
head. With `combine: mixture` it is the share's offset; else the window factor, which with `linear_factor: affine` spans
every balance, while with ``one`` the linear part, whose weights add up over all older tokens, cannot become as small as
it should be.

# B batch, T tokens, N keys, H query heads, Hk key/value heads, D head dim, F columns of a map
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from lolcats_common.params import TransferParams
from lolcats_core.model.forward_context import LayerCall
from lolcats_core.training.loop import step_batches
from lolcats_kernels.hybrid_attention.mixture import unrotate

ROWS = 4
KEYS = 4096  # that are clustered, of each head
ITERATIONS = 10
WINDOW_FACTORS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
OFFSETS = tuple(float(x) for x in range(-8, 9))
DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9998)


def calibration_rows(rows: int, params: TransferParams, seed: int, count: int = ROWS) -> np.ndarray:
    """Indices of at most `count` rows, which are looked at: the first that training will see."""
    found, step = step_batches(rows, params, seed, 0), 1
    if count <= ROWS:
        return found[0][:count]
    # Images have few tokens; of one epoch, which holds each row once.
    while sum(map(len, found)) < min(count, rows):
        found, step = found + step_batches(rows, params, seed, step), step + 1
    return np.concatenate(found)[:count]


def key_clusters(keys: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres [count, D] of `keys` [N, D] by Lloyd's algorithm from random keys; an empty cluster keeps its centre."""
    draw = torch.randperm(len(keys), generator=generator).to(keys.device)
    keys = keys[draw[:KEYS]]
    centres = keys[torch.arange(count, device=keys.device) % len(keys)].clone()
    for _ in range(ITERATIONS):
        nearest = torch.cdist(keys, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, keys)
        members = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)
    return centres


@torch.no_grad()
def calibrate_layer(call: LayerCall, *, seed: int) -> None:
    """Set one layer's maps and window factors; with its seed bound, a `LayerObserver`."""
    generator = torch.Generator().manual_seed(seed + call.index)
    maps, scores = call.maps, call.scores
    _, k, _, y_true = call.as_packed()
    weights, config = maps(scores)
    positions = call.positions().to(k.device)
    plain = unrotate(k.transpose(1, 2), positions, weights.frequencies, config.rotary_interleaved).transpose(1, 2)
    wide = plain.flatten(0, 1).to(torch.promote_types(k.dtype, torch.float32))
    real = call.real()
    wide = wide if real is None else wide[real.flatten()]
    served = len(maps.w_k) // k.shape[2]  # maps of each kv head
    found = [key_clusters(wide[:, head // served], maps.w_k.shape[2], generator) for head in range(len(maps.w_k))]
    w = torch.stack(found).mT * scores.scale
    maps.w_k.copy_(w)
    maps.w_q.copy_(w.repeat_interleave(maps.heads // len(w), 0))

    def errors() -> Tensor:
        y = call.attended(*maps(scores))
        return (y.float() - y_true.float()).square().mean((0, 1, 3))

    def choose(parameter: Tensor, values: Tensor) -> None:
        """The value with the least error for each entry of `parameter`, which may serve several heads."""
        found = []
        for value in values:
            parameter.fill_(value)
            found.append(errors().unflatten(0, (len(parameter), -1)).mean(1))
        parameter.copy_(values[torch.stack(found).argmin(0)])

    def balance() -> None:
        if maps.window_factor is None:
            choose(cast(Tensor, maps.share_offset), torch.tensor(OFFSETS, device=w.device))
        elif maps.settings.window != "none":
            choose(maps.window_factor, torch.tensor(WINDOW_FACTORS, device=w.device).logit())

    # The balance of both parts first: the best decay depends on it, and then it on the decay.
    balance()
    if maps.decay is not None:
        choose(maps.decay, torch.tensor(DECAYS, device=w.device).logit())
        balance()
