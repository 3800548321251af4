"""The fused rotary embedding serves every family, only in students, and changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lolcats_core as lc
from lolcats_core.model import rotary
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.forward_context import HybridContext, LayerCall
from lolcats_core.model.modeling import attention_layers
from lolcats_kernels.hybrid_attention.mixture import unrotate
from lolcats_kernels.rotary_embedding.fused import rotary_embedding
from tests.core.tiny import MIXED, tiny_student, tiny_teacher, tokens

# They rotate a part of each head by themselves, or other pairs of dims than the kernel.
OWN = {"gpt_neox", "glm", "glm4", "cohere2", "ernie4_5"}


def rotates(layer: Any) -> bool:
    """EXAONE 4 and SmolLM3 leave some layers as they are."""
    return bool(layer.is_sliding if "Exaone" in type(layer).__name__ else getattr(layer, "use_rope", True))


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
    assert len(calls) == (0 if family in OWN else sum(map(rotates, attention_layers(model))))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_turns_a_layer_s_q_and_k_back_is_known_of_every_family(family: str) -> None:
    student, found = tiny_student(family, dtype=torch.float64), []
    ids = tokens(1, 9)
    for first in (0, 5):
        calls: list[LayerCall] = []
        positions = torch.arange(first, first + 9)[None]
        observed = HybridContext.observed(calls.append, positions)
        with torch.no_grad():
            student.base_model(ids, position_ids=positions, use_cache=False, hybrid=observed)
        q, turned = calls[0].q, calls[0].maps.rotary
        if turned is not None:
            frequencies = turned.frequencies(q.device).double()
            q = unrotate(q.transpose(1, 2), positions, frequencies, turned.interleaved).transpose(1, 2)
        found.append((q, calls[0].q))
    # The first layer's input is the same wherever the row stands, so unrotated q is, and only rotated q is not.
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[1][1], found[0][1]) == (turned is None)


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
