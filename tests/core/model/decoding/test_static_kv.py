"""Steps in static storage give what plain decoding gives, however long they go on and whatever comes between them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from lolcats_core.model.decoding import static_kv
from lolcats_core.model.decoding.cache import DividedLayer, HybridCache, HybridLayer
from lolcats_core.model.decoding.decode_graph import _Steps
from lolcats_core.model.families import FAMILIES
from tests.core.tiny import BOUNDED, MIXED, RINGS, padded, tiny_student, tokens


class Replay:
    """A graph's part of a step on a CPU: it computes, and counts nothing."""

    def __init__(self, steps: Steps, cache: HybridCache) -> None:
        self.steps, self.cache = steps, cache

    def replay(self) -> None:
        counters = [(x, "length") for x in self.cache.layers if isinstance(x, DividedLayer)]
        counters += [(kept.static_kv, "length") for kept in self.cache.kept_layers()]
        counters += [(x, "cumulative_length") for x in self.cache.kept_layers() if hasattr(x, "cumulative_length")]
        before = [getattr(*counter) for counter in counters]
        self.steps.logits = self.steps._step(self.steps.ids, self.steps.positions, self.cache)
        for counter, value in zip(counters, before, strict=True):
            setattr(*counter, value)


@contextmanager
def in_place(cache: HybridCache) -> Iterator[None]:
    """One-token steps leave each state in its own memory, as they do on a GPU."""
    states = [vars(layer.state) for layer in cache.layers if isinstance(layer, HybridLayer) and layer.state is not None]
    before = [dict(state) for state in states]
    yield
    for state, old in zip(states, before, strict=True):
        for name, tensor in old.items():
            state[name] = tensor.copy_(state[name])


class Steps(_Steps):
    """`_Steps` on a CPU; `replayed` counts the steps that it took, `captures` the graphs."""

    replayed = captures = 0

    def _capture(self, ids: torch.Tensor, positions: torch.Tensor, cache: HybridCache) -> None:
        self.ids, self.positions, self.captures = ids.clone(), positions.clone(), self.captures + 1
        cache.advance()
        self.graph = Replay(self, cache)  # type: ignore[assignment]

    def __call__(self, ids: torch.Tensor, cache: HybridCache, mask: torch.Tensor | None = None) -> torch.Tensor:
        kwargs = {"input_ids": ids, "past_key_values": cache, "attention_mask": mask}
        with in_place(cache) if ids.shape[1] == 1 else nullcontext():
            if not (self.take(kwargs) and self.prepare_static(kwargs)):
                return self.model(**kwargs).logits
            self.replayed += 1
            logits = self.run(kwargs).logits
        assert logits is not None
        return logits.clone()


def decoded(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, split: int, steps: Steps | None) -> torch.Tensor:
    """Logits of a prefill and of one step for each token, through `steps` or plainly."""
    cache, parts = HybridCache(model.config), []
    for start, stop in [(0, split), *((t, t + 1) for t in range(split, ids.shape[1]))]:
        seen = None if mask is None else mask[:, :stop]
        if steps is None:
            part = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits
        else:
            part = steps(ids[:, start:stop], cache, seen)
        parts.append(part)
        assert cache.get_seq_length() == stop
    return torch.cat(parts, 1)


@pytest.mark.parametrize("settings", [MIXED, BOUNDED, RINGS], ids=["growing", "bounded", "rings"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_static_steps_have_the_logits_of_plain_decoding(
    family: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_kv, "LEAST", 1)
    monkeypatch.setattr(static_kv, "GROWTH", 0.0)
    model, ids = tiny_student(family, settings), tokens(2, 150)
    steps = Steps(model)
    found = decoded(model, ids, None, 20, steps)
    torch.testing.assert_close(found, decoded(model, ids, None, 20, None), rtol=1e-4, atol=1e-4)
    assert steps.replayed == 150 - 20 - 1
    # Storage of 64, 128 and 192 columns.
    assert steps.captures == (1 if settings is BOUNDED else 3)


@pytest.mark.parametrize("settings", [MIXED, BOUNDED, RINGS], ids=["growing", "bounded", "rings"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_before_the_steps_is_never_seen(settings: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_kv, "LEAST", 1)
    model = tiny_student(settings=settings)
    ids, mask = padded([tokens(1, 33, seed=1), tokens(1, 5, seed=2)], side)
    ids = torch.cat([ids, tokens(2, 60)], 1)
    mask = torch.cat([mask, torch.ones(2, 60, dtype=torch.long)], 1)
    steps = Steps(model)
    found = decoded(model, ids, mask, 33, steps)
    expected = decoded(model, ids, mask, 33, None)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert steps.replayed == 59


@torch.no_grad()
def test_static_storage_waits_for_the_sinks() -> None:
    model, ids = tiny_student(settings=BOUNDED), tokens(2, 40)
    steps = Steps(model)
    found = decoded(model, ids, None, 1, steps)
    torch.testing.assert_close(found, decoded(model, ids, None, 1, None), rtol=1e-4, atol=1e-4)
    assert steps.replayed == 37  # three sinks, then in


def reordered(cache: HybridCache) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def repeated(cache: HybridCache) -> None:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))


@pytest.mark.parametrize("settings", [MIXED, BOUNDED, RINGS], ids=["growing", "bounded", "rings"])
@pytest.mark.parametrize("change", [reordered, repeated, HybridCache.detach])
@torch.no_grad()
def test_whatever_changes_the_cache_makes_it_dynamic_with_all_that_was_stored(settings: Any, change: Any) -> None:
    model, ids = tiny_student("gemma3_text", settings), tokens(2, 60)
    steps, cache, plain = Steps(model), HybridCache(model.config), HybridCache(model.config)
    for start, stop in [(0, 15), *((t, t + 1) for t in range(15, 40))]:
        steps(ids[:, start:stop], cache)
        model(ids[:, start:stop], past_key_values=plain)
    assert all(kept.static_kv is not None for kept in cache.kept_layers())
    assert cache.softmax_bytes() == plain.softmax_bytes()
    assert [kept.get_seq_length() for kept in cache.kept_layers()] == [40] * len(cache.kept_layers())
    twin = copy.deepcopy(cache)
    for each in (cache, twin, plain):
        change(each)
    assert all(kept.static_kv is None for kept in cache.kept_layers())
    expected = model(ids[:, 40:], past_key_values=plain).logits
    for each in (cache, twin):
        torch.testing.assert_close(model(ids[:, 40:], past_key_values=each).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_text_between_steps_sees_what_was_stored_and_steps_go_on_in_new_storage() -> None:
    model, ids = tiny_student(), tokens(2, 80)
    steps, cache, parts = Steps(model), HybridCache(model.config), []
    pieces = [(0, 15), *((t, t + 1) for t in range(15, 30)), (30, 50), *((t, t + 1) for t in range(50, 80))]
    for start, stop in pieces:
        parts.append(steps(ids[:, start:stop], cache))
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert (steps.replayed, steps.captures) == (14 + 29, 2)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids[:, :9], past_key_values=cache).logits, expected[:, :9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [MIXED, BOUNDED, RINGS], ids=["growing", "bounded", "rings"])
@torch.no_grad()
def test_a_copied_cache_gets_storage_of_its_own_even_at_the_addresses_of_another(settings: Any) -> None:
    model, ids = tiny_student(settings=settings), tokens(2, 60)
    steps, cache = Steps(model), HybridCache(model.config)
    for start, stop in [(0, 15), *((t, t + 1) for t in range(15, 40))]:
        steps(ids[:, start:stop], cache)
    expected = decoded(model, ids, None, 40, None)[:, 40:]
    home = [layer.state for layer in cache.layers if isinstance(layer, HybridLayer)]
    for _ in range(2):
        twin = copy.deepcopy(cache)
        # Where an allocator may put the states of a copy when those of the one before are gone.
        for layer, state in zip((x for x in twin.layers if isinstance(x, HybridLayer)), home, strict=True):
            layer.state = state
        before = [state.map(torch.clone) for state in home]
        found = torch.cat([steps(ids[:, t : t + 1], twin) for t in range(40, 60)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for state, old in zip(home, before, strict=True):
            for name, tensor in vars(old).items():
                getattr(state, name).copy_(tensor)


@torch.no_grad()
def test_without_memory_for_static_storage_steps_run_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_student(), tokens(2, 60)
    make_static, entered = static_kv.StaticKVMixin.make_static, []

    def full(self: static_kv.StaticKVMixin, *args: Any) -> None:
        entered.append(self)
        if len(entered) == 2:
            raise torch.OutOfMemoryError
        make_static(self, *args)

    monkeypatch.setattr(static_kv.StaticKVMixin, "make_static", full)
    steps = Steps(model)
    found = decoded(model, ids, None, 20, steps)
    torch.testing.assert_close(found, decoded(model, ids, None, 20, None), rtol=1e-4, atol=1e-4)
    assert (steps.replayed, len(entered)) == (0, 2)


@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_a_model_without_any_linear_layer_steps_in_static_storage(padding: str | None) -> None:
    """Rings alone: there is no state that tells a step's addresses or its positions."""
    settings = dataclasses.replace(RINGS, softmax_layers=(0, 1, 2), softmax_heads={})
    settings = dataclasses.replace(settings, softmax_windows={0: {0: 10}, 1: {0: 8, 1: 8}, 2: {1: 17}})
    model, ids, mask = tiny_student(settings=settings), tokens(2, 60), None
    if padding is not None:
        ids, mask = padded([tokens(1, 60, seed=1), tokens(1, 50, seed=2)], padding)
    steps = Steps(model)
    for _ in range(2):
        found = decoded(model, ids, mask, 20, steps)
        expected = decoded(model, ids, mask, 20, None)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert steps.replayed >= 2 * 39
