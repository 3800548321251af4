"""Linearized vision transformers as models: their own code, sizes of images, copies, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_core.model.families import VISION, modality, refusal
from lolcats_core.model.modeling import check_architecture
from lolcats_core.model.vision.modeling import image_layers
from tests.core.tiny_images import SETTINGS, TILED, images, output, tiny_student, tiny_teacher


def test_saved_students_load_with_their_own_code_where_this_package_is_absent(tmp_path: Path) -> None:
    lines = ["import sys, torch", "from transformers import AutoModel, AutoModelForImageClassification as Classifier"]
    for family, kind in (("dinov2", 0), ("deit", 2), ("siglip2_vision_model", 0)):
        student, folder = tiny_student(family, TILED, kind=kind), tmp_path / family
        student.save_pretrained(folder)
        batch = images(family)
        torch.save((batch, output(student, batch)), folder / "expected.pt")
        auto = "Classifier" if kind else "AutoModel"
        lines += [
            f"model = {auto}.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()",
            f"batch, expected = torch.load({str(folder / 'expected.pt')!r})",
            "with torch.no_grad(): out = model(**batch)",
            "found = out.logits if 'logits' in out else out.last_hidden_state",
            "found = found[batch['pixel_attention_mask'].bool()] if 'spatial_shapes' in batch else found",
            f"assert type(model).__name__ == {type(student).__name__!r}, type(model)",
            "assert torch.equal(found, expected), (found - expected).abs().max()",
        ]
    lines.append("assert not any(name.startswith('lolcats_') for name in sys.modules)")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-I", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", [family for family, entry in VISION.items() if not entry.packed])
def test_images_of_another_size_have_their_own_tiles(family: str) -> None:
    teacher, batch = tiny_teacher(family), images(family, size=56)
    options = {"interpolate_pos_encoding": True} if VISION[family].interpolates else {}
    kept = lc.linearize(teacher, lc.LinearizeConfig(window="none", softmax_layers=(0, 1, 2)))
    with torch.no_grad():
        expected = teacher(**batch, **options).last_hidden_state
        assert torch.equal(kept(**batch, **options).last_hidden_state, expected)
        one_tile = lc.linearize(teacher, lc.LinearizeConfig(window="tiled", window_size=8, feature_dim=8))
        # A tile that holds all patches leaves softmax attention alone.
        assert torch.allclose(one_tile(**batch, **options).last_hidden_state, expected, atol=1e-4)


def test_a_copied_student_keeps_one_pass_for_all_its_layers() -> None:
    student = copy.deepcopy(tiny_student())
    assert {id(layer.image_pass) for layer in image_layers(student)} == {id(student.image_pass)}
    batch = images(size=56)
    assert torch.equal(output(student, batch), output(tiny_student(), batch))


def test_every_family_of_images_is_tested_and_known() -> None:
    for name, family in VISION.items():
        config = getattr(transformers, family.config)()
        assert config.model_type == name
        assert modality(config.to_dict()) == "image"
        assert refusal(config.to_dict()) is None
        check_architecture(config, SETTINGS)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("swin", {}, "attend within windows that move and merge"),
        ("hiera", {}, "attend within windows that move and merge"),
        ("sam_vision_model", {}, "learned bias by relative position"),
        ("beit", {"use_relative_position_bias": True}, "learned bias by relative position"),
        ("clip", {}, "give its vision model alone"),
        ("siglip2", {}, "give its vision model alone"),
        ("vit_mae", {}, "not among the tested ones"),
    ],
)
def test_other_vision_models_are_refused_by_name(name: str, changes: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^architecture '{name}' cannot be linearized: .*") as caught:
        check_architecture(CONFIG_MAPPING[name](**changes), SETTINGS)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`window` of a vision transformer must be tiled or none, got 'terraced'"),
        ({"window": "none", "linear_decay": 0.9}, "`linear_decay` of a vision transformer must be None, got 0.9"),
        (
            {"window": "none", "softmax_layers": (0,), "softmax_window": 8},
            "`softmax_window` of a vision transformer must be None, got 8",
        ),
        ({"window": "none", "softmax_layers": (3,)}, "`softmax_layers` must be below the 3 layers, got 3"),
    ],
)
def test_settings_that_images_do_not_have_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lc.linearize(tiny_teacher(), lc.LinearizeConfig(**settings))


def test_text_models_have_no_tiles() -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=1)
    with pytest.raises(UserError, match="`window` of a text model must be one of terraced, sliding, none, got 'tiled'"):
        check_architecture(config, lc.LinearizeConfig(window="tiled"))


def test_what_a_pass_cannot_have_is_refused_in_one_line() -> None:
    student, batch = tiny_student(), images()
    with pytest.raises(UserError, match="`output_attentions` of a linearized model must be False"):
        student(**batch, output_attentions=True)
    with pytest.raises(UserError, match="`attention_mask` of a linearized vision transformer must be None"):
        student(**batch, attention_mask=torch.ones(2, 26))
    with pytest.raises(UserError, match="`attn_implementation` of a linearized model must be lolcats_bidirectional"):
        student.set_attn_implementation("sdpa")
    packed = images("siglip2_vision_model")
    packed["pixel_attention_mask"] = packed["pixel_attention_mask"].flip(1)
    with pytest.raises(UserError, match="`pixel_attention_mask` must have its zeros at the end of each row"):
        tiny_student("siglip2_vision_model")(**packed)
