"""`feature_map_init: calibrated`: maps from clusters of the teacher's keys, window factors from their error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lolcats_core as lc
from lolcats_common.params import ParamsError, TransferParams, params_from_dict
from lolcats_core.model.modeling import feature_maps, named_map_parameters
from lolcats_core.training.attention_transfer import attention_transfer, calibrate, evaluate_transfer
from lolcats_core.training.calibration import DECAYS, OFFSETS, WINDOW_FACTORS, key_clusters
from tests.core.tiny import SETTINGS, FakeRows, tiny_teacher

CALIBRATED = dataclasses.replace(SETTINGS, feature_map_init="calibrated")
BUILTIN = Path(lc.__file__).parent / "teacher" / "builtin"


class BuiltinRows(FakeRows):
    """Rows of the source of a module of the standard library."""

    def __init__(self, length: int) -> None:
        super().__init__(1, length)
        text = Path(dataclasses.__file__).read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(BUILTIN)(text)["input_ids"]
        self.input_ids = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def test_clusters_of_separate_groups_are_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = 10 * torch.eye(4, dtype=torch.float64)
    keys = (groups[:, None] + 0.1 * torch.randn(4, 50, 4, dtype=torch.float64, generator=generator)).flatten(0, 1)
    # Random keys may share a group at first, so more clusters than groups; each ends inside one group.
    centres = key_clusters(keys, 16, torch.Generator().manual_seed(1))
    assert torch.cdist(centres, groups).amin(1).max() < 1
    assert torch.cdist(groups, centres).amin(1).max() < 1
    assert torch.equal(centres, key_clusters(keys, 16, torch.Generator().manual_seed(1)))
    one = key_clusters(keys, 1, torch.Generator().manual_seed(1))
    torch.testing.assert_close(one[0], keys.mean(0))
    assert key_clusters(keys[:3], 5, generator).shape == (5, 4)


@torch.no_grad()
def test_it_starts_far_below_the_other_initial_values_on_real_text() -> None:
    teacher: Any = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    rows, params = BuiltinRows(384), TransferParams(batch_size=2)
    loss = {}
    for init in ("kaiming", "identity", "calibrated"):
        settings = lc.LinearizeConfig(feature_dim=32, feature_map_init=init, linear_factor="affine")  # type: ignore[arg-type]
        student = lc.linearize(teacher, settings)
        if init == "calibrated":
            calibrate(student, rows, params, seed=0)
        loss[init] = evaluate_transfer(student, rows, params, student.device)["loss"]
    assert loss["calibrated"] < 0.2 * min(loss["kaiming"], loss["identity"]), loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k_map_per": "kv_head"},
        {"feature_map_bias": True},
        {"window": "none"},
        {"feature_map": "t2r", "linear_factor": "affine", "window": "sliding"},
        {"softmax_heads": {0: (1,)}},
        {"linear_decay": 0.5},
        {"linear_decay": 0.5, "k_map_per": "kv_head", "window": "none"},
        {"combine": "mixture", "linear_decay": 0.5, "feature_positions": "unrotated", "window_sinks": 2},
    ],
)
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_every_kind_of_map_is_set_from_the_first_rows_that_training_sees(
    changes: dict[str, Any], documents: bool
) -> None:
    settings = dataclasses.replace(CALIBRATED, **changes)
    student, again = (lc.linearize(tiny_teacher(), settings, seed=seed) for seed in (0, 1))
    rows, params = FakeRows(8, documents=documents), TransferParams(batch_size=4)
    before = {name: p.clone() for name, p in named_map_parameters(student).items()}
    for model in (student, again):
        calibrate(model, rows, params, seed=3)
    for name, parameter in named_map_parameters(student).items():
        assert torch.equal(parameter, named_map_parameters(again)[name]), "the random draw must not matter"
        untouched = (".b_", "share_query", "share_count", "share_match", "share_window")
        changed = not any(each in name for each in untouched) and not (settings.window == "none" and "window" in name)
        assert torch.equal(parameter, before[name]) != changed, name
    for maps in feature_maps(student).values():
        if maps.window_factor is None:
            assert set(maps.share_offset.tolist()) <= {*OFFSETS}
            continue
        factors = torch.tensor(WINDOW_FACTORS if settings.window != "none" else (0.1,))
        assert ((maps.window_factor.sigmoid()[:, None] - factors).abs().amin(1) < 1e-6).all()
        if maps.decay is not None:
            assert ((maps.decay.sigmoid()[:, None] - torch.tensor(DECAYS)).abs().amin(1) < 1e-6).all()


def test_training_starts_from_it_and_keeps_the_best(tmp_path: Path) -> None:
    student, rows = lc.linearize(tiny_teacher(), CALIBRATED), FakeRows(8)
    reference = lc.linearize(tiny_teacher(), CALIBRATED)
    params = TransferParams(batch_size=4, max_steps=2, eval_every=1, lr=1e-9)
    calibrate(reference, rows, params, seed=0)
    attention_transfer(student, rows, rows, params, scratch=tmp_path, seed=0)
    for name, parameter in named_map_parameters(student).items():
        torch.testing.assert_close(parameter, named_map_parameters(reference)[name], rtol=1e-5, atol=1e-6)
    assert np.isfinite(evaluate_transfer(student, rows, params, student.device)["loss"])


def test_it_is_refused_without_attention_transfer() -> None:
    with pytest.raises(ParamsError, match=r"`linearize.feature_map_init: calibrated` needs `transfer.enabled`"):
        params_from_dict({"linearize": {"feature_map_init": "calibrated"}, "transfer": {"enabled": False}})
