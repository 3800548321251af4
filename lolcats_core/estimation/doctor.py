"""What a run will need and what this machine lacks, told before anything expensive starts (`lolcats doctor`)."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lolcats_common.errors import UserError
from lolcats_common.params import Params
from lolcats_common.sources import COMMIT, find_teacher, source_path
from lolcats_core.compute.device import resolve_device
from lolcats_core.data.sources import local_files
from lolcats_core.estimation.memory import (
    GIB,
    KNOWN_MODELS,
    ModelShape,
    device_memory,
    evaluated_by_layers,
    streamed_memory,
    train_memory,
    transfer_mode,
)
from lolcats_core.teacher.checks import check_config
from lolcats_core.teacher.pin import BUILTIN, examine_teacher

# Share of a device's measured matrix-product rate that each stage reaches; docs/performance.md says how measured.
EFFICIENCY = {"cpu": {"transfer": 0.25, "finetune": 0.25}, "cuda": {"transfer": 0.72, "finetune": 0.49}}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status`: ``ok``, ``info`` (an estimate), ``warn`` or ``missing``."""

    name: str
    status: Literal["ok", "info", "warn", "missing"]
    detail: str


def doctor(params: Params, root: Path) -> list[Finding]:
    """Check the machine and the sources against `params`; nothing is downloaded and nothing is written."""
    findings = [_device(params), *_teacher(params, root), _data(params, root)]
    try:
        shape = model_shape(params, root)
    except UserError:  # said where the teacher is looked at
        shape = None
    if shape is None:
        findings.append(Finding("size", "warn", f"unknown until {params.teacher.source}'s config.json can be read"))
        return findings
    return [*findings, *_memory(params, shape), _disk(params, shape, root), *_time(params, shape)]


def model_shape(params: Params, root: Path) -> ModelShape | None:
    """The teacher's shape from a local config.json, the Hugging Face cache or the table of known models.

    Raises:
        UserError: its config.json is damaged, or its architecture cannot be linearized.
    """
    source = params.teacher.source
    folder = BUILTIN if source == "builtin" else source_path(source, root)
    if folder.is_file():
        return ModelShape.from_config(examine_teacher(params.teacher, root))
    config = folder / "config.json"
    if not config.is_file() and source not in KNOWN_MODELS and _may_be_on_the_hub(source):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json", revision=params.teacher.revision or "main")
        config = Path(cached) if isinstance(cached, str) else config
    if config.is_file():
        return ModelShape.from_config(check_config(config.parent, source, params.teacher.trust_remote_code))
    return KNOWN_MODELS.get(source)


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
    try:
        kind, _ = find_teacher(params.teacher, root)
        examine_teacher(params.teacher, root)
    except UserError as error:
        return [Finding("teacher", "missing", str(error))]
    if kind != "hub":
        details = {
            "builtin": "built in, nothing to download",
            "directory": f"directory {source}",
            "gguf": f"{source}, dequantized once into the Hugging Face cache",
        }
        return [Finding("teacher", "ok", details[kind])]
    findings = []
    if revision is None or not COMMIT.fullmatch(revision):
        detail = f"{source} needs a pinned commit: --set teacher.revision=<40 hex digits>, got {revision!r}"
        findings.append(Finding("revision", "missing", detail))
    return [*findings, _access(source, revision)]


def _may_be_on_the_hub(source: str) -> bool:
    """Whether `source` has the form of a Hugging Face id; a path that begins with . or / has not."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


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
    try:
        found = local_files(params.data, root)
    except UserError as error:
        return Finding("data", "missing", str(error))
    if found is not None:
        return Finding("data", "ok", source)
    return Finding("data", "warn", f"{source} at {str(revision)[:12]} is read from the hub")


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
        detail = f"needs about {need / GIB:.1f} GiB, {device.type} has {have / GIB:.1f} GiB"
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
    path = source_path(params.teacher.source, root)
    here = params.teacher.source == "builtin" or path.exists()
    download = 4 if path.is_file() else 0 if here else 2  # a GGUF file becomes float32
    # The merged student lies in outputs/, in DVC's cache and in the registry's artifacts.
    need = shape.parameters * (download + 3 * wide)
    free = shutil.disk_usage(root).free
    detail = f"needs about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
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
