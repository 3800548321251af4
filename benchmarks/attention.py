"""Time of one layer's attention on a GPU: ours, softmax attention, the quadratic form and another linear attention.

    pip install -e '.[benchmark]' && python -m benchmarks.attention --out docs/benchmarks/attention.csv

Shapes are Llama-3-8B's. Every implementation's result is compared with float64 before its time is taken, at the timed
shape (one row, one group of heads); a wrong result ends the run. Times are of CUDA graphs, so without the host. A row's
`floor_us` is what its arithmetic at 790 TFLOP/s or its bytes at 4.3 TB/s take at least, whichever is more.

# B batch, T tokens, H query heads, Hk key/value heads, D head dim, F map columns, C window
"""

from __future__ import annotations

import argparse
import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import quantiles, write_csv
from lolcats_kernels.hybrid_attention import (
    apply_feature_map,
    attention_transfer_loss,
    hybrid_attention,
    hybrid_attention_naive,
    hybrid_decode_,
)

logger = logging.getLogger(__name__)
DEVICE = torch.device("cuda")
HEADS, KEY_HEADS, DIM, COLUMNS, WINDOW = 32, 8, 128, 64, 64
GROUP = HEADS // KEY_HEADS
PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12
# Products of a [C, D] tile with a [D, C] tile per chunk and head, of the two-pass chunk-parallel form.
PRODUCTS = {"forward": 13, "transfer": 20, "backward": 26}
# Relative error in norm against float64 on the same rounded operands. What others lose to bf16 is shown; beyond
# `OTHERS` it would be another function. The published form rounds its T x T matrices.
TOLERANCES = {"forward": 4e-3, "backward": 1e-2, "transfer": 1e-2, "decode": 4e-3}
OTHERS = 5e-2
SHAPES = [(8, 1024), (1, 2048), (1, 8192), (1, 32768), (1, 131072)]
BATCHES = [1, 16, 64, 256]


@dataclass(frozen=True)
class Work:
    """What a row measures and what it costs at least."""

    name: str
    batch: int
    tokens: int
    flops: float
    bytes: float

    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


@dataclass(frozen=True)
class Operands:
    q: Tensor
    k: Tensor
    v: Tensor
    maps: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def draw(batch: int, tokens: int, grad: bool = False) -> Operands:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            x = torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32)
            return x.to(dtype).requires_grad_(grad)

        q = tensor(batch, tokens, HEADS, DIM)
        k, v = (tensor(batch, tokens, KEY_HEADS, DIM) for _ in range(2))
        w_q, w_k = (
            (tensor(HEADS, DIM, COLUMNS).detach() * DIM**-0.5).bfloat16().requires_grad_(grad) for _ in range(2)
        )
        gamma = torch.rand(HEADS, generator=generator, device=DEVICE) * 0.5 + 0.05
        return Operands(q, k, v, (w_q, w_k, gamma.requires_grad_(grad)))

    def all(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, *self.maps)

    def last_group(self) -> Operands:
        """The last row's last key/value head and its query heads in float64, as leaves."""
        q, k, v = self.q[-1:, :, -GROUP:], self.k[-1:, :, -1:], self.v[-1:, :, -1:]
        maps = tuple(x[-GROUP:] for x in self.maps)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v, *maps)]
        return Operands(*wide[:3], tuple(wide[3:]))  # type: ignore[arg-type]


def ours(x: Operands) -> Tensor:
    return hybrid_attention(*x.all(), backend="triton")  # type: ignore[return-value]


def exact(x: Operands) -> Tensor:
    """Float64, linear in memory; itself equal to the quadratic form (tests/kernels)."""
    return hybrid_attention(*x.all(), backend="chunked")  # type: ignore[return-value]


def quadratic(x: Operands) -> Tensor:
    """The published form: T x T matrices in the dtype of its operands."""
    return hybrid_attention_naive(*x.all())


def softmax(backend: SDPBackend) -> Callable[[Operands], Tensor]:
    def run(x: Operands) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def gate(name: str, work: str, error: float) -> float:
    """Returns `error`.

    Raises:
        SystemExit: it is above the tolerance.
    """
    if not error <= (TOLERANCES[work] if name == "lolcats" else OTHERS):
        raise SystemExit(f"wrong result: {work} of {name}: relative error {error:.2e}; its time was not taken")
    return error


def group_of(x: Tensor) -> Tensor:
    """Last row, last group of heads."""
    heads = GROUP if x.shape[2] == HEADS else 1
    return x[-1:, :, -heads:]


class Table:
    """Rows as they come, with what they all share."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self.shared = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "dtype": "bfloat16",
        }

    def measure(
        self,
        name: str,
        work: Work,
        error: float,
        prepare: Callable[[], Any],
        calls: int | None = None,
        parts: int = 1,
    ) -> None:
        """Time the step that `prepare` makes, which does the work `parts` times, and add its row."""
        p20, p50, p80 = (seconds / parts for seconds in quantiles(prepare, calls))
        row = {
            "work": work.name,
            "implementation": name,
            "batch": work.batch,
            "tokens": work.tokens,
            "p20_us": round(p20 * 1e6, 1),
            "p50_us": round(p50 * 1e6, 1),
            "p80_us": round(p80 * 1e6, 1),
            "tflops": round(work.flops / p50 / 1e12, 1),
            "tbytes_per_s": round(work.bytes / p50 / 1e12, 3),
            "floor_us": round(work.floor() * 1e6, 1),
            "floor_share": round(work.floor() / p50, 3),
            "relative_error": float(f"{error:.1e}"),
        }
        self.rows.append(row | self.shared)
        write_csv(self.path, self.rows)
        logger.info("%s", " ".join(f"{key}={value}" for key, value in row.items()))


def hybrid_work(name: str, batch: int, tokens: int) -> Work:
    """Arithmetic of the two-pass form; bytes of q, k, v and y once, and as many gradients backward."""
    flops = PRODUCTS[name] * 2.0 * COLUMNS * DIM * HEADS * batch * tokens
    tensors = 2 * (2 * HEADS + 2 * KEY_HEADS) * DIM * batch * tokens
    return Work(name, batch, tokens, flops, tensors * (2 if name == "backward" else 1))


def softmax_work(name: str, batch: int, tokens: int) -> Work:
    flops = (2.0 if name == "forward" else 5.0) * DIM * HEADS * batch * tokens * tokens
    tensors = 2 * (2 * HEADS + 2 * KEY_HEADS) * DIM * batch * tokens
    return Work(name, batch, tokens, flops, tensors * (2 if name == "backward" else 1))


def check_forward(
    name: str, run: Callable[[Operands], Tensor], reference: Callable[[Operands], Tensor], x: Operands
) -> float:
    with torch.no_grad():
        return gate(name, "forward", error_of(group_of(run(x)), reference(x.last_group())))


def check_backward(
    name: str, run: Callable[[Operands], Tensor], reference: Callable[[Operands], Tensor], x: Operands
) -> float:
    """Largest relative error of the gradients of q, k and v (and of the maps, where they have any)."""
    small = x.last_group()
    y, true = run(x), reference(small)
    grad = torch.randn_like(y)
    y.backward(grad)
    true.backward(group_of(grad).double())
    tensors = list(zip((x.q, x.k, x.v), (small.q, small.k, small.v), strict=True))
    errors = [error_of(group_of(found.grad), expected.grad) for found, expected in tensors]  # type: ignore[arg-type]
    if x.q.shape[0] == 1 and x.maps[0].grad is not None:
        pairs = zip(x.maps, small.maps, strict=True)
        errors += [error_of(found.grad[-GROUP:], expected.grad) for found, expected in pairs]  # type: ignore[index, arg-type]
    for tensor in x.all():
        tensor.grad = None
    return gate(name, "backward", max(errors))


def exact_softmax(x: Operands) -> Tensor:
    """Causal softmax attention in float64 by blocks of queries."""
    q, k, v = (y[0].transpose(0, 1) for y in (x.q, x.k, x.v))
    parts = []
    for start in range(0, q.shape[1], 1024):
        stop = min(start + 1024, q.shape[1])
        rows = torch.arange(start, stop, device=q.device)[:, None]
        future = torch.arange(stop, device=q.device)[None, :] > rows
        scores = (q[:, start:stop] @ k[:, :stop].mT) * DIM**-0.5
        parts.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[:, :stop])
    return torch.cat(parts, 1).transpose(0, 1)[None]


def sequences(table: Table, batch: int, tokens: int) -> None:
    """Forward, backward and transfer rows of one shape."""
    cases: list[tuple[str, Callable[[Operands], Tensor], Callable[[Operands], Tensor], Callable[..., Work]]] = [
        ("lolcats", ours, exact, hybrid_work),
        ("sdpa flash-attention-2", softmax(SDPBackend.FLASH_ATTENTION), exact_softmax, softmax_work),
        ("sdpa cudnn", softmax(SDPBackend.CUDNN_ATTENTION), exact_softmax, softmax_work),
    ]
    if batch * tokens <= 8192 and tokens <= 2048:
        cases.append(("quadratic", quadratic, exact, hybrid_work))
    for name, run, reference, work in cases:
        x = Operands.draw(batch, tokens)
        checked = tokens <= 32768  # beyond, the same kernels' float64 softmax would take minutes
        error = check_forward(name, run, reference, x) if checked or run is ours else float("nan")

        table.measure(name, work("forward", batch, tokens), error, lambda run=run, x=x: lambda: run(x))
        if name == "quadratic":
            continue
        x = Operands.draw(batch, tokens, grad=True)
        error = check_backward(name, run, reference, x) if tokens <= 8192 or run is ours else float("nan")

        def backward(run: Callable[[Operands], Tensor] = run, x: Operands = x) -> Callable[[], Any]:
            inputs = x.all() if run is ours else (x.q, x.k, x.v)
            y = run(x)
            grad = torch.randn_like(y)
            return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

        table.measure(name, work("backward", batch, tokens), error, backward)
        del x
    transfer(table, "lolcats", batch, tokens)
    if batch * tokens <= 8192 and tokens <= 1024:
        transfer(table, "quadratic", batch, tokens)


def transfer(table: Table, name: str, batch: int, tokens: int) -> None:
    """Loss and all gradients of the maps, given the softmax outputs."""
    x = Operands.draw(batch, tokens)
    maps = [y.clone().requires_grad_() for y in x.maps]
    with torch.no_grad():
        target = softmax(SDPBackend.FLASH_ATTENTION)(x).contiguous()

    def step() -> tuple[Tensor, ...]:
        if name == "lolcats":
            loss = attention_transfer_loss(x.q, x.k, x.v, target, *maps, backend="triton")
        else:
            loss = (hybrid_attention_naive(x.q, x.k, x.v, *maps).float() - target.float()).square().mean()
        return torch.autograd.grad(loss, maps)

    found = step()
    sums = [torch.zeros_like(y) for y in x.last_group().maps]
    for row in range(batch):
        part = Operands(x.q[row : row + 1], x.k[row : row + 1], x.v[row : row + 1], x.maps).last_group()
        loss = (exact(part) - group_of(target[row : row + 1]).double()).square().sum() / target.numel()
        sums = [total + g for total, g in zip(sums, torch.autograd.grad(loss, part.maps), strict=True)]
    errors = [error_of(y[-GROUP:], total) for y, total in zip(found, sums, strict=True)]
    table.measure(name, hybrid_work("transfer", batch, tokens), gate(name, "transfer", max(errors)), lambda: step)


def fla(table: Table, batch: int, tokens: int) -> None:
    """Normalised linear attention without window, its features given, by flash-linear-attention."""
    from fla.ops.linear_attn import chunk_linear_attn

    x = Operands.draw(batch, tokens)
    with torch.no_grad():
        k, v = (y.repeat_interleave(GROUP, 2) for y in (x.k, x.v))
        f_q, f_k = (
            apply_feature_map(y.transpose(1, 2), w, "hedgehog").transpose(1, 2).contiguous().bfloat16()
            for y, w in ((x.q, x.maps[0]), (k, x.maps[1]))
        )
    operands = [y.requires_grad_() for y in (f_q, f_k, v)]

    def run() -> Tensor:
        return chunk_linear_attn(*operands, scale=1.0, normalize=True)[0]

    work = Work("forward", batch, tokens, 8.0 * COLUMNS * 2 * DIM * HEADS * batch * tokens, 0.0)
    error = float("nan")
    if tokens <= 8192:
        q1, k1, v1 = (y[-1, :, -1].detach().double() for y in operands)
        weights = (q1 @ k1.mT).tril()
        expected = weights @ v1 / weights.sum(1, keepdim=True)
        error = gate("flash-linear-attention", "forward", error_of(run()[-1, :, -1], expected))

    table.measure("flash-linear-attention", work, error, lambda: torch.no_grad()(run))

    def backward() -> Callable[[], Any]:
        y = run()
        grad = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, operands, grad, retain_graph=True)

    work = Work("backward", batch, tokens, 2.5 * work.flops, 0.0)
    table.measure("flash-linear-attention", work, float("nan"), backward)


def decode(table: Table, batch: int) -> None:
    """One token of `batch` sequences at positions of their own; fresh states for each call, so that none is cached."""
    x = Operands.draw(batch, 200)
    lengths = torch.randint(130, 200, (batch,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    with torch.no_grad():
        _, state = hybrid_attention(*x.all(), lengths=lengths, return_state=True, backend="triton")  # type: ignore[misc]
        last = int(lengths[-1])
        whole = exact(Operands(x.q[:, : last + 1], x.k[:, : last + 1], x.v[:, : last + 1], x.maps).last_group())
        checked = state.map(torch.clone)
        token = [y[:, last : last + 1].contiguous() for y in (x.q, x.k, x.v)]
        y = hybrid_decode_(*token, *x.maps, checked, backend="triton")
        error = gate("lolcats", "decode", error_of(group_of(y), whole[:, last:]))
    size = sum(y.numel() * y.element_size() for y in (state.s, state.z))
    # A terraced ring holds 1.5 C tokens on average.
    ring = 0.75 * sum(y.numel() * y.element_size() for y in (state.ring_k, state.ring_v))
    maps = sum(y.numel() * y.element_size() for y in x.maps[:1])
    flops = batch * HEADS * (2.0 * DIM * COLUMNS + 4 * COLUMNS * DIM + 6 * WINDOW * DIM)
    work = Work("decode", batch, 1, flops, size + ring + maps)
    count = max(1, min(64, round(4e8 / size)))
    states = [state.map(torch.clone) for _ in range(count)]

    def step() -> None:
        for one in states:
            hybrid_decode_(*token, *x.maps, one, backend="triton")

    # 64 steps of every state, in which each sequence's chunk is folded once.
    table.measure("lolcats", work, error, lambda: torch.no_grad()(step), max(1, 64 // count), parts=count)


def main() -> None:
    """Measure all rows and write them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=131072, help="skip longer sequences")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA GPU is needed: without one the kernels run in an interpreter, which has no speed")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table = Table(options.out)
    for batch in BATCHES:
        decode(table, batch)
    shapes = [(batch, tokens) for batch, tokens in SHAPES if tokens <= options.longest]
    for batch, tokens in shapes:
        sequences(table, batch, tokens)
    # Last: it tunes itself for minutes.
    for batch, tokens in shapes:
        fla(table, batch, tokens)


if __name__ == "__main__":
    main()
