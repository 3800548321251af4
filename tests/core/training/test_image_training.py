"""Both stages on images: every layer learns to copy its softmax, a killed run ends bit for bit, the teacher stays."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.training_params import ImageFinetuneParams, TransferParams
from lolcats_core.data.images import ImageRows
from lolcats_core.model.families import VISION
from lolcats_core.model.modeling import feature_maps, linearize, named_map_parameters
from lolcats_core.model.vision.modeling import image_rows, observed, show_images
from lolcats_core.training.attention_transfer import attention_transfer, head_errors
from lolcats_core.training.calibration import KEYS
from lolcats_core.training.image_finetune import feature_loss, image_finetune
from lolcats_core.training.losses import without_adapters
from tests.core.tiny_images import CLASSES, MIXED, SETTINGS, TILED, images, output, tiny_student, tiny_teacher

STAGE1 = TransferParams(batch_size=4, epochs=2, eval_every=4, checkpoint_every=3, log_every=2, max_eval_rows=8)
STAGE2 = ImageFinetuneParams(
    batch_size=4, epochs=2, eval_every=4, checkpoint_every=3, log_every=2, lr=1e-3, schedule="constant", lora_rank=2
)
LABELS = torch.arange(24) % CLASSES


class Killed(Exception):
    pass


def logger(die_at: int | None) -> Any:
    def log(metrics: dict[str, float], step: int) -> None:
        if step == die_at and "train_loss" in metrics:
            raise Killed

    return log


def data(student: Any, family: str = "dinov2") -> tuple[ImageRows, ImageRows]:
    return image_rows(student, images(family, 24), LABELS), image_rows(student, images(family, 8, seed=1), LABELS[:8])


def transfer(scratch: Path, settings: Any = MIXED, die_at: int | None = None, family: str = "dinov2") -> Any:
    student = linearize(tiny_teacher(family), settings)
    result = attention_transfer(student, *data(student, family), STAGE1, scratch=scratch, log=logger(die_at))
    return student, result


@pytest.mark.parametrize("family", VISION)
def test_attention_transfer_brings_every_layer_closer_to_its_softmax(family: str, tmp_path: Path) -> None:
    start = linearize(tiny_teacher(family), TILED)
    _, validation = data(start, family)
    before = head_errors(start, validation, 8, 4)
    student, result = transfer(tmp_path, TILED, family=family)
    after = head_errors(student, validation, 8, 4)
    assert result.best_loss < result.history[0]["validation_loss"]
    assert [len(after[layer]["error"]) for layer in after] == [4, 2]
    for layer, errors in after.items():
        assert sum(errors["error"]) < sum(before[layer]["error"])
        assert errors["power"] == before[layer]["power"]  # teacher forcing: what they copy did not move


def test_stage_1_changes_the_maps_alone_and_counts_tokens(tmp_path: Path) -> None:
    student, result = transfer(tmp_path)
    plain = tiny_teacher().state_dict()
    assert all(torch.equal(plain[name], value) for name, value in student.state_dict().items() if name in plain)
    assert result.tokens == 2 * 24 * (1 + 25)


@pytest.mark.parametrize("die_at", [2, 6, 10])
def test_a_killed_transfer_ends_bitwise_where_an_undisturbed_one_does(tmp_path: Path, die_at: int) -> None:
    settings = dataclasses.replace(TILED, feature_map_init="calibrated")
    expected, _ = transfer(tmp_path / "a", settings)
    with pytest.raises(Killed):
        transfer(tmp_path / "b", settings, die_at)
    found, _ = transfer(tmp_path / "b", settings)
    wanted = named_map_parameters(expected)
    assert all(torch.equal(p, wanted[name]) for name, p in named_map_parameters(found).items())


def test_the_calibrated_start_looks_at_as_many_keys_as_it_clusters(tmp_path: Path) -> None:
    student = linearize(tiny_teacher(), dataclasses.replace(SETTINGS, feature_map_init="calibrated"))
    rows = image_rows(student, images(count=200))
    asked: list[int] = []
    rows.batch = lambda indices, batch=rows.batch: (asked.append(len(indices)), batch(indices))[1]  # type: ignore[method-assign]
    params = dataclasses.replace(STAGE1, max_steps=1)
    attention_transfer(student, rows, image_rows(student, images(count=4)), params, scratch=tmp_path)
    assert max(asked) * rows.sequence_length >= KEYS > (max(asked) - 1) * rows.sequence_length


def test_images_come_as_a_tensor_a_batch_or_an_iterable_of_both() -> None:
    student, pixels = tiny_student(), images(count=6)["pixel_values"]
    whole = image_rows(student, pixels).batch(range(6))["pixel_values"]
    assert torch.equal(image_rows(student, {"pixel_values": pixels}).batch([3, 1])["pixel_values"], whole[[3, 1]])
    parts = iter([pixels[:4], {"pixel_values": pixels[4:]}])
    assert torch.equal(image_rows(student, parts).batch(range(6))["pixel_values"], whole)
    for given, message in (
        ([], "`images` must hold an image, got none"),
        (pixels[0], r"`pixel_values` must be \[N, C, height, width\], got \(3, 40, 40\)"),
        (pixels[..., :7], "images must have a patch of 8 pixels at least, got 40 x 7"),
    ):
        with pytest.raises(UserError, match=message):
            image_rows(student, given)
    with pytest.raises(UserError, match="all columns must have as many rows"):
        image_rows(student, pixels, LABELS)


def finetune(scratch: Path, die_at: int | None = None, kind: int = 1, **changes: Any) -> tuple[Any, Any, Any]:
    teacher = tiny_teacher(kind=kind)
    student = tiny_student(kind=kind, settings=MIXED)
    rows, _ = data(student)
    params = dataclasses.replace(STAGE2, **changes)
    model, result = image_finetune(student, rows, rows, params, scratch=scratch, log=logger(die_at))
    return teacher, model, result


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_the_teacher_s_weights_stay_as_they_are(scope: str, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = linearize(teacher, SETTINGS)
    image_finetune(student, *data(student), dataclasses.replace(STAGE2, scope=scope), scratch=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_a_killed_finetuning_ends_bitwise_where_an_undisturbed_one_does(scope: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scope": scope, "lora_dropout": 0.3, "loss": "mixed"}
    _, expected, _ = finetune(tmp_path / "a", **options)
    with pytest.raises(Killed):
        finetune(tmp_path / "b", 6, **options)
    _, found, _ = finetune(tmp_path / "b", **options)
    wanted = dict(expected.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in found.named_parameters())


def test_merged_and_full_students_save_and_load(tmp_path: Path) -> None:
    for scope in ("lora", "full"):
        _, model, _ = finetune(tmp_path / scope, scope=scope, max_steps=2)
        plain = model.merge_and_unload() if scope == "lora" else model
        plain.save_pretrained(tmp_path / f"{scope}_saved")
        loaded = type(plain).from_pretrained(tmp_path / f"{scope}_saved")
        assert torch.equal(output(loaded, images()), output(plain, images()))
        assert len(feature_maps(loaded)) == 2


def test_the_feature_loss_is_its_formula_and_zero_for_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 7, 4, generator=generator) for _ in range(2))
    real = torch.arange(7) < torch.tensor([[7], [5]])
    apart, smooth = 1 - F.cosine_similarity(a, b, dim=-1), F.smooth_l1_loss(a, b, reduction="none").mean(-1)
    patches = [(row, token) for row, length in ((0, 7), (1, 5)) for token in range(2, length)]
    expected = apart[:, :2].mean() + torch.stack([0.9 * apart[i] + 0.1 * smooth[i] for i in patches]).mean()
    assert torch.allclose(feature_loss(a, b, 2, real), expected, rtol=1e-5)
    assert feature_loss(a, a, 0).abs() < 1e-6


def test_the_teacher_of_lora_is_the_softmax_model(tmp_path: Path) -> None:
    teacher, model, _ = finetune(tmp_path, max_steps=3)
    plain, batch = model.get_base_model(), images()
    with without_adapters(model), observed(plain, lambda call: None):
        assert torch.equal(output(plain, batch), output(teacher, batch))
    show_images(plain, batch, lambda call: None)
    assert plain.image_pass.observer is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (0, {"loss": "logit_kl"}, "`loss` logit_kl needs a model with a classifier, got LolcatsDinov2Model"),
        (1, {"target_modules": ("query",)}, "`target_modules`: the model has no 'query'; it has classifier, fc1"),
    ],
)
def test_what_finetuning_lacks_is_said_in_one_line(kind: int, changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        finetune(tmp_path, kind=kind, **changes)


def test_cross_entropy_needs_labels(tmp_path: Path) -> None:
    student = tiny_student(kind=1)
    rows = image_rows(student, images(count=8))
    params = dataclasses.replace(STAGE2, loss="cross_entropy")
    with pytest.raises(UserError, match="`loss` cross_entropy needs rows with labels, got pixel_values"):
        image_finetune(student, rows, rows, params, scratch=tmp_path)


def test_transfer_refuses_what_images_do_not_have(tmp_path: Path) -> None:
    student = linearize(tiny_teacher(), lc.LinearizeConfig(window="tiled", window_size=8, feature_dim=8))
    with pytest.raises(UserError, match=r"images must be longer than the 8 patches of a tile .*longest side has 5"):
        attention_transfer(student, *data(student), STAGE1, scratch=tmp_path)
    student = linearize(tiny_teacher(), SETTINGS)
    params = dataclasses.replace(STAGE1, xent_weight=1.0)
    with pytest.raises(UserError, match=r"`transfer.xent_weight` must be 0 for images, got 1.0"):
        attention_transfer(student, *data(student), params, scratch=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "`loss` must be one of feature, logit_kl, cross_entropy, mixed, got 'mse'"),
        ({"scope": "some"}, "`scope` must be one of lora, full, got 'some'"),
        ({"target_modules": ()}, r"`target_modules` must be null or name a projection, got \(\)"),
    ],
)
def test_parameters_are_checked(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(STAGE2, **changes)


@pytest.mark.parametrize("budget", [{"layers": 1}, {"heads": 0.25}], ids=str)
def test_what_has_the_largest_error_keeps_softmax_with_the_trained_maps_of_the_rest(
    budget: Any, tmp_path: Path
) -> None:
    student, _ = transfer(tmp_path, SETTINGS)
    rows, _ = data(student)
    params = lc.SelectParams(softmax_budget=budget, criterion="transfer_error", rows=8)
    chosen, selection = lc.select(tiny_teacher(), student, rows, params)
    errors = head_errors(student, rows, 8, 8)
    if "layers" in budget:
        worst = max(errors, key=lambda layer: sum(errors[layer]["error"]))
        assert selection.settings.softmax_layers == (worst,)
    else:
        assert sum(len(kept) for kept in selection.settings.softmax_heads.values()) == 3
    trained = named_map_parameters(student)
    for name, maps in feature_maps(chosen).items():
        assert torch.equal(maps.w_q, trained[f"{name}.w_q"][list(maps.groups.linear)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_budget": {"cache_ratio": 0.5}}, "must count layers or heads: it has no cache"),
        ({"cache_budget": 0.5}, "must count layers or heads: it has no cache"),
        (
            {"softmax_budget": {"layers": 1}, "criterion": "greedy_kl"},
            "`criterion` of a vision transformer must be one of transfer_error, normalized_transfer_error, random,",
        ),
    ],
    ids=str,
)
def test_budgets_and_criteria_of_text_are_refused(options: Any, message: str) -> None:
    student = tiny_student(settings=SETTINGS)
    with pytest.raises(UserError, match=message):
        lc.select(tiny_teacher(), student, data(student)[0], lc.SelectParams(**options))
