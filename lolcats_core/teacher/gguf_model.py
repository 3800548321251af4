"""A teacher in a GGUF file: checked by its header, and dequantized once into the directory that every stage reads.

The directory lies in the Hugging Face cache under the file's SHA-256. Quantized tensors become the float32 values that
they stand for, others keep their dtype, and no more than one file of the result is in memory at a time.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_directory, write_json
from lolcats_common.progress import progress
from lolcats_core.teacher.checks import INDEX, WEIGHTS
from lolcats_core.teacher.gguf_header import Header, StoredTensor, read_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)
# Part of the directory's name; another number where the same file becomes other bytes.
FORMAT = 1
SHARD_BYTES = 2 * 2**30
# By llama.cpp's names, which are those of transformers here; Mistral is a Llama to it.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_VALUES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
# Said by the tensors as well, or of no effect on what the model computes.
_IMPLIED = {"attention.value_length", "rope.dimension_count", "rope.freq_base", "tensor_data_layout", "vocab_size"}
_ROTARY = "rope_freqs.weight"
# How Llama 3.1 and later reach beyond these many positions; the file holds the resulting divisors alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufModel:
    """`config`: as transformers would have it; `names`: the model's parameters and the tensor that each one is."""

    config: PreTrainedConfig
    header: Header
    names: dict[str, str]


def read_model(path: Path, source: str) -> GgufModel:
    """Check all that can be told without reading weights.

    Raises:
        UserError: the file is damaged or incomplete, holds another architecture than `ARCHITECTURES`, something that
            those do not have, or a type of tensor that cannot be dequantized; or the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"teacher {source}: a GGUF file needs the package `gguf`; pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM

    header = read_header(path, source)
    config = _config(path, source, header)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _architecture(header))
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = {name: str(table.get_name(name, (".weight", ".bias"))) for name in shapes}
    size = path.stat().st_size
    for name, stored in names.items():
        tensor = header.tensors.get(stored)
        if tensor is None:
            raise UserError(f"teacher {source}: the file lacks {stored}, which is {name}")
        if tensor.shape != tuple(shapes[name]):
            raise UserError(f"teacher {source}: {stored} is {list(tensor.shape)}, the model has {list(shapes[name])}")
        if tensor.start + _stored_bytes(tensor, stored, source) > size:
            raise UserError(f"teacher {source} is cut short in {stored}; fetch or copy it again")
    unknown = sorted(header.tensors.keys() - {*names.values(), _ROTARY})
    if unknown:
        raise UserError(f"teacher {source}: the file has {unknown[0]}, which {config.model_type} models do not have")
    return GgufModel(config, header, names)


def folder_of(digest: str) -> Path:
    """Where the file with this SHA-256 lies, dequantized, once it was."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "lolcats" / f"gguf-{digest}-{FORMAT}"


def dequantized(path: Path, source: str, digest: str) -> Path:
    """The directory of a GGUF file's model, made where it is not there yet; the same bytes every time.

    Args:
        digest: the file's SHA-256.

    Raises:
        UserError: as `read_model`, or its tokenizer cannot be read.
    """
    folder = folder_of(digest)
    if folder.is_dir():
        return folder
    model = read_model(path, source)
    tokenizer = _tokenizer(path, source)
    logger.info("teacher %s: dequantizing it once, into %s", source, folder)
    try:
        with atomic_directory(folder) as partial:
            tokenizer.save_pretrained(partial)
            _save_weights(model, path, partial)
            values = json.loads(model.config.to_json_string())
            # The version that wrote it would change the hash of a directory that is made again.
            write_json(partial / "config.json", {k: v for k, v in values.items() if k != "transformers_version"})
    except OSError as error:
        if error.errno != 28:
            raise
        raise UserError(f"teacher {source} does not fit on the disk dequantized; set HF_HOME to a larger one") from None
    return folder


def _architecture(header: Header) -> str:
    return str(header.values.get("general.architecture"))


def _config(path: Path, source: str, header: Header) -> PreTrainedConfig:
    from transformers import AutoConfig

    values, prefix = header.values, _architecture(header)
    if prefix not in ARCHITECTURES:
        raise UserError(
            f"teacher {source}: GGUF files of {', '.join(ARCHITECTURES)} are read (Mistral is a llama to them), "
            f"got {prefix!r}; give the model's Hugging Face directory or id"
        )
    parts = values.get("split.count", 0)
    if parts > 1:
        raise UserError(f"teacher {source} is one of {parts} parts; join them with `llama-gguf-split --merge`")
    own = {key.removeprefix(f"{prefix}."): value for key, value in values.items() if key.startswith(f"{prefix}.")}
    strange = own.keys() - {*_VALUES, *_OPTIONAL, *_IMPLIED}
    for key in sorted(strange):
        if own[key] and own[key] != "none":
            reason = f"`{prefix}.{key}` is {own[key]!r}, which is not carried over from GGUF"
            raise UserError(f"teacher {source}: {reason}; give the model's Hugging Face directory or id")
    for key in (*(f"{prefix}.{key}" for key in _VALUES), "tokenizer.ggml.tokens"):
        if key not in values:
            raise UserError(f"teacher {source}: the file does not say `{key}`")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"teacher {source}: the file lacks token_embd.weight; it is no whole model")
    settings: dict[str, Any] = {name: own[key] for key, name in (_VALUES | _OPTIONAL).items() if key in own}
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    for token in ("bos", "eos", "padding"):
        settings[f"{token.removesuffix('ding')}_token_id"] = values.get(f"tokenizer.ggml.{token}_token_id")
    return AutoConfig.for_model(
        prefix,
        **settings,
        architectures=[ARCHITECTURES[prefix]],
        vocab_size=embedding.shape[0],
        tie_word_embeddings="output.weight" not in header.tensors,
        rope_parameters=_rotary(path, source, header, settings["head_dim"]),
        dtype=str(_dtype(embedding.kind)).removeprefix("torch."),
    )


def _rotary(path: Path, source: str, header: Header, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`; the divisors that the file may hold are recognized as Llama 3.1's."""
    import numpy as np

    base = float(header.values.get(f"{_architecture(header)}.rope.freq_base", 10_000.0))
    if _ROTARY not in header.tensors:
        return {"rope_type": "default", "rope_theta": base}
    found = _read(path, header.tensors[_ROTARY]).double().numpy()
    factor = float(found.max())
    turns = _LLAMA3["original_max_position_embeddings"] * base ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    if found.shape != turns.shape or not np.allclose(found, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise UserError(
            f"teacher {source}: {_ROTARY} holds other frequencies than Llama 3.1's; give the Hugging Face model"
        )
    return {"rope_type": "llama3", "rope_theta": base, "factor": factor, **_LLAMA3}


def _tokenizer(path: Path, source: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"teacher {source}: its tokenizer cannot be read ({reason})") from None


def _dtype(kind: int) -> torch.dtype:
    """What a tensor of this type becomes."""
    import torch
    from gguf import GGMLQuantizationType as Kind

    return {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(Kind(kind), torch.float32)


def _stored_bytes(tensor: StoredTensor, name: str, source: str) -> int:
    import gguf
    import numpy as np

    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise UserError(f"teacher {source}: {name} is of a type ({tensor.kind}) that cannot be dequantized") from None
    if tensor.shape[-1] % elements:
        raise UserError(f"teacher {source}: {name} has rows of {tensor.shape[-1]}, {kind.name} takes {elements}s")
    return math.prod(tensor.shape) // elements * size


def _read(path: Path, tensor: StoredTensor) -> torch.Tensor:
    """One tensor in the dtype that it keeps or, dequantized, in float32."""
    import gguf
    import numpy as np
    import torch

    kind = gguf.GGMLQuantizationType(tensor.kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows = (*tensor.shape[:-1], tensor.shape[-1] // elements * size)
    stored = np.memmap(path, np.uint8, "r", tensor.start, rows)
    return torch.from_numpy(np.array(gguf.dequantize(stored, kind))).to(_dtype(tensor.kind))


def _parameters(model: GgufModel, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each parameter, in order.

    llama.cpp turns pairs of neighbouring dims where transformers turns dims half a head apart, so its Llama files hold
    the rows of q and k in pairs.
    """
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, stored in model.names.items():
        weight = _read(path, model.header.tensors[stored])
        projection = name.split(".")[-2]
        if config.model_type == "llama" and projection in heads:
            weight = weight.unflatten(0, (heads[projection], -1, 2)).transpose(1, 2).reshape(weight.shape)
        yield name, weight.contiguous()


def _save_weights(model: GgufModel, path: Path, folder: Path) -> None:
    """model.safetensors, or files of up to `SHARD_BYTES` each with their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = [{}]
    for name, stored in model.names.items():
        tensor = model.header.tensors[stored]
        size = math.prod(tensor.shape) * _dtype(tensor.kind).itemsize
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    weights = _parameters(model, path)
    total = sum(sum(shard.values()) for shard in shards)
    where: dict[str, str] = {}
    with progress(total // 2**20, "dequantizing the teacher (MiB)") as shown:
        for number, shard in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for (name, weight), size in zip(islice(weights, len(shard)), shard.values(), strict=True):
                tensors[name] = weight
                shown.update(size // 2**20)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
