"""Memory of decoding and cost of prefill as a sequence grows, on random weights of any Llama shape.

    python -m benchmarks.long_context                              # a small model, some minutes on a CPU
    python -m benchmarks.long_context --hidden 4096 --layers 4 --heads 32 --kv-heads 8 --dtype bfloat16 --device cuda

Decoding is compared with the full pass first; a wrong result ends the run before anything is measured. `peak_mib` is
the most bytes that tensors held at once beyond the model: on CUDA what was allocated, on a CPU every storage counted
from its making to its end, in a run of its own. The ratios are to the row before: linear prefill takes `tokens_ratio`
times the seconds and the memory; decoding's peak and `cache_mib` do not grow with tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.modeling import linearize

logger = logging.getLogger(__name__)
MIB = 2**20
TOLERANCE = 1e-4  # of the float32 logits' norm, prefill and steps against the full pass


@dataclass(frozen=True)
class Shape:
    """What is measured. `batch` sequences of a model with `layers` layers of `heads` query and `kv_heads` kv heads."""

    hidden: int = 128
    layers: int = 1
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 512
    window_size: int = 64
    feature_dim: int = 32
    k_map_per: str = "query_head"
    batch: int = 1
    dtype: str = "float32"
    device: str = "auto"


def build(shape: Shape) -> PreTrainedModel:
    """A linearized model of random weights, made on its device."""
    device, dtype = resolve_device(shape.device), resolve_dtype(shape.dtype)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2**20,
    )
    torch.manual_seed(0)
    with device:
        teacher = LlamaForCausalLM(config).to(dtype).eval()
    settings = LinearizeConfig(
        window_size=shape.window_size,
        feature_dim=shape.feature_dim,
        k_map_per=shape.k_map_per,  # type: ignore[arg-type]
    )
    return linearize(teacher, settings)


@torch.no_grad()
def check(shape: Shape) -> float:
    """Relative error of prefill and steps against the full pass, in float32.

    Raises:
        SystemExit: it is above the tolerance.
    """
    model: Any = build(dataclasses.replace(shape, dtype="float32"))
    tokens = 4 * shape.window_size + 5
    ids = torch.randint(0, shape.vocab, (1, tokens), device=model.device)
    expected, cache = model(ids, use_cache=False).logits, HybridCache(model.config)
    split = tokens - shape.window_size - 3
    parts = [model(ids[:, :split], past_key_values=cache).logits]
    parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(split, tokens)]
    error = float((torch.cat(parts, 1) - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong result: relative error {error:.2e} is above {TOLERANCE:.0e}; nothing was measured")
    return error


@torch.no_grad()
def measure(kind: str, tokens: int, shape: Shape) -> dict[str, Any]:
    """One row: `kind` is ``decode`` (one token at a time from nothing) or ``prefill`` (all at once, last logits)."""
    model: Any = build(shape)

    def run(length: int) -> HybridCache:
        cache = HybridCache(model.config)
        ids = torch.randint(0, shape.vocab, (shape.batch, 1 if kind == "decode" else length), device=model.device)
        for _ in range(length if kind == "decode" else 1):
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
            if kind == "decode":
                ids = logits[:, -1:].argmax(-1)
        return cache

    run(4 * shape.window_size)
    peak = peak_bytes(lambda: run(tokens), model.device)
    start = time.perf_counter()
    cache = run(tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - start
    return {
        "kind": kind,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(shape.batch * tokens / seconds, 1),
        "peak_mib": round(peak / MIB, 4),
        "cache_mib": round((cache.state_bytes() + cache.softmax_bytes()) / MIB, 4),
    }


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        return out

    def _end(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that `run` held at once beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        run()
    return live.most


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their tokens, time and peak over those of the row before (None for the first of a kind)."""
    done: list[dict[str, Any]] = []
    for row in rows:
        before = done[-1] if done and done[-1]["kind"] == row["kind"] else None
        ratios = {
            f"{key}_ratio": round(row[key] / before[key], 2) if before and before[key] else None
            for key in ("tokens", "seconds", "peak_mib")
        }
        done.append(row | ratios)
    return done


def main() -> None:
    """Check, then measure and print one JSON row per length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--decode-tokens", type=int, nargs="*", default=[1024, 65536])
    parser.add_argument("--prefill-tokens", type=int, nargs="*", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    logger.info("relative error of decoding against the full pass: %.1e", check(shape))
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for kind, lengths in (("prefill", options.prefill_tokens), ("decode", options.decode_tokens)):
        for tokens in lengths:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                rows = with_ratios([*rows, pool.submit(measure, kind, tokens, shape).result()])
            logger.info(json.dumps(rows[-1]))
    if options.out:
        options.out.write_text(json.dumps({"shape": dataclasses.asdict(shape), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
