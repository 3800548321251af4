"""Window dropout and the normalised loss of stage 1."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import lolcats_core as lc
from lolcats_common.params import FinetuneParams, TransferParams
from lolcats_core.model.branches import window_dropout, without_branch
from lolcats_core.model.feature_maps import Scores
from lolcats_core.model.modeling import attention_layers, feature_maps, named_map_parameters
from lolcats_core.training.attention_transfer import transfer_losses
from lolcats_core.training.low_rank_finetune import add_lora, next_token_loss
from tests.core.tiny import SETTINGS, FakeRows, tiny_student, tiny_teacher

BATCH = FakeRows(3).batch(range(3))


def windows(model: Any) -> list[str]:
    return [layer.feature_maps(Scores(1.0))[1].window for layer in attention_layers(model)]


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "adapted"])
def test_each_layer_s_window_is_off_as_often_as_asked_and_comes_back(peft: bool) -> None:
    student = tiny_student(settings=SETTINGS)
    model = add_lora(student, FinetuneParams(lora_rank=2), seed=0) if peft else student
    torch.manual_seed(0)
    drawn = []
    for _ in range(300):
        with window_dropout(model, 0.3):
            drawn.append([window == "none" for window in windows(student)])
        assert windows(student) == ["terraced"] * 3
    share = torch.tensor(drawn).double().mean(0)
    assert bool(((share - 0.3).abs() < 0.1).all()), share
    assert len({tuple(row) for row in drawn}) == 8  # layers are drawn one by one


def test_a_step_without_windows_is_a_step_of_pure_linear_attention() -> None:
    student = tiny_student(settings=SETTINGS)
    pure = lc.linearize(tiny_teacher(), dataclasses.replace(SETTINGS, window="none"))
    for name, p in named_map_parameters(student).items():
        named_map_parameters(pure)[name].data.copy_(p)
    for measure in (lambda m: transfer_losses(m, BATCH, TransferParams())["loss"], lambda m: next_token_loss(m, BATCH)):
        with without_branch(feature_maps(student).values(), "window"):
            off = measure(student)
        torch.testing.assert_close(off, measure(pure), rtol=1e-5, atol=1e-6)
        assert abs(measure(student).item() - off.item()) > 1e-4


def test_both_stages_train_with_dropped_windows_and_continue_to_the_same_weights(tmp_path: Path) -> None:
    rows = FakeRows()

    def run(folder: str, stop: int | None) -> dict[str, torch.Tensor]:
        student = lc.linearize(tiny_teacher(), SETTINGS)
        common: dict[str, Any] = {"window_dropout": 0.5, "max_steps": 4, "checkpoint_every": 1, "epochs": 4}
        torch.manual_seed(0)
        for steps in filter(None, (stop, 4)):
            calls = 0

            def log(metrics: dict[str, float], step: int, steps: int = steps) -> None:
                nonlocal calls
                calls = step
                if "train_loss" in metrics and step == steps and steps < 4:
                    raise KeyboardInterrupt

            params = TransferParams(**common, log_every=1)
            try:
                lc.attention_transfer(student, rows, rows, params, scratch=tmp_path / folder, log=log)
            except KeyboardInterrupt:
                student = lc.linearize(tiny_teacher(), SETTINGS)
                torch.manual_seed(99)
        lc.low_rank_finetune(student, rows, rows, FinetuneParams(**common), scratch=tmp_path / f"{folder}-2")
        return {name: p.detach() for name, p in student.named_parameters()}

    whole, resumed = run("a", None), run("b", 3)
    for name, p in whole.items():
        torch.testing.assert_close(resumed[name], p, rtol=0, atol=0)


def test_the_normalised_loss_weighs_layers_by_their_own_size() -> None:
    student = tiny_student(settings=SETTINGS)
    sizes: dict[int, torch.Tensor] = {}

    def gradients(**params: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        student.zero_grad()
        found = transfer_losses(student, BATCH, TransferParams(**params), scale=1.0)
        return found, {name: p.grad.clone() for name, p in named_map_parameters(student).items()}

    plain, plain_gradients = gradients()
    normal, normal_gradients = gradients(loss_normalization="layer")
    for layer in attention_layers(tiny_teacher()):
        index = layer.layer_idx
        y: list[torch.Tensor] = []
        teacher = tiny_teacher()
        hook = lambda _, args, y=y: y.append(args[0])  # noqa: E731
        attention_layers(teacher)[index].o_proj.register_forward_pre_hook(hook)
        teacher(BATCH["input_ids"], use_cache=False)
        sizes[index] = y[0].square().mean().detach()
    expected = sum(1000 * plain[f"layer_{i:03d}"] / size for i, size in sizes.items()) / len(sizes)
    torch.testing.assert_close(normal["loss"], torch.as_tensor(expected), rtol=1e-4, atol=1e-6)
    for name, value in plain_gradients.items():
        size = sizes[int(name.split(".")[2])]
        torch.testing.assert_close(normal_gradients[name], value / size, rtol=1e-4, atol=1e-6)


def test_branches_that_are_off_add_up_and_come_back_after_an_error() -> None:
    student = tiny_student(settings=SETTINGS)
    maps = list(feature_maps(student).values())
    linear, window = frozenset({"linear"}), frozenset({"window"})
    with without_branch(maps[:1], "window"):
        with without_branch(maps, "linear"):
            assert [each.active for each in maps] == [frozenset(), window, window]
        assert [each.active for each in maps] == [linear, linear | window, linear | window]
    with pytest.raises(KeyError), without_branch(maps, "linear"):
        raise KeyError
    assert [each.active for each in maps] == [linear | window] * 3
