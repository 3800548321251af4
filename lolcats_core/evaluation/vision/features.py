"""What a vision transformer's frozen features hold: how near they are to the teacher's, and what can be read from them.

# N images, n patches, d hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lolcats_core.model.forward import evaluating, model_device
from lolcats_core.model.vision.context import prefix_tokens
from lolcats_core.model.vision.modeling import backbone, image_inputs
from lolcats_core.training.loop import Rows, batches_of

# Regularisation (inverse) of the linear probe, on standardised features; steps of its solver.
PROBE_C, PROBE_STEPS = 0.01, 400
NEIGHBOURS = 10


@dataclass(frozen=True)
class ImageFeatures:
    """Of N images: `first`, the CLS token [N, d], or None where the family has none; `patches`, their mean [N, d]."""

    first: Tensor | None
    patches: Tensor

    def joined(self) -> np.ndarray:
        """[N, 2 d] or [N, d], as a linear probe reads them."""
        parts = [x for x in (self.first, self.patches) if x is not None]
        return torch.cat(parts, 1).numpy()


def image_features(model: nn.Module, rows: Rows, batch_size: int = 32) -> ImageFeatures:
    """Features of every row in the last hidden states of a linearized or a softmax model, float32 on the CPU."""
    config, device = cast(Any, model).config, model_device(model)
    prefix, first, patches = prefix_tokens(config), [], []
    with evaluating(model):
        for indices in batches_of(range(len(rows)), batch_size):
            batch = {name: value.to(device) for name, value in rows.batch(indices).items()}
            hidden = backbone(model)(**image_inputs(model, batch)).last_hidden_state.float()
            weights = batch.get("pixel_attention_mask", hidden.new_ones(hidden[:, prefix:].shape[:2])).float()
            patches.append((torch.einsum("bnd,bn->bd", hidden[:, prefix:], weights) / weights.sum(1)[:, None]).cpu())
            first.append(hidden[:, 0].cpu())
    return ImageFeatures(torch.cat(first) if prefix else None, torch.cat(patches))


def feature_cosines(student: ImageFeatures, teacher: ImageFeatures) -> dict[str, float]:
    """Mean cosine of the students' and the teacher's features, of each kind there is."""
    pairs = {"first": (student.first, teacher.first), "patches": (student.patches, teacher.patches)}
    return {
        name: float(F.cosine_similarity(own, wanted).mean())
        for name, (own, wanted) in pairs.items()
        if own is not None and wanted is not None
    }


def linear_probe(features: ImageFeatures, labels: np.ndarray) -> Callable[[ImageFeatures], np.ndarray]:
    """Logistic regression on standardised frozen features; the result predicts labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=PROBE_STEPS))
    probe.fit(features.joined(), labels)
    return lambda other: probe.predict(other.joined())


def nearest_neighbours(features: ImageFeatures, labels: np.ndarray) -> Callable[[ImageFeatures], np.ndarray]:
    """k-NN by cosine over frozen features (k = 10, or as many as there are); the result predicts labels."""
    from sklearn.neighbors import KNeighborsClassifier

    count = min(NEIGHBOURS, len(labels))
    classifier = KNeighborsClassifier(count, metric="cosine").fit(features.joined(), labels)
    return lambda other: classifier.predict(other.joined())
