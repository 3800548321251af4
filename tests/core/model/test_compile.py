"""torch.compile takes a student's forward pass as one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.core.tiny import BOUNDED, MIXTURE, RINGS, SETTINGS, tiny_student, tokens

VARIANTS = {
    "nothing kept": SETTINGS,
    "kept heads": dataclasses.replace(SETTINGS, softmax_heads={2: (1,)}),
    "kept layers": dataclasses.replace(SETTINGS, softmax_layers=(1,)),
    "mixture": MIXTURE,
    "constant state": BOUNDED,
    "windows by group": RINGS,
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_pass_is_one_graph_with_the_same_bits(variant: str) -> None:
    student, ids = tiny_student(settings=VARIANTS[variant]), tokens(2, 40)
    expected = student(ids, use_cache=False).logits
    compiled = torch.compile(student, backend="eager", fullgraph=True)  # refuses every graph break
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)
