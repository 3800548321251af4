"""Features of unrotated q and k do not know where a token stands, in every family that rotates in its own way."""

from __future__ import annotations

import pytest
import torch

from lolcats_core.model.families import FAMILIES
from lolcats_core.model.forward_context import HybridContext, LayerCall
from lolcats_kernels.hybrid_attention.mixture import unrotate
from tests.core.tiny import MIXTURE, tiny_student


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_one_token_has_the_same_unrotated_key_at_every_position(family: str) -> None:
    # The first layer's keys depend on the token and its position alone.
    model, calls = tiny_student(family, MIXTURE), {}

    def observe(call: LayerCall) -> None:
        calls[call.index] = call

    context = HybridContext.observed(observe, None)
    model(torch.full((1, 20), 5), use_cache=False, hybrid=context)
    call = calls[0]
    weights, config = call.maps(call.scores)
    keys = call.k.transpose(1, 2)
    # Cohere 2 and EXAONE 4 do not rotate in the layers that see everything.
    rotated = not torch.allclose(keys[:, :, 1:], keys[:, :, :1].expand_as(keys[:, :, 1:]), atol=1e-3)
    assert rotated == (weights.frequencies is not None) == (family not in ("cohere2", "exaone4"))
    found = unrotate(keys, call.positions(), weights.frequencies, config.rotary_interleaved)
    torch.testing.assert_close(found[:, :, 1:], found[:, :, :1].expand_as(found[:, :, 1:]), rtol=1e-4, atol=1e-5)
