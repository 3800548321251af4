"""Images: where training starts and what its losses do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.kv_groups import KVGroups
from lolcats_core.model.vision.context import ImageCall
from lolcats_core.training.calibration import calibrate_layer
from lolcats_kernels.hybrid_attention import TokenGrid
from tests.core.tiny_images import SETTINGS
from tests.core.training.test_image_training import finetune


def test_the_calibrated_start_finds_the_clusters_of_real_keys() -> None:
    settings = dataclasses.replace(SETTINGS, feature_map_init="calibrated")
    maps, generator = FeatureMaps(settings, KVGroups(1), 1, 8), torch.Generator().manual_seed(0)
    cluster = torch.randint(8, (3, 60), generator=generator)
    k = 6 * torch.eye(8)[cluster] + 0.1 * torch.randn(3, 60, 8, generator=generator)
    v = torch.randn(8, 8, generator=generator)[cluster]
    lengths = torch.tensor([60, 40, 50])
    k[torch.arange(60) >= lengths[:, None]] = 1e4  # padding, which no cluster may stand for
    q, k, v = (x[:, :, None] for x in (k, k, v))
    call = ImageCall(0, maps, q, k, v, v, Scores(8**-0.5), grid=TokenGrid(lengths=lengths))
    random = call.error(*maps(call.scores))
    calibrate_layer(call, seed=0)
    assert call.error(*maps(call.scores)) < 0.5 * random


@pytest.mark.parametrize("scope", ["lora", "full"])
@pytest.mark.parametrize("loss", ["feature", "logit_kl", "cross_entropy", "mixed"])
def test_every_loss_falls_in_both_scopes(loss: str, scope: str, tmp_path: Path) -> None:
    # Steps so small that the loss falls as its gradient says: a random student is near its teacher already.
    _, model, result = finetune(tmp_path, loss=loss, scope=scope, lr=3e-5, eval_every=1)
    assert result.best_step > 3
    assert result.best_loss < result.history[0]["validation_loss"]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names) == (scope == "lora")
    assert "linearized.weight" not in names
