"""Images in memory as rows that training reads by index.

# n images asked for, N images, C channels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lolcats_common.errors import UserError


class ImageRows:
    """Preprocessed images of one size, or of one number of patches (NaFlex), with their labels.

    Args:
        columns: what a batch holds, each [N, ...]: ``pixel_values`` [N, C, height, width] and, where there are,
            ``labels`` int64 [N], or with NaFlex ``pixel_attention_mask`` and ``spatial_shapes``.
        tokens: of each image in the model; what training counts.

    Raises:
        UserError: there are no pixels, or columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, Tensor], tokens: int) -> None:
        if "pixel_values" not in columns:
            raise UserError(f"`columns` must hold pixel_values, got {', '.join(columns) or 'none'}")
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"all columns must have as many rows, got {counts}")
        self.columns, self.sequence_length = dict(columns), tokens

    def __len__(self) -> int:
        return len(self.columns["pixel_values"])

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The columns of rows `indices`, each [n, ...]."""
        chosen = torch.as_tensor(np.asarray(indices))
        return {name: column[chosen] for name, column in self.columns.items()}
