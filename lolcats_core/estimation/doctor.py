"""What a run will need and what this machine lacks, told before anything expensive starts (`lolcats doctor`)."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lolcats_common.errors import UserError
from lolcats_common.params import Params
from lolcats_core.compute.device import resolve_device
from lolcats_core.estimation.shapes import KNOWN_MODELS, ModelShape
from lolcats_core.model.forward import MAX_FLOAT_LOGITS

GIB = 2**30
# Share of a device's measured matrix-product rate that each stage reaches; docs/performance.md says how measured.
EFFICIENCY = {"cpu": {"transfer": 0.25, "finetune": 0.25}, "cuda": {"transfer": 0.72, "finetune": 0.49}}
COMMIT = 40
# Share of a device's memory up to which an estimate counts as fitting.
FITS = 0.9


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status`: ``ok``, ``info`` (an estimate), ``warn`` or ``missing``."""

    name: str
    status: Literal["ok", "info", "warn", "missing"]
    detail: str


def doctor(params: Params, root: Path) -> list[Finding]:
    """Check the machine and the sources against `params`; nothing is downloaded and nothing is written."""
    findings = [_device(params), *_teacher(params, root), _data(params, root)]
    shape = model_shape(params, root)
    if shape is None:
        findings.append(Finding("size", "warn", f"unknown until {params.teacher.source}'s config.json can be read"))
        return findings
    return [*findings, *_memory(params, shape), _disk(params, shape, root), *_time(params, shape)]


def model_shape(params: Params, root: Path) -> ModelShape | None:
    """The teacher's shape from a local config.json, the Hugging Face cache or the table of known models."""
    source = params.teacher.source
    folder = Path(__file__).parents[1] / "teacher" / "builtin" if source == "builtin" else root / source
    config = folder / "config.json"
    if not config.is_file() and source not in KNOWN_MODELS and "/" in source:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json", revision=params.teacher.revision or "main")
        config = Path(cached) if isinstance(cached, str) else config
    if config.is_file():
        from transformers import AutoConfig

        return ModelShape.from_config(AutoConfig.from_pretrained(config.parent))
    return KNOWN_MODELS.get(source)


def train_memory(params: Params, shape: ModelShape) -> dict[str, float]:
    """Bytes on the training device at the peak of each stage (an estimate from the shapes).

    Stage 1 holds the weights and one layer's work; stage 2 every layer's graph, or one and every layer's input with
    gradient checkpointing. In bfloat16 the fused kernels keep their chunks' states alone, in float32 (the CPU's
    precision) the chunked form keeps scores and features besides.
    """
    wide = 2 if params.compute.precision == "bfloat16" else 4
    weights = shape.parameters * wide
    maps = shape.layers * (2 * shape.heads * shape.head_dim * params.linearize.feature_dim + shape.heads)
    features, window = 2 * params.linearize.feature_dim, params.linearize.window_size
    # Per token and layer: projected, rotated and mixed rows, and the float32 states of the chunks.
    queries, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    attention = wide * 2 * (queries + keys) + 4 * shape.heads * features * shape.head_dim / window
    if wide == 4:
        attention += 4 * shape.heads * (8 * window + 6 * features + 8 * shape.head_dim)
    # Stage 1: the MLP's gate, its activation and its product live at once; or two sets of states.
    passing = 4 * wide * shape.hidden + max(3 * wide * shape.intermediate, 2 * attention)
    # Stage 2: two norms keep their float32 inputs and their outputs, the adapters float32 inputs.
    kept = 2 * (4 + wide) * shape.hidden + 4 * (3 * shape.hidden + queries) + attention + 3 * wide * shape.intermediate
    tokens = {
        "transfer": params.transfer.batch_size * params.data.sequence_length,
        "finetune": params.finetune.batch_size * params.data.sequence_length,
    }
    graph = kept * shape.layers
    if params.compute.gradient_checkpointing:
        graph = 2 * kept + wide * shape.hidden * shape.layers
    # Beyond `MAX_FLOAT_LOGITS` they are made a slice at a time.
    logits = min(tokens["finetune"] * shape.vocab, MAX_FLOAT_LOGITS) * (wide + 3 * 4)
    trained = 16 if params.finetune.train_feature_maps else 4
    lora = 16 * params.finetune.lora_rank * shape.layers * 8 * shape.hidden
    return {
        "transfer": weights + 16 * maps + tokens["transfer"] * passing,
        "finetune": weights + trained * maps + lora + tokens["finetune"] * graph + logits,
    }


def streamed_memory(params: Params, shape: ModelShape) -> float:
    """Bytes on the training device at the peak of a streamed stage 1: `train_memory` of one layer alone, with the batch
    that is read ahead and the two that are written behind.

    The embedding is there before the first layer, and alone.
    """
    wide = 2 if params.compute.precision == "bfloat16" else 4
    one = replace(shape, layers=1)
    embeddings = one.parameters - one.layer_parameters
    under_way = 3 * params.transfer.batch_size * params.data.sequence_length * shape.hidden * wide
    whole = train_memory(params, one)["transfer"] - embeddings * wide + under_way
    return max(whole, wide * shape.vocab * shape.hidden)


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a device, the machine's for the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def transfer_mode(params: Params, shape: ModelShape, memory: float) -> str:
    """``joint`` or ``streamed``: what `transfer.mode: auto` means for `memory` bytes on the training device."""
    if params.transfer.mode != "auto":
        return params.transfer.mode
    wide = 2 if params.compute.precision == "bfloat16" else 4
    # Several processes divide the weights.
    elsewhere = shape.parameters * wide * (1 - 1 / params.compute.processes)
    return "joint" if train_memory(params, shape)["transfer"] - elsewhere < FITS * memory else "streamed"


def evaluated_by_layers(params: Params, shape: ModelShape, memory: float) -> bool:
    """Whether stage `evaluate` runs models layer by layer, since the weights leave no room in `memory` bytes."""
    wide = 2 if params.compute.precision == "bfloat16" else 4
    return shape.parameters * wide >= FITS * memory


def planned_tokens(params: Params) -> dict[str, int | None]:
    """Tokens of each training stage, or None where they depend on the size of a corpus that is not bounded."""
    planned: dict[str, int | None] = {}
    for name, stage in (("transfer", params.transfer), ("finetune", params.finetune)):
        per_step = stage.batch_size * stage.gradient_accumulation * params.data.sequence_length
        bounds = [stage.max_steps * per_step] if stage.max_steps else []
        if params.data.max_train_tokens:
            bounds.append(params.data.max_train_tokens * stage.epochs)
        planned[name] = min(bounds) if bounds else None
    return planned


def flops_per_token(params: Params, shape: ModelShape) -> dict[str, float]:
    """Floating-point operations per trained token of each stage."""
    projections = 2 * shape.layers * shape.layer_parameters
    head = 2 * shape.vocab * shape.hidden
    features, window = 2 * params.linearize.feature_dim, 2 * params.linearize.window_size
    hybrid = shape.layers * shape.heads * 2 * shape.head_dim * (2 * window + 2 * features + 2 * features)
    softmax = shape.layers * shape.heads * 2 * shape.head_dim * params.data.sequence_length
    # The frozen weights need no weight gradients in stage 2: forward and input gradients, twice the forward.
    finetune = 2 * (projections + head) + 3 * hybrid
    if params.finetune.needs_teacher:
        finetune += projections + softmax + head
    return {"transfer": projections + softmax + 3 * hybrid, "finetune": finetune}


def _device(params: Params) -> Finding:
    try:
        device = resolve_device(params.compute.device)
    except UserError as error:
        return Finding("device", "missing", str(error))
    if device.type == "cpu":
        return Finding("device", "ok", f"CPU with {torch.get_num_threads()} threads")
    properties = torch.cuda.get_device_properties(device)
    if params.compute.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        return Finding("device", "warn", f"{properties.name} has no bf16 units; set compute.precision to float32")
    return Finding("device", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")


def _teacher(params: Params, root: Path) -> list[Finding]:
    source, revision = params.teacher.source, params.teacher.revision
    if source == "builtin":
        return [Finding("teacher", "ok", "built in, nothing to download")]
    if (root / source).exists():
        present = (root / source / "config.json").is_file()
        detail = f"directory {source}" if present else f"{source} has no config.json; give a saved Hugging Face model"
        return [Finding("teacher", "ok" if present else "missing", detail)]
    findings = []
    if revision is None or len(revision) != COMMIT:
        detail = f"{source} needs a pinned commit: --set teacher.revision=<40 hex digits>, got {revision!r}"
        findings.append(Finding("revision", "missing", detail))
    return [*findings, _access(source, revision)]


def _access(source: str, revision: str | None) -> Finding:
    from huggingface_hub import constants, get_token, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(source, revision=revision, local_files_only=True, allow_patterns=["*.safetensors"])
        return Finding("access", "ok", f"{source} is in the Hugging Face cache")
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass
    if constants.HF_HUB_OFFLINE:
        return Finding("access", "missing", f"{source} is not cached and HF_HUB_OFFLINE is set")
    known = KNOWN_MODELS.get(source)
    if known is not None and known.gated and get_token() is None:
        return Finding("access", "missing", f"{source} is gated: accept its licence on the hub and set HF_TOKEN")
    return Finding("access", "warn", f"{source} is not cached; it will be downloaded from the hub")


def _data(params: Params, root: Path) -> Finding:
    source, revision = params.data.source, params.data.revision
    if source == "builtin":
        return Finding("data", "ok", "the Python standard library's sources")
    if (root / source).exists() or any(root.glob(source)) if not Path(source).is_absolute() else Path(source).exists():
        return Finding("data", "ok", source)
    if revision is None or len(revision) != COMMIT:
        detail = f"{source} is no local path; a dataset id needs --set data.revision=<40 hex digits>, got {revision!r}"
        return Finding("data", "missing", detail)
    return Finding("data", "warn", f"{source} at {revision[:12]} is read from the hub")


def _memory(params: Params, shape: ModelShape) -> list[Finding]:
    try:
        device = resolve_device(params.compute.device)
    except UserError:
        device = torch.device("cpu")
    have = device_memory(device)
    findings = []
    needs = train_memory(params, shape)
    streamed = transfer_mode(params, shape, have) == "streamed"
    if streamed:
        needs["transfer"] = streamed_memory(params, shape)
    for stage, need in needs.items():
        detail = f"about {need / GIB:.1f} GiB of {have / GIB:.0f} GiB on {device.type}"
        if stage == "transfer" and streamed:
            detail += ", one layer at a time"
        if need > have:
            detail += "; lower the batch size, set compute.gradient_checkpointing, or use a larger device"
        findings.append(Finding(f"memory, {stage}", "missing" if need > have else "info", detail))
    if evaluated_by_layers(params, shape, have):
        findings.append(Finding("memory, evaluate", "warn", "one layer at a time; perplexity alone can be measured"))
    return findings


def _disk(params: Params, shape: ModelShape, root: Path) -> Finding:
    wide = 2 if params.compute.precision == "bfloat16" else 4
    download = 0 if params.teacher.source == "builtin" or (root / params.teacher.source).exists() else 2
    # The merged student lies in outputs/, in DVC's cache and in the registry's artifacts.
    need = shape.parameters * (download + 3 * wide)
    free = shutil.disk_usage(root).free
    detail = f"about {need / GIB:.1f} GiB of {free / GIB:.0f} GiB free"
    return Finding("disk", "missing" if need > free else "info", detail)


def _time(params: Params, shape: ModelShape) -> list[Finding]:
    try:
        device = resolve_device(params.compute.device)
    except UserError:
        return []
    rate, flops, tokens = (
        matmul_rate(device, params.compute.precision),
        flops_per_token(params, shape),
        planned_tokens(params),
    )
    findings = []
    for stage, count in tokens.items():
        per_second = rate * EFFICIENCY[device.type][stage] / flops[stage]
        if count is None:
            detail = f"about {per_second:,.3g} tokens/s; tokens depend on the corpus (data.max_train_tokens is null)"
        else:
            detail = f"about {duration(count / per_second)} for {count:,} tokens at {per_second:,.3g} tokens/s"
        findings.append(Finding(f"time, {stage}", "info", detail))
    return findings


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of a square matrix product, measured for about a quarter of a second."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bfloat16" and device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    count, spent = 0, 0.0
    (a @ b).sum().item()
    start = time.perf_counter()
    while spent < 0.25:
        (a @ b)[0, 0].item()
        count, spent = count + 1, time.perf_counter() - start
    return 2 * size**3 * count / spent


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h`` or ``5.1 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
