"""Feature maps phi(x) = f(x W + b): the learnable part of the linear attention (arXiv 2410.10254, section 3.1).

# B batch, T tokens, H heads, D head dim, F columns of a map, E features that come out (F or 2F)
"""

from __future__ import annotations

import torch
from torch import Tensor

# Floor of every feature, as in the published code: it keeps the denominator of pure linear attention positive.
FEATURE_FLOOR = 1e-12
FEATURE_MAPS = ("hedgehog", "t2r", "elu")


def feature_count(feature_map: str, feature_dim: int) -> int:
    """Number of features E of a map with F = `feature_dim` columns."""
    return 2 * feature_dim if feature_map == "hedgehog" else feature_dim


def apply_feature_map(x: Tensor, w: Tensor, feature_map: str, bias: Tensor | None = None) -> Tensor:
    """Features of queries or keys.

    Args:
        x: [..., H, N, D], after rotary embeddings.
        w: [H, D, F]. `bias`: [H, F] or None.
        feature_map: ``hedgehog``: softmax over the features of xW and of -xW, concatenated; ``t2r``: ReLU;
            ``elu``: 1 + ELU.

    Returns:
        [..., H, N, E] in the dtype of `x`.

    Raises:
        ValueError: the name is unknown.
    """
    z = x @ w.to(x.dtype)
    if bias is not None:
        z = z + bias.to(x.dtype)[:, None, :]
    if feature_map == "hedgehog":
        phi = torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)
    elif feature_map == "t2r":
        phi = z.relu()
    elif feature_map == "elu":
        phi = torch.nn.functional.elu(z) + 1
    else:
        raise ValueError(f"`feature_map` must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    return phi.clamp(min=FEATURE_FLOOR)
