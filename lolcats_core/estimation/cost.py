"""What linearizing a model costs on given GPUs, and the best mode of each stage (`lolcats plan`).

Memory, disk and work follow from the shapes; time from the measured shares of a GPU's matrix-product rate in
`doctor.EFFICIENCY`, the rates in `GPUS`, and where a GPU has too little to do from the host's time in `HOST_SECONDS`.
docs/scale.md holds the estimates against measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lolcats_common.errors import UserError
from lolcats_common.params import Params
from lolcats_core.estimation.doctor import EFFICIENCY, flops_per_token
from lolcats_core.estimation.memory import FITS, GIB, ModelShape, streamed_memory, train_memory


@dataclass(frozen=True)
class GPU:
    """`memory`: bytes. `rate`: bf16 matrix products, FLOP/s. `link`: bytes per second from the other GPUs of a host.

    `measured`: whether `rate` was; else it is 70 % of the datasheet's, which is what the one measured GPU reaches.
    `link` is what gathering divided weights came to on two H100s and on two H200s; an A100's is its NVLink's share.
    """

    memory: float
    rate: float
    link: float
    measured: bool = False


GPUS = {
    "h200": GPU(139 * GIB, 690e12, 200e9, measured=True),
    "h100": GPU(79 * GIB, 0.7 * 989e12, 200e9),
    "a100": GPU(79 * GIB, 0.7 * 312e12, 130e9),
    "a100-40": GPU(39 * GIB, 0.7 * 312e12, 130e9),
    "rtx4090": GPU(23.5 * GIB, 0.7 * 165e12, 20e9),
}
# Bytes per second that reading a layer's weights from the files and one PCIe link are taken to give.
WEIGHT_RATE, HOST_RATE = 2e9, 20e9
# Bytes per second of hidden states between the GPU and their buffer; a file's by way of the page cache, as measured.
ROW_RATE = {"memory": HOST_RATE, "disk": 13e9}
# Seconds of the host for one layer of one step, forwards and backwards; a GPU that needs less waits. As measured.
HOST_SECONDS = {"transfer": 4.3e-3, "finetune": 10e-3}
# Bytes of a weight in NF4 with its share of a block's scale.
NF4_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True)
class Choice:
    """One way to run a stage. `memory`: bytes per GPU; `host`, `disk`: of the machine; `best`: fastest that fits."""

    stage: str
    mode: str
    memory: float
    host: float
    disk: float
    seconds: float
    fits: bool
    best: bool = False


def parse_gpus(text: str) -> tuple[int, str]:
    """``8xh100`` → (8, "h100"); a bare name is one.

    Raises:
        UserError: the GPU is unknown or the number is none.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9-]*)", text.strip().lower())
    if not found or found[2] not in GPUS or found[1] == "0":
        raise UserError(f"`--gpus` takes such as 1xh200 or 8xh100 of {', '.join(GPUS)}, got {text!r}")
    return int(found[1] or 1), found[2]


def parse_tokens(text: str) -> int:
    """``20M`` → 20 000 000; k, M and G (or B) are thousands, millions and billions.

    Raises:
        UserError: it is no positive number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgb]?)", text.strip().lower().replace("_", ""))
    if not found or float(found[1]) == 0:
        raise UserError(f"`--tokens` takes such as 20M, got {text!r}")
    return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}[found[2]])


def plan(params: Params, shape: ModelShape, tokens: int, gpus: int, gpu: str) -> list[Choice]:
    """Every mode of both training stages on `gpus` of the kind `gpu`, each stage's best marked.

    Args:
        tokens: trained in each stage, all epochs together.
    """
    kind = GPUS[gpu]
    shared = replace(
        params,
        transfer=replace(params.transfer, batch_size=-(-params.transfer.batch_size // gpus)),
        finetune=replace(params.finetune, batch_size=-(-params.finetune.batch_size // gpus)),
    )
    choices = []
    for options in (_transfer(shared, shape, tokens, gpus, kind), _finetune(shared, shape, tokens, gpus, kind)):
        found = list(options)
        fitting = [choice for choice in found if choice.fits]
        best = min(fitting, key=lambda choice: choice.seconds, default=None)
        choices += [replace(choice, best=choice is best) for choice in found]
    return choices


def _wide(params: Params) -> int:
    return 2 if params.compute.precision == "bfloat16" else 4


def _transfer(params: Params, shape: ModelShape, tokens: int, gpus: int, gpu: GPU) -> Iterator[Choice]:
    wide, epochs = _wide(params), params.transfer.epochs
    weights, work = shape.parameters * wide, flops_per_token(params, shape)["transfer"]
    rate = gpu.rate * EFFICIENCY["cuda"]["transfer"]
    own = train_memory(params, shape)["transfer"] - weights
    passes = tokens / (gpus * params.transfer.batch_size * params.data.sequence_length)
    host = passes * shape.layers * HOST_SECONDS["transfer"]
    seconds = max(tokens * work / rate / gpus, host)
    yield Choice("transfer", "joint", weights + own, weights, 0, seconds, _fit(weights + own, gpu) and gpus == 1)
    if gpus > 1:
        memory = _divided(shape, wide, gpus) + own
        gathered = seconds + passes * _gathering(shape, wide, gpus, gpu)
        yield Choice("transfer", "joint, divided", memory, weights / gpus, 0, gathered, _fit(memory, gpu))
    memory = streamed_memory(params, shape)
    buffer = tokens / epochs * shape.hidden * wide
    # Training skips the MLP and the output projection; the buffer moves on with one whole pass.
    skipped = (
        2
        * shape.layers
        * (shape.layer_parameters - shape.hidden * shape.head_dim * (shape.heads + 2 * shape.key_heads))
    )
    training = max(tokens * (work - skipped) / rate / gpus, host)
    moving = max(work * (tokens / epochs) / rate / gpus, host / epochs)
    # Rows, and the next layer's weights, are read and written while the GPU computes; only the first layer's weights
    # are waited for, and all of them on their way to the GPU.
    traffic = shape.layers * buffer * (epochs + 2) / ROW_RATE[params.transfer.buffer]
    layer = shape.layer_parameters * wide
    hidden = max(training + moving, traffic, shape.layers * layer / WEIGHT_RATE)
    seconds = hidden + layer / WEIGHT_RATE + shape.layers * layer / HOST_RATE
    yield Choice(
        "transfer",
        "streamed",
        memory,
        2 * layer,
        buffer,
        seconds,
        _fit(memory, gpu),
    )


def _divided(shape: ModelShape, wide: int, gpus: int) -> float:
    """Bytes of a rank's part of the layers, of two layers that it has gathered, and of the embeddings."""
    layers = shape.layers * shape.layer_parameters
    return wide * (layers / gpus + 2 * shape.layer_parameters + shape.parameters - layers)


def _gathering(shape: ModelShape, wide: int, gpus: int, gpu: GPU) -> float:
    """Seconds in which a rank gets the other ranks' parts of all layers once.

    They are added to the layers' own: the next layer is gathered while one is computed, but what was measured is longer
    by about this (docs/scale.md).
    """
    return shape.layers * shape.layer_parameters * wide * (1 - 1 / gpus) / gpu.link


def _finetune(params: Params, shape: ModelShape, tokens: int, gpus: int, gpu: GPU) -> Iterator[Choice]:
    wide = _wide(params)
    weights = shape.parameters * wide
    rate = gpu.rate * EFFICIENCY["cuda"]["finetune"]
    checkpointed = replace(params, compute=replace(params.compute, gradient_checkpointing=True))
    for label, chosen, factor in (("", params, 1.0), (", checkpointing", checkpointed, 4 / 3)):
        if chosen is params and params.compute.gradient_checkpointing:
            continue
        own = train_memory(chosen, shape)["finetune"] - weights
        passes = tokens / (gpus * params.finetune.batch_size * params.data.sequence_length)
        host = passes * shape.layers * HOST_SECONDS["finetune"]
        seconds = max(tokens * flops_per_token(params, shape)["finetune"] / rate / gpus, host) * factor
        if gpus == 1:
            yield Choice("finetune", f"whole{label}", weights + own, weights, 0, seconds, _fit(weights + own, gpu))
        else:
            memory = _divided(shape, wide, gpus) + own
            # Forwards and again backwards, where a checkpointed layer is computed twice with the same weights.
            gathered = seconds + 2 * passes * _gathering(shape, wide, gpus, gpu)
            yield Choice("finetune", f"divided{label}", memory, weights / gpus, 0, gathered, _fit(memory, gpu))
        ends = shape.parameters - shape.layers * shape.layer_parameters
        base = shape.layers * shape.layer_parameters * NF4_BYTES + ends * wide
        # One matrix at a time is unpacked: its int32 codes, the values and the scaled values.
        memory = base + own + (2 + 2 * wide) * shape.hidden * shape.intermediate
        yield Choice("finetune", f"quantized{label}", memory, 0, 0, seconds * 1.15, _fit(memory, gpu))


def _fit(memory: float, gpu: GPU) -> bool:
    return memory < FITS * gpu.memory
