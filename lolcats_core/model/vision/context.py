"""What the attention layers of one pass over images share: where the patches stand, and who observes the layers.

It hangs on the attention modules, since some families hand no keyword arguments to them. A hook before the backbone
sets it; the layers of one model share one `ImagePass`.

# B batch, N tokens (the prefix, then patches), H query heads, D head dim
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_core.model.families import vision_family_of
from lolcats_core.model.forward_context import HybridContext, LayerCall, LayerObserver
from lolcats_kernels.hybrid_attention import (
    HybridConfig,
    HybridWeights,
    TokenGrid,
    attend_bidirectional,
    bidirectional_error,
)


@dataclass
class ImagePass:
    """The grid of the newest pass, and the observer of passes that show the teacher (teacher forcing), or None."""

    grid: TokenGrid = field(default_factory=TokenGrid)
    observer: LayerObserver | None = None


@dataclass(frozen=True)
class ImageCall(LayerCall):
    """The attention of one linearized layer in one pass over images; `grid` of the pass."""

    context: HybridContext = field(default_factory=HybridContext)
    grid: TokenGrid = field(default_factory=TokenGrid)

    def real(self) -> Tensor | None:
        return self.grid.real(self.q.shape[1], self.q.device)

    def attended(self, weights: HybridWeights, config: HybridConfig) -> Tensor:
        return attend_bidirectional(self.q, self.k, self.v, weights, config, self.grid)

    def error(self, weights: HybridWeights, config: HybridConfig) -> Tensor:
        return bidirectional_error(self.q, self.k, self.v, self.y_true, weights, config, self.grid)


def prefix_tokens(config: Any) -> int:
    """Tokens before the patches: CLS, distillation and registers."""
    return vision_family_of(config).prefix + (getattr(config, "num_register_tokens", None) or 0)


def patch_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of that many pixels."""
    size = config.patch_size
    down, across = (size, size) if isinstance(size, int) else size
    return height // down, width // across


def grid_of(config: Any, inputs: dict[str, Any]) -> TokenGrid:
    """Where the tokens of a pass stand.

    Args:
        inputs: of the backbone: pixel_values [B, C, height, width], or with NaFlex spatial_shapes [B, 2] and
            pixel_attention_mask [B, N] besides.

    Raises:
        UserError: there is no such input, or a mask whose padding is not at the end of its rows.
    """
    prefix, pixels = prefix_tokens(config), inputs.get("pixel_values")
    if pixels is None:
        raise UserError("`pixel_values` must be given to a linearized vision transformer")
    if not vision_family_of(config).packed:
        return TokenGrid(prefix, patch_grid(config, *pixels.shape[-2:]))
    shapes, mask = inputs["spatial_shapes"], inputs.get("pixel_attention_mask")
    if mask is None or bool(mask.bool().all()):
        return TokenGrid(prefix, shapes)
    lengths = mask.sum(1).to(torch.int64)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise UserError("`pixel_attention_mask` must have its zeros at the end of each row")
    return TokenGrid(prefix, shapes, prefix + lengths)
