"""The attention function of linearized vision transformers, behind transformers' attention interface.

# B batch, N tokens (the prefix, then patches), H heads, D head dim
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lolcats_common.errors import UserError
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.softmax_attention import KeptGroups
from lolcats_core.model.vision.context import ImageCall, ImagePass
from lolcats_kernels.hybrid_attention import attend_bidirectional

IMAGE_ATTENTION = "lolcats_bidirectional"


def image_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' attention interface calls it.

    Args:
        query, key, value: [B, H, N, D]. attention_mask: of kept softmax attention; the linear heads know the padding
            from the pass.

    Returns:
        [B, N, H, D] in the dtype of `query`, and None for the weights, which are never built.
    """
    if not hasattr(module, "kept"):
        raise UserError(
            f"{type(module).__name__} is an attention layer of a softmax model, but the checkpoint is a linearized"
            " model; load it with AutoModel or AutoModelForImageClassification"
        )
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling)
    maps: FeatureMaps | None = getattr(module, "feature_maps", None)
    kept: KeptGroups = module.kept
    shared: ImagePass = module.image_pass
    groups = kept.groups

    def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # transformers' own function, so that kept layers are the teacher's bit for bit.
        options = {"scaling": scaling, "dropout": dropout, "is_causal": False}
        y: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)[0]
        return y

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if shared.observer is not None:
        # An observer is shown the teacher, which sees everything.
        y = softmax(query, key, value)
        if maps is not None:
            q, k, v, y_linear = (groups.take_linear(x) for x in (q, k, v, y))
            shared.observer(ImageCall(module.layer_idx, maps, q, k, v, y_linear, scores, grid=shared.grid))
        return y, None
    if maps is None:
        return softmax(query, key, value), None
    weights, config = maps(scores)
    y = attend_bidirectional(*(groups.take_linear(x) for x in (q, k, v)), weights, config, shared.grid)
    if not groups.softmax:
        return y, None
    y_kept = softmax(*(groups.take(x, groups.softmax).transpose(1, 2) for x in (q, k, v)))
    return groups.join((groups.linear, y), (groups.softmax, y_kept)), None
