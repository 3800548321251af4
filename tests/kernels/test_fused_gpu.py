"""What only a GPU can show: half precision, full sizes, `torch.compile` and CUDA graphs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lolcats_kernels.hybrid_attention import attention_transfer_loss, hybrid_attention, hybrid_decode_, interface
from tests.kernels.operands import DEVICE, NAMES, TOLERANCES, Case, definition, make, relative
from tests.kernels.test_fused import compare_gradients, name_of, run, state_for

pytestmark = pytest.mark.gpu

SIZES: list[dict[str, Any]] = [
    {"tokens": 333, "heads": 8, "key_heads": 2, "dim": 128, "columns": 64, "window_size": 64},
    {"tokens": 4133, "heads": 4, "key_heads": 1, "dim": 128, "columns": 64, "window_size": 64, "per": "kv"},
    {"tokens": 1029, "heads": 4, "key_heads": 4, "dim": 64, "columns": 64, "window_size": 64, "window": "sliding"},
    {"tokens": 1029, "heads": 4, "key_heads": 2, "dim": 64, "columns": 32, "window": "none"},
    {"tokens": 1029, "heads": 4, "key_heads": 2, "dim": 64, "columns": 32, "window_size": 64, "window": "sliding"},
    {"tokens": 1029, "heads": 4, "key_heads": 2, "dim": 32, "columns": 64, "window": "none"},
    {"tokens": 1029, "heads": 4, "key_heads": 2, "dim": 32, "columns": 16, "window_size": 64},
    {"tokens": 1024, "heads": 6, "key_heads": 2, "dim": 128, "columns": 64, "window": "none", "per": "kv"},
    {"tokens": 1024, "heads": 6, "key_heads": 2, "dim": 128, "columns": 64, "window": "none", "feature_map": "t2r"},
    {"tokens": 700, "heads": 4, "key_heads": 2, "dim": 96, "columns": 48, "window_size": 32, "softcap": 20.0},
    {"tokens": 300, "heads": 2, "key_heads": 1, "dim": 256, "columns": 128, "window_size": 64},
    {"tokens": 700, "heads": 2, "key_heads": 1, "dim": 128, "columns": 64, "window_size": 128},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", SIZES, ids=name_of)
def test_full_sizes_equal_the_definition(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.float32 and options["dim"] * options["columns"] > 4096:
        options = options | {"dim": 64, "columns": 64}
    case = make(**options, dtype=dtype)
    forward, backward = TOLERANCES[dtype]
    found, expected = case.leaves(), case.wide()
    y_true = definition(expected)
    if case.options["window"] == "none" and dtype != torch.float32:
        with torch.no_grad():
            assert relative(run(found), y_true) <= forward
        with pytest.raises(ValueError, match="without a window gradients need float32, got torch"):
            run(found)
        y = run_auto(found)
    else:
        y = run(found)
    assert relative(y, y_true) <= forward
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y_true.backward(upstream.double())
    compare_gradients(case, found, expected, backward)
    if case.options["window"] == "terraced":
        target, expected, found = torch.randn_like(y), case.wide(), case.leaves()
        for name in ("q", "k", "v"):
            found.tensors[name].requires_grad_(False)  # type: ignore[union-attr]
        tensors, keywords = found.arguments()
        loss = attention_transfer_loss(*tensors[:3], target, *tensors[3:], **keywords, backend="triton")
        true = (definition(expected) - target.double()).square().mean()
        assert float(loss) == pytest.approx(float(true), rel=1e-3)
        (1000 * loss).backward()
        (1000 * true).backward()
        maps = Case({n: x if n in NAMES[3:] else None for n, x in case.tensors.items()}, case.options)
        compare_gradients(maps, found, expected, backward)


DECODED: list[dict[str, Any]] = [
    {"heads": 8, "key_heads": 2, "dim": 128, "columns": 64, "window_size": 64},
    {"heads": 4, "key_heads": 2, "dim": 32, "columns": 16, "window_size": 64, "per": "kv"},
    {"heads": 4, "key_heads": 4, "dim": 64, "columns": 32, "window_size": 32},
    {"heads": 4, "key_heads": 1, "dim": 96, "columns": 48, "window_size": 16, "softcap": 20.0},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", DECODED, ids=name_of)
@pytest.mark.parametrize("window", ["terraced", "sliding", "none"])
def test_half_precision_prefill_and_graph_replayed_decoding_equal_the_definition(
    window: str, sizes: dict[str, Any], dtype: torch.dtype
) -> None:
    if window == "none":
        sizes = {name: value for name, value in sizes.items() if name not in ("window_size", "softcap")}
    case = make(400, batch=2, window=window, dtype=dtype, **sizes)
    tensors, options = case.arguments()
    true = definition(case.wide())
    lengths = torch.tensor([190, 150], device=DEVICE)
    _, state = run(case, lengths=lengths, return_state=True)
    q, k, v = (x[:, :1].clone() for x in tensors[:3])
    before = state.map(torch.clone)
    hybrid_decode_(q, k, v, *tensors[3:], state, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hybrid_decode_(q, k, v, *tensors[3:], state, **options)
    for name, value in vars(before).items():
        getattr(state, name).copy_(value)
    for _ in range(200):
        index = state.length[:, None, None, None].clone()
        for static, x in zip((q, k, v), tensors[:3], strict=True):
            static.copy_(x.gather(1, index.expand(-1, 1, *x.shape[2:])))
        graph.replay()
        expected = true.gather(1, (index).expand(-1, 1, *true.shape[2:]))
        assert relative(y, expected) <= 1e-2
    assert state.length.tolist() == [390, 350]


def test_torch_compile_gives_the_same_outputs_and_gradients() -> None:
    case = make(200, heads=4, key_heads=2, dim=64, columns=64, window_size=64, dtype=torch.bfloat16)

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        y = hybrid_attention(*tensors, **case.options)
        return y.sin() * 2  # type: ignore[union-attr]

    found, expected = case.leaves(), case.leaves()
    torch.compile(layer)(*found.arguments()[0]).sum().backward()
    layer(*expected.arguments()[0]).sum().backward()
    for name in case.given():
        torch.testing.assert_close(found.tensors[name].grad, expected.tensors[name].grad, rtol=2e-2, atol=2e-3)  # type: ignore[union-attr]


def test_dispatch_says_once_which_kernels_and_why_not(caplog: pytest.LogCaptureFixture) -> None:
    interface._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger=interface.__name__):
        for _ in range(2):
            run_auto(make(20))
            run_auto(make(20, columns=8))
    assert [record.message for record in caplog.records] == [
        "hybrid attention on cuda: fused Triton kernels",
        "hybrid attention on cuda: chunked PyTorch form, since the feature dim must be from 16 to 128, got 8",
    ]


def run_auto(case: Case) -> Any:
    tensors, options = case.arguments()
    return hybrid_attention(*tensors, **options)


def test_state_of_long_sequences_keeps_its_accuracy() -> None:
    case = make(16384, heads=2, key_heads=1, dim=64, columns=64, window_size=64, dtype=torch.bfloat16)
    _, state = run(case, return_state=True)
    tensors, options = case.arguments()
    wide = tuple(x.double() for x in tensors)
    _, true = hybrid_attention(*wide, **options, return_state=True)  # type: ignore[misc]
    assert relative(state.s, true.s) <= 5e-3
    assert relative(state.z, true.z) <= 5e-3
    assert torch.equal(state.ring_k.double(), true.ring_k)
    assert state.s.dtype == torch.float32
    assert state_for(case, 1).s.shape == state.s.shape
