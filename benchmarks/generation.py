"""Tokens per second of whole-model decoding on a GPU, linearized and softmax, on random weights of a known shape.

    python -m benchmarks.generation --out docs/benchmarks/generation.csv

The linearized model decodes through `graphed_decoding`; its steps are compared with the full pass first, and a wrong
result ends the run. The softmax model decodes as fast as it can be made to here: a cache of exactly the context's
length that nothing is appended to, the faster of FlashAttention-2 and cuDNN, and a CUDA graph, without anything that
`generate` would add. States and caches hold random values, since time does not depend on them. "generation" rows are
128 prompt tokens and 4 096 new ones: a softmax step's time is linear in the context, so three contexts give the mean.
"lolcats, kv_head" has one key map per kv head (`linearize.k_map_per`), so a state four times smaller at these shapes.
"lolcats, a tenth kept" has it too, and softmax attention in a tenth of the kv groups as the default recipe leaves it,
whose keys and values grow: it is measured at every context, and a step of "generation" is the mean as for softmax.
No row has the captures that new graphs cost: one for the constant state, one for each room that the kept part outgrows.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from benchmarks.stages import build
from benchmarks.timing import quantiles, write_csv
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.estimation.memory import KNOWN_MODELS, ModelShape
from lolcats_core.model.decoding.cache import HybridCache, HybridLayer
from lolcats_core.model.decoding.decode_graph import graphed_decoding
from lolcats_core.model.modeling import feature_maps, linearize
from lolcats_kernels.hybrid_attention import empty_state, feature_count

logger = logging.getLogger(__name__)
TOLERANCE = 2e-2  # of the bf16 logits' norm, steps against the full pass: both round every layer
PROMPT, NEW = 128, 4096
GIB = 2**30
KEPT = "lolcats, a tenth kept"


class FixedLayer(CacheLayerMixin):
    """Keys and values of a whole context, already there: a step writes the newest and reads all."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def unmasked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one new token over the whole cache: no mask, which transformers would build while capturing."""
    y = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2), None


transformers.AttentionInterface.register("unmasked", unmasked)


def softmax_step(model: LlamaForCausalLM, batch: int, context: int, backend: SDPBackend) -> Callable[[], Tensor]:
    """A decoding step of `batch` sequences that have `context` tokens."""
    shape = (batch, model.config.num_key_value_heads, context, model.config.head_dim)

    def filled() -> Tensor:
        return torch.empty(shape, dtype=model.dtype, device=model.device).normal_()

    cache = Cache(layers=[FixedLayer(filled(), filled()) for _ in range(model.config.num_hidden_layers)])
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)
    positions = torch.full_like(ids, context - 1)

    model.set_attn_implementation("unmasked")

    def step() -> Tensor:
        with torch.no_grad(), sdpa_kernel(backend):
            return model(input_ids=ids, position_ids=positions, past_key_values=cache).logits

    return step


def release() -> None:
    """Give back what earlier measurements held, in cycles or in the allocator's hands."""
    gc.collect()
    torch.cuda.empty_cache()


def tenth_kept(shape: ModelShape) -> dict[int, tuple[int, ...]]:
    """`softmax_heads` with a tenth of all kv groups, at most one in a layer, evenly over the depth."""
    count = min(shape.layers, round(0.1 * shape.layers * shape.key_heads))
    return {layer: (layer % shape.key_heads,) for layer in (i * shape.layers // count for i in range(count))}


def random_cache(model: PreTrainedModel, batch: int, context: int) -> HybridCache:
    """States and kept keys and values of `batch` sequences after `context` tokens, with random contents."""
    config: Any = model.config
    settings, cache = LinearizeConfig.from_dict(config.linearize), HybridCache(config)
    for layer, maps in zip(cache.layers, feature_maps(model).values(), strict=True):
        assert isinstance(layer, HybridLayer)
        heads, groups = len(maps.w_k.detach()), len(maps.groups.linear)
        for part in layer.kept:
            kept = (batch, config.num_key_value_heads - groups, context, config.head_dim)
            part.update(*(torch.empty(kept, dtype=model.dtype, device=model.device).normal_() for _ in range(2)))
        state = empty_state(
            batch,
            heads,
            feature_count(settings.feature_map, settings.feature_dim),
            groups,
            config.head_dim,
            config.head_dim,
            window=settings.window,
            window_size=settings.window_size,
            dtype=model.dtype,
            device=model.device,
        )
        for tensor in (state.s, state.z, state.ring_k, state.ring_v):
            tensor.uniform_()
        # The states stand at different places of their chunks, as those of sequences that began apart.
        state.length.copy_(context + torch.arange(batch, device=model.device) % 64)
        layer.state, layer.length = state, context
    return cache


def linear_seconds(model: PreTrainedModel, batch: int, context: int) -> tuple[float, float, float]:
    """Percentiles of a step's seconds."""
    cache = random_cache(model, batch, context)
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    with torch.no_grad(), graphed_decoding(model):
        for _ in range(4):
            model(input_ids=ids, past_key_values=cache)
        # Each chunk is folded once in 64 steps.
        for _ in range(4):
            start.record()
            for _ in range(16):
                model(input_ids=ids, past_key_values=cache)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / 16)
    seconds.sort()
    return seconds[0], (seconds[1] + seconds[2]) / 2, seconds[3]


@torch.no_grad()
def check(shape: ModelShape, settings: LinearizeConfig, device: torch.device) -> float:
    """Relative error of prefill and graphed steps against the full pass.

    Raises:
        SystemExit: it is above the tolerance.
    """
    torch.manual_seed(0)
    short = replace(settings, softmax_heads={0: (1,)} if settings.softmax_heads else {})
    model = linearize(build(replace(shape, layers=2), torch.bfloat16, device), short)
    ids = torch.randint(0, shape.vocab, (2, 210), device=device)
    expected, cache = model(ids, use_cache=False).logits.double(), HybridCache(model.config)
    parts = [model(ids[:, :100], past_key_values=cache).logits]
    with graphed_decoding(model):
        parts += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(100, 210)]
    error = float((torch.cat(parts, 1).double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong result: relative error {error:.2e} is above {TOLERANCE:.0e}; nothing was timed")
    return error


def main() -> None:
    """Measure all rows and write them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B", choices=sorted(KNOWN_MODELS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64, 256, 512])
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--generation-batches", type=int, nargs="*", default=[64, 128, 160, 512, 1024])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA GPU is needed")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, shape = torch.device("cuda"), KNOWN_MODELS[options.model]
    settings = {
        "lolcats": LinearizeConfig(),
        "lolcats, kv_head": LinearizeConfig(k_map_per="kv_head"),
        KEPT: LinearizeConfig(k_map_per="kv_head", softmax_heads=tenth_kept(shape)),
    }
    for name, chosen in settings.items():
        logger.info(
            "%s: relative error of graphed decoding against the full pass: %.1e", name, check(shape, chosen, device)
        )
    teacher = build(shape, torch.bfloat16, device)
    students = {name: linearize(teacher, chosen) for name, chosen in settings.items()}
    shared = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        "shape": options.model,
    }
    rows: list[dict[str, Any]] = []

    def measure(work: str, name: str, batch: int, context: int, run: Callable[[int, int], tuple[float, ...]]) -> None:
        release()
        torch.cuda.reset_peak_memory_stats()
        try:
            p20, p50, p80 = run(batch, context)
        except torch.OutOfMemoryError:
            logger.info("%s %s batch=%d context=%d does not fit", work, name, batch, context)
            return
        row = {
            "work": work,
            "implementation": name,
            "batch": batch,
            "context": context,
            "p20_ms": round(p20 * 1e3, 3),
            "p50_ms": round(p50 * 1e3, 3),
            "p80_ms": round(p80 * 1e3, 3),
            "tokens_per_s": round(batch / p50, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        }
        rows.append(row | shared)
        write_csv(options.out, rows)
        logger.info("%s", " ".join(f"{key}={value}" for key, value in row.items()))

    def softmax_seconds(batch: int, context: int) -> tuple[float, ...]:
        release()
        # Beyond this the cache alone does not fit.
        per_token = 4 * shape.layers * shape.key_heads * shape.head_dim
        if batch * context * per_token > torch.cuda.mem_get_info()[0]:
            raise torch.OutOfMemoryError
        found = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            release()
            step = functools.partial(softmax_step, teacher, batch, context, backend)
            try:
                found.append(quantiles(step, 1))
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
        return min(found, key=lambda seconds: seconds[1])

    def averaged(run: Callable[[int, int], tuple[float, ...]], batch: int, context: int) -> tuple[float, ...]:
        contexts = (context - NEW + 1, context - NEW // 2, context)
        first, middle, last = (run(batch, length) for length in contexts)
        return tuple((a + 4 * b + c) / 6 for a, b, c in zip(first, middle, last, strict=True))

    def linear(name: str) -> Callable[[int, int], tuple[float, ...]]:
        return functools.partial(linear_seconds, students[name])

    for batch in options.batches:
        for context in options.contexts:
            if context in (options.contexts[0], options.contexts[-1]):
                measure("decode", "lolcats", batch, context, linear("lolcats"))
            measure("decode", KEPT, batch, context, linear(KEPT))
            measure("decode", "softmax", batch, context, softmax_seconds)
    for batch in options.generation_batches:
        for name in students:
            run = linear(name)
            run = functools.partial(averaged, run) if name == KEPT else run
            measure("generation", name, batch, PROMPT + NEW, run)
        measure("generation", "softmax", batch, PROMPT + NEW, functools.partial(averaged, softmax_seconds))


if __name__ == "__main__":
    main()
