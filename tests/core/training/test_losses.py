"""Stage 2 against the teacher's logits: the loss itself, where the teacher comes from, and training on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import lolcats_core as lc
from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import FinetuneParams, ParamsError, params_from_dict
from lolcats_core.model.modeling import named_map_parameters
from lolcats_core.training import losses
from lolcats_core.training.losses import KL, Objective, divergence, plain_model, summed_loss, teacher_hidden
from lolcats_core.training.low_rank_finetune import add_lora, next_token_loss, objective_of
from tests.core.tiny import MIXED, VOCAB, FakeRows, tiny_student, tiny_teacher

MIX = Objective(cross_entropy=0.3, kl=0.7, temperature=2.0)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **params: Any) -> Any:
    """A student whose adapters change its function."""
    model = add_lora(tiny_student(family, dtype=dtype), FinetuneParams(lora_rank=2, **params), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def reference(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, objective: Objective) -> Any:
    """The objective per token in float64, written out."""
    p = (teacher.double() / objective.temperature).softmax(-1)
    q = (student.double() / objective.temperature).softmax(-1)
    kl = objective.temperature**2 * (p * (p / q).log()).sum(-1)
    ce = -student.double().softmax(-1).gather(-1, targets[..., None])[..., 0].log()
    return objective.cross_entropy * ce + objective.kl * kl


@pytest.mark.parametrize("objective", [Objective(), KL, MIX], ids=["cross_entropy", "kl", "mixed"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2", "phi"])
def test_the_loss_and_its_gradient_are_the_definition_s_however_it_is_sliced(
    family: str, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_teacher(family, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    hidden, wanted = torch.randn(2, 3, 21, 32, dtype=torch.float64, generator=generator)
    hidden.requires_grad_()
    targets = torch.randint(3, VOCAB, (3, 21), generator=generator)
    counted = torch.rand(3, 21, generator=generator) < 0.7
    each = reference(*(losses.output_logits(student, x) for x in (hidden, wanted)), targets, objective)
    expected = (each * counted).sum()
    gradient = torch.autograd.grad(expected, hidden)[0]
    for limit in (losses.MAX_FLOAT_LOGITS, VOCAB * 3 * 3 * 4, 1):
        monkeypatch.setattr(losses, "MAX_FLOAT_LOGITS", limit)
        loss = summed_loss(student, hidden, targets, counted, objective, wanted if objective.kl else None)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient, rtol=1e-10, atol=1e-12)


def test_no_more_logits_are_held_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    student, seen = tiny_teacher(), []
    monkeypatch.setattr(losses, "MAX_FLOAT_LOGITS", VOCAB * 2 * 3 * 5)
    original = losses.output_logits

    def watched(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[1])
        return original(model, hidden)

    monkeypatch.setattr(losses, "output_logits", watched)
    hidden = torch.randn(2, 23, 32, requires_grad=True)
    targets = torch.zeros(2, 23, dtype=torch.long)
    summed_loss(student, hidden, targets, targets == 0, MIX, torch.randn(2, 23, 32)).backward()
    assert max(seen) == 5


def test_the_divergence_is_zero_of_equal_logits_and_positive_otherwise() -> None:
    logits = torch.randn(5, VOCAB)
    torch.testing.assert_close(divergence(logits, logits + 3.0), torch.zeros(5), rtol=0, atol=1e-6)
    assert bool((divergence(logits, torch.randn(5, VOCAB)) > 0).all())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_student_s_teacher_is_the_teacher(family: str, documents: bool) -> None:
    targets = ("query_key_value", "dense") if family == "gpt_neox" else ("q_proj", "k_proj", "v_proj", "o_proj")
    model = adapted(family, target_modules=targets, train_feature_maps=True)
    batch = FakeRows(3, documents=documents).batch(range(3))
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    # transformers' own packed mask, in the teacher, starts documents where positions start again.
    expected = tiny_teacher(family).base_model(**batch, use_cache=False).last_hidden_state
    torch.testing.assert_close(teacher_hidden(model, batch)[-1], expected, rtol=1e-4, atol=1e-5)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    student = plain_model(model).base_model(**batch, use_cache=False).last_hidden_state
    assert (student - expected).abs().max() > 0.1
    assert student.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_the_teacher_s_logits_brings_the_student_nearer_to_it(checkpointing: bool, tmp_path: Path) -> None:
    rows, student = FakeRows(16), lc.linearize(tiny_teacher(), MIXED)
    batch = rows.batch(range(8))
    with torch.no_grad():
        before = next_token_loss(student, batch, KL)
    maps = {name: p.detach().clone() for name, p in named_map_parameters(student).items()}
    params = FinetuneParams(
        loss="logit_kl", lr=3e-3, max_steps=20, epochs=20, lora_rank=4, train_feature_maps=True, map_lr=1e-2
    )
    model, result = lc.low_rank_finetune(
        student, rows, rows, params, scratch=tmp_path, gradient_checkpointing=checkpointing
    )
    with torch.no_grad():
        after = next_token_loss(model, batch, KL)
    assert result.steps == 20
    assert float(after) < 0.8 * float(before)
    trained = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert len(trained) == len(maps)
    assert all(p.requires_grad for p in trained.values())


def test_maps_have_their_own_learning_rate_and_weight_decay(tmp_path: Path) -> None:
    """AdamW's first step is the learning rate in size, whatever the gradient."""
    student = lc.linearize(tiny_teacher(), MIXED)
    before = {name: p.detach().clone() for name, p in named_map_parameters(student).items()}
    params = FinetuneParams(
        lr=1e-5, map_lr=1e-2, max_steps=1, train_feature_maps=True, lora_rank=2, min_lr=0.0, eval_every=1
    )
    model, _ = lc.low_rank_finetune(student, FakeRows(8), FakeRows(8), params, scratch=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weights"]
    steps = {}
    for name, p in before.items():
        module, _, key = name.rpartition(".")
        steps[name] = (state[f"base_model.model.{module}.modules_to_save.default.{key}"] - p).abs().max().item()
    assert all(5e-3 < step < 1.01e-2 for step in steps.values()), steps
    lora_b = [p.abs().max().item() for name, p in state.items() if "lora_B" in name]
    assert all(step < 1.01e-5 for step in lora_b)
    del model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_misalignment_is_that_of_every_layer_s_output(family: str) -> None:
    teacher, batch = tiny_teacher(family), FakeRows(3).batch(range(3))
    student = tiny_student(family)
    outputs: dict[int, list[torch.Tensor]] = {}
    for model in (teacher, student):
        found = outputs[id(model)] = []
        for layer in (*model.base_model.layers[:-1], _norm(model)):
            layer.register_forward_hook(lambda _, __, out, found=found: found.append(out))
        model(batch["input_ids"], use_cache=False)
    pairs = zip(outputs[id(student)], outputs[id(teacher)], strict=True)
    errors = [((a - b).square().mean() / b.square().mean()).item() for a, b in pairs]
    plain, both = (next_token_loss(student, batch, Objective(hidden=weight)).item() for weight in (0.0, 0.5))
    assert len(errors) == 3
    assert both - plain == pytest.approx(0.5 * sum(errors) / 3, rel=1e-3)
    untouched = tiny_student(family, settings=LinearizeConfig(softmax_layers=(0, 1, 2)))
    aligned = next_token_loss(untouched, batch, Objective(cross_entropy=0.0, hidden=1.0)).item()
    assert aligned == pytest.approx(0.0, abs=1e-6)


def _norm(model: Any) -> Any:
    return model.base_model.final_layer_norm if hasattr(model.base_model, "final_layer_norm") else model.base_model.norm


def test_maps_train_through_the_whole_network_towards_the_teacher_s_hidden_states(tmp_path: Path) -> None:
    rows, student = FakeRows(16), lc.linearize(tiny_teacher(), MIXED)
    objective = Objective(cross_entropy=0.0, hidden=1.0)
    batch = rows.batch(range(8))
    with torch.no_grad():
        before = next_token_loss(student, batch, objective).item()
    params = FinetuneParams(loss="logit_kl", hidden_weight=10.0, lr=1e-3, map_lr=1e-2, train_feature_maps=True)
    params = dataclasses.replace(params, max_steps=20, epochs=20, lora_rank=2)
    model, _ = lc.low_rank_finetune(student, rows, rows, params, scratch=tmp_path)
    with torch.no_grad():
        assert next_token_loss(model, batch, objective).item() < 0.8 * before


def test_objectives_by_name() -> None:
    assert objective_of(FinetuneParams()) == Objective()
    assert objective_of(FinetuneParams(loss="logit_kl", kl_temperature=2.0)) == Objective(0.0, 1.0, 2.0)
    assert objective_of(FinetuneParams(loss="mixed", kl_weight=0.25)) == Objective(0.75, 0.25, 1.0)
    assert objective_of(FinetuneParams(hidden_weight=2.0)) == Objective(1.0, 0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "kl"}, "`finetune.loss` must be one of cross_entropy, logit_kl, mixed, got 'kl'"),
        ({"kl_weight": 0.0}, "`kl_weight` must lie in"),
        ({"kl_temperature": 0.0}, "`kl_temperature` must be greater than 0"),
        ({"window_dropout": 1.0}, "`window_dropout` must lie in"),
        ({"loss": "logit_kl", "segment_length": 64}, "`segment_length` must be null with `loss` logit_kl or mixed"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params_from_dict({"finetune": values})


def test_adapters_on_the_output_embedding_are_refused_with_a_kl_term(tmp_path: Path) -> None:
    params = FinetuneParams(loss="mixed", target_modules=("q_proj", "lm_head"))
    student = tiny_student(tie_word_embeddings=False)
    with pytest.raises(UserError, match="must leave the output embedding alone"):
        lc.low_rank_finetune(student, FakeRows(), FakeRows(), params, scratch=tmp_path)
