"""Feature maps phi(x) = f(x W + b): the learnable part of the linear attention (arXiv 2410.10254, section 3.1).

To add one, write its entry in `FEATURE_MAPS` and, where the fused kernels shall have it, the branch of its activation
in `fused/features.py` (`activation` and `activation_grad`). Every form, check and count reads the table; settings of a
model name it in `lolcats_common/linearize_config.py` (`FeatureMap`), which a test compares with the table.

# B batch, T tokens, H heads, D head dim, F columns of a map, E features that come out (F or 2F)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Floor of every feature, as in the published code: it keeps the denominator of pure linear attention positive.
FEATURE_FLOOR = 1e-12


@dataclass(frozen=True)
class FeatureMapSpec:
    """One feature map.

    Attributes:
        apply: features [..., E] of z = xW + b [..., F].
        halves: E / F; 2 where the features are one activation of z and of -z, concatenated.
        fused_code: name of that activation in the Triton kernels.
    """

    apply: Callable[[Tensor], Tensor]
    halves: int
    fused_code: str


FEATURE_MAPS = {
    "hedgehog": FeatureMapSpec(lambda z: torch.cat([z.softmax(-1), (-z).softmax(-1)], -1), 2, "softmax"),
    "t2r": FeatureMapSpec(torch.relu, 1, "relu"),
    "elu": FeatureMapSpec(lambda z: torch.nn.functional.elu(z) + 1, 1, "elu"),
}


def feature_count(feature_map: str, feature_dim: int) -> int:
    """Number of features E of a map with F = `feature_dim` columns."""
    return FEATURE_MAPS[feature_map].halves * feature_dim


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
        KeyError: the name is unknown; `HybridConfig` checks it.
    """
    z = x @ w.to(x.dtype)
    if bias is not None:
        z = z + bias.to(x.dtype)[:, None, :]
    return FEATURE_MAPS[feature_map].apply(z).clamp(min=FEATURE_FLOOR)
