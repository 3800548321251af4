"""Greedy continuations of a model beside its teacher's, and what generating them costs.

Log-likelihoods hide what is lost once a model reads its own output (arXiv 2603.26556).

# B batch, T tokens of the prompt, N new tokens
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lolcats_common.records import Cost, Generation, Measured
from lolcats_core.evaluation.recall import mean_and_stderr
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.forward import evaluating, model_device
from lolcats_core.model.transformers_versions import CACHE
from lolcats_core.training.loop import Rows

NGRAM = 4


def prompts(rows: Rows, count: int, tokens: int) -> Tensor:
    """The first tokens of the first rows, int64 [B, T]; at most half of a row."""
    tokens = max(1, min(tokens, int(rows.sequence_length) // 2))
    return rows.batch(range(min(count, len(rows))))["input_ids"][:, :tokens]


def continue_greedily(model: nn.Module, input_ids: Tensor, new_tokens: int) -> tuple[list[list[int]], Cost]:
    """The most probable token, `new_tokens` times, from the model's own cache.

    Args:
        input_ids: int64 [B, T], without padding.

    Returns:
        New tokens of each row (an end token does not stop the others; see `until_end`), and the cost:
        ``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``cache_bytes`` at the end, and on a GPU
        ``peak_bytes``.
    """
    device = model_device(model)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    ids = input_ids.to(device)
    written: list[Tensor] = []
    with evaluating(model):
        started = _now(device)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefilled = _now(device)
        for step in range(new_tokens):
            written.append(out.logits[:, -1].argmax(-1))
            if step + 1 < new_tokens:
                cached = {CACHE: out[CACHE]}
                out = model(input_ids=written[-1][:, None], use_cache=True, logits_to_keep=1, **cached)
        decoded = _now(device)
    cost: Cost = {
        "prefill_tokens_per_second": ids.numel() / max(prefilled - started, 1e-9),
        "decode_tokens_per_second": len(ids) * max(1, new_tokens - 1) / max(decoded - prefilled, 1e-9),
        "cache_bytes": float(cache_bytes(out[CACHE])),
    }
    if cuda:
        cost["peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return torch.stack(written, 1).tolist(), cost


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_bytes(cache: Any) -> int:
    """Bytes of a decode cache: states and rings of linear layers, keys and values of softmax layers."""
    if isinstance(cache, HybridCache):
        return cache.state_bytes() + cache.softmax_bytes()
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.numel() * x.element_size() for x in tensors)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation config, in order."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})


def until_end(tokens: Sequence[int], end: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    for place, token in enumerate(tokens):
        if token in end:
            return list(tokens[:place])
    return list(tokens)


def repetition(tokens: Sequence[int]) -> float:
    """Share of runs of `NGRAM` tokens that occurred before in the same text: 0 for no repetition, near 1 for a loop."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def token_f1(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """F1 of the two bags of tokens; 1 for two empty texts."""
    if not reference or not tokens:
        return float(not reference and not tokens)
    common = sum((Counter(reference) & Counter(tokens)).values())
    return 2 * common / (len(reference) + len(tokens))


def shared_prefix(reference: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    for place, (a, b) in enumerate(zip(reference, tokens, strict=False)):
        if a != b:
            return place
    return min(len(reference), len(tokens))


def compare_writing(teacher: list[list[int]], student: list[list[int]], end: Sequence[int]) -> Generation:
    """Measures of the student's texts beside the teacher's, over prompts.

    Args:
        teacher, student: of `continue_greedily`, for the same prompts.

    Returns:
        ``exact_prefix`` (equal tokens from the start), ``token_f1``, ``same_stop`` (share where both end, at the same
        token, or neither does), and for each of them ``repetition`` and ``stopped`` (share that ended).
    """
    cut = [(until_end(a, end), until_end(b, end)) for a, b in zip(teacher, student, strict=True)]
    stops = [(len(a) < len(x), len(b) < len(y)) for (a, b), x, y in zip(cut, teacher, student, strict=True)]
    same = [
        float(a_stops == b_stops and (not a_stops or len(a) == len(b)))
        for (a, b), (a_stops, b_stops) in zip(cut, stops, strict=True)
    ]
    return {
        "exact_prefix": _measured([float(shared_prefix(a, b)) for a, b in cut]),
        "token_f1": _measured([token_f1(a, b) for a, b in cut]),
        "same_stop": _measured(same),
        "repetition_teacher": _measured([repetition(a) for a, _ in cut]),
        "repetition_finetuned": _measured([repetition(b) for _, b in cut]),
        "stopped_teacher": _measured([float(a) for a, _ in stops]),
        "stopped_finetuned": _measured([float(b) for _, b in stops]),
    }


def _measured(values: Sequence[float]) -> Measured:
    value, stderr = mean_and_stderr(values)
    return {"value": value, "stderr": stderr}
