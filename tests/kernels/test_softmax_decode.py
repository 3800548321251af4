"""One step of softmax attention over static keys and values against its float64 definition, in every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats_kernels.softmax_decode import DecodeStep, fused, softmax_decode_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM = 24


def definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[B, H, D] float64 of q [B, H, D] over k, v [B, Hk, S, D], of which `seen` [B, S] says what counts."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhd,bhsd->bhs", q, k) * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, v)


class Row:
    """Tokens of a batch, and storage of `slots` that has those before column `newest`."""

    def __init__(
        self, slots: int, newest: int, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float32,
        padded: bool = False, sinks: int = 0, dim: int = DIM, batch: int = 2,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(newest)
        count, (query_heads, key_heads) = newest + 1, heads

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        # As attention layers give them: [B, T, heads, D] in memory.
        self.q = draw(batch, 1, query_heads, dim).transpose(1, 2)
        self.k, self.v = (draw(batch, count, key_heads, dim).transpose(1, 2) for _ in range(2))
        self.real = torch.ones(batch, count, dtype=torch.bool, device=DEVICE)
        if padded:
            self.real[0, : count // 2] = False
            self.real[1, 1 : count // 3] = False
            self.real[:, -1] = True
        column = torch.arange(max(0, newest - slots), newest)  # the new one is not there yet
        # What was never written must not count.
        shape = (2, batch, key_heads, slots, dim)
        self.keys, self.values = torch.full(shape, torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
        self.keys[:, :, column % slots], self.values[:, :, column % slots] = self.k[:, :, column], self.v[:, :, column]
        stored_mask = torch.zeros(batch, slots, dtype=torch.bool, device=DEVICE)
        stored_mask[:, column % slots] = self.real[:, column]
        self.newest = torch.tensor([newest], device=DEVICE)
        self.seen = self.real & (torch.arange(count, device=DEVICE) > newest - slots)
        first = [row.nonzero()[:sinks, 0] for row in self.real]
        index = torch.stack(first)
        for row, columns in enumerate(first):
            self.seen[row, columns] = True
        place = index[:, None, :, None].expand(-1, key_heads, -1, dim)
        self.options: dict[str, Any] = {
            "padding_mask": stored_mask if padded else None,
            "sinks": (self.k.gather(2, place), self.v.gather(2, place), index) if sinks else None,
        }

    def step(self, backend: str, scale: float = 0.3, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """What the step gives and what it is to be, [B, H, D]."""
        k, v = self.k[:, :, -1:], self.v[:, :, -1:]
        step = DecodeStep(self.q, k, v, self.keys, self.values, self.newest, scale, softcap, **self.options)
        found = softmax_decode_(step, backend)
        assert found.dtype == self.q.dtype
        return found[:, 0], definition(self.q[:, :, 0], self.k, self.v, self.seen, scale, softcap)


def close(found: Tensor, expected: Tensor) -> None:
    limit = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1e-2}[found.dtype]
    assert float((found.double() - expected).norm() / expected.norm()) < limit


BACKENDS = ["naive", "triton"]
# Slots and the new token's column: empty storage, one tile and a part, exactly full, gone round once and often.
PLACES = [(64, 0), (200, 130), (200, 199), (70, 70), (70, 333), (3, 50)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("slots", "newest"), PLACES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_is_attention_over_what_the_storage_holds(slots: int, newest: int, padded: bool, backend: str) -> None:
    row = Row(slots, newest, padded=padded)
    close(*row.step(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("slots", "newest"), [(64, 20), (64, 66), (64, 150), (9, 10)])
def test_sinks_are_seen_where_they_have_left_the_storage_and_once(
    slots: int, newest: int, padded: bool, backend: str
) -> None:
    close(*Row(slots, newest, padded=padded, sinks=4).step(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(3, 3), (8, 1), (20, 1), (6, 2)])
def test_any_grouping_of_heads_with_bounded_scores(heads: tuple[int, int], backend: str) -> None:
    close(*Row(100, 90, heads=heads).step(backend, softcap=1.5))


@pytest.mark.parametrize("dim", [8, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_half_precision_at_the_head_dims_of_models(dtype: torch.dtype, dim: int) -> None:
    close(*Row(160, 140, dtype=dtype, dim=dim).step("triton", scale=dim**-0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_token_is_stored_and_nothing_else_changes(backend: str) -> None:
    row = Row(70, 333, padded=True, sinks=2)
    before = [x.clone() for x in (row.keys, row.values, row.options["padding_mask"])]
    row.step(backend)
    slot = 333 % 70
    after = [row.keys, row.values, row.options["padding_mask"]]
    for old, new, token in zip(before[:2], after[:2], (row.k, row.v), strict=True):
        assert torch.equal(new[:, :, slot], token[:, :, -1])
        old[:, :, slot] = new[:, :, slot]
    before[2][:, slot] = True
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_piece_and_many_give_the_same(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for pieces in (1, 2, 5, 128):
        monkeypatch.setattr(fused, "FILL", pieces * batch * 2)
        close(*Row(400, 390, batch=batch, padded=batch == 3).step("triton"))


def test_float64_has_a_form_of_its_own() -> None:
    row = Row(70, 100, dtype=torch.float64, sinks=2)
    close(*row.step("auto"))


def test_what_does_not_fit_is_refused_by_name() -> None:
    row = Row(64, 20)
    k, stored = row.k[:, :, -1:], (row.keys, row.values)
    with pytest.raises(ValueError, match=r"q must be \[B, H, 1, D\]"):
        DecodeStep(row.q.expand(-1, -1, 2, -1), k, k, *stored, row.newest, 1.0)
    with pytest.raises(ValueError, match=r"keys and values must be \[B, Hk, C, D\]"):
        DecodeStep(row.q, k, k, row.keys[..., :5], row.values, row.newest, 1.0)
    with pytest.raises(ValueError, match=r"`padding_mask` must be bool \[B, C\] = \[2, 64\], got torch.bool \(1, 64\)"):
        DecodeStep(row.q, k, k, *stored, row.newest, 1.0, padding_mask=row.real.new_ones(1, 64))
    with pytest.raises(ValueError, match=r"one dtype, got torch.float16, torch.float32"):
        DecodeStep(row.q.half(), k, k, *stored, row.newest, 1.0)
    with pytest.raises(ValueError, match="keys, values, `padding_mask` and sinks must be dense"):
        DecodeStep(row.q, k, k, *stored, row.newest, 1.0, sinks=(row.k[:, :, :2], row.v[:, :, :2], row.newest))
    with pytest.raises(ValueError, match="`backend` must be one of auto, triton, naive, got 'fused'"):
        softmax_decode_(DecodeStep(row.q, k, k, *stored, row.newest, 1.0), backend="fused")
    wide = Row(64, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="triton takes float16"):
        wide.step("triton")
