"""The fused rotary embedding serves every family, only in students, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lolcats_core as lc
from lolcats_core.model import rotary
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.modeling import attention_layers
from lolcats_kernels.rotary_embedding.fused import rotary_embedding
from tests.core.tiny import MIXED, tiny_student, tiny_teacher, tokens

# They rotate a quarter of each head.
PARTIAL = {"gpt_neox"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_every_family_calls_the_kernel_and_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, calls = tiny_student(family), tokens(2, 21), []
    expected = model(ids, use_cache=False).logits

    def counted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(q.shape)
        return rotary_embedding(q, k, cos, sin)

    monkeypatch.setattr(rotary, "kernel_for", lambda q: counted)
    found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    rotated = 0 if family in PARTIAL else sum(getattr(x, "use_rope", True) for x in attention_layers(model))
    assert len(calls) == rotated


@torch.no_grad()
def test_a_compiled_student_calls_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_student(), tokens(1, 9)
    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr(rotary, "kernel_for", lambda q: rotary_embedding)
    found = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_teachers_and_copies_keep_their_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids = tiny_teacher(), tokens(1, 9)
    student = lc.linearize(teacher, MIXED)
    twin, expected = copy.deepcopy(student), student(ids, use_cache=False).logits
    twin.base_model.layers[0].self_attn.q_proj.weight.mul_(2)
    assert not torch.equal(twin(ids, use_cache=False).logits, expected)
    assert torch.equal(student(ids, use_cache=False).logits, expected)

    def refuse(q: Tensor) -> None:
        raise AssertionError("a teacher's layer asked for the kernel")

    monkeypatch.setattr(rotary, "kernel_for", refuse)
    teacher(ids, use_cache=False)
