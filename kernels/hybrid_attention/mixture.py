"""Window and linear branch as two means of values, mixed by a share of the past that follows the query.

    y = (1 - r) y_w + r y_l,    r = sigmoid(a + u.q / sqrt(D) + b log n + c log(phi(q).z / n) - e lse_w)

y_w is the softmax over the window and the first tokens, lse_w the log-sum-exp of its scores, y_l the normalised linear
attention over n older tokens. With a = u = 0, b = c = e = 1 both stand under one softmax. A mean is bounded at any
length, while a sum of features grows against a window that does not (docs/quality.md).

# H query heads, D head dim, n tokens outside the window, weighed by the decay
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Nothing below it decays measurably within 10^5 tokens, and expm1 of less is lost in float32.
SMALLEST_LOG_DECAY = -1e-7


@dataclass(frozen=True)
class ShareWeights:
    """What decides the share r of the linear branch, for each query head.

    Attributes:
        offset: [H], a. `query`: [H, D], u.
        count, match, window: [H], the weights b, c and e of log n, of the match of query and state, and of lse_w.
    """

    offset: Tensor
    query: Tensor
    count: Tensor
    match: Tensor
    window: Tensor

    def view(self, *shape: int) -> ShareWeights:
        """The heads' dimension reshaped to `shape`, so that each tensor broadcasts in a form's layout."""
        vectors = (x.view(shape) for x in (self.offset, self.count, self.match, self.window))
        offset, count, match, window = vectors
        return ShareWeights(offset, self.query.view(*shape, -1), count, match, window)


def log_count(tokens: Tensor, distance: Tensor | int, log_decay: Tensor | None) -> Tensor:
    """log of the decayed number of `tokens` successive tokens, of which the newest is `distance` tokens away.

    log sum_{t < tokens} d^(distance + t); without a decay log(tokens). -inf stands as a large negative number, since
    a gradient of it is never wanted: `linear_share` is 0 there.

    Args:
        tokens: float tensor of counts. `distance`, `log_decay` broadcast against it.
    """
    some = tokens.clamp(min=1)
    if log_decay is None:
        return some.log()
    log_decay = log_decay.clamp(max=SMALLEST_LOG_DECAY)
    return distance * log_decay + torch.log(torch.expm1(some * log_decay) / torch.expm1(log_decay))


def linear_share(
    share: ShareWeights, q: Tensor, denominator: Tensor, relative: Tensor, count: Tensor, lse: Tensor, there: Tensor
) -> Tensor:
    """r in [0, 1), 0 where nothing lies outside the window.

    Args:
        share: viewed so that its heads broadcast with `lse`. `q`: [..., D] as the features read it.
        denominator: phi(q).z; `relative`: log of the tokens in it, both relative to the same token.
        count: log n, seen from the query. `lse`: log-sum-exp of the window's scores.
        there: where any token lies outside the window.
    """
    match = denominator.clamp(min=torch.finfo(denominator.dtype).tiny).log() - relative
    follows = (q * share.query).sum(-1) * q.shape[-1] ** -0.5
    logit = share.offset + follows + share.count * count + share.match * match - share.window * lse
    return logit.sigmoid().masked_fill(~there, 0)


def unrotate(x: Tensor, positions: Tensor, frequencies: Tensor | None, interleaved: bool) -> Tensor:
    """Queries or keys before their rotary embedding (arXiv 2104.09864).

    Args:
        x: [..., N, D] after it; of a head the first 2 P dims are rotated. `positions`: broadcastable to [..., N].
        frequencies: [P] radians per token, or None where features read `x` as it is.
        interleaved: pairs stand side by side (GLM, Cohere) instead of half a rotated part apart (Llama).

    Returns:
        In the dtype of `x`; the angles are computed in at least float32.
    """
    if frequencies is None:
        return x
    angle_dtype = torch.promote_types(x.dtype, torch.float32)
    angle = positions[..., None].to(angle_dtype) * frequencies.to(angle_dtype)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    pairs = len(frequencies)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    else:
        first, second = turned.chunk(2, -1)
    back = first * cos + second * sin, second * cos - first * sin
    turned = torch.stack(back, -1).flatten(-2) if interleaved else torch.cat(back, -1)
    return torch.cat([turned, rest], -1)
