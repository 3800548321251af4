"""What a directory with a teacher must hold, checked from its small files and the weights' headers alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError, shown
from lolcats_core.model.families import FAMILIES, PREFIX, modality, refusal

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What belongs to a teacher besides its weights; none of it is large.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
# Bits of a value by safetensors' name of its dtype.
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16},
    **{"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
# Of a configuration: what counts something, and the most of it. Reading one makes a list with an entry per layer.
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 2**24),
}
# Any other name may be that of a repository on the hub, whose code transformers would fetch and run.
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# What quantized checkpoints name the parts of a weight, where their configuration does not say that they are.
_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_(packed|scale|scale_inv|zero_point|shape)|(input|k|v)_scale"
    r"|weight\.(absmax|quant_map|quant_state\..*|nested_\w+))$"
)
# What would put weights over those that are checked and pinned, or lead away from them.
_ADAPTER, _REDIRECTION = "adapter_config.json", "transformers_weights"
_LARGEST = 2**28  # bytes of a file that is read whole; the largest tokenizers have an eighth of it
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EMBEDDINGS = tuple({f"{family.embedding}.weight" for family in FAMILIES.values()})


@dataclass(frozen=True)
class Weights:
    """From the safetensors headers: number of parameters, rows of the input embedding, bytes, dtype of most of it."""

    parameters: int
    embedding_rows: int | None
    bytes: int
    dtype: str


def read_json(path: Path, source: str) -> dict[str, Any]:
    """One JSON mapping of the teacher `source`.

    Raises:
        UserError: the file is missing, damaged or no mapping.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise UserError(f"teacher {source}: {path.name} must have at most {_LARGEST} bytes, got {size}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"teacher {source}: {path.name} is nested too deeply; fetch or copy it again") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"teacher {source}: {path.name} is missing") from None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid JSON"
        raise UserError(f"teacher {source}: {path.name} is damaged ({reason}); fetch or copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"teacher {source}: {path.name} must hold a mapping, got {type(value).__name__}")
    return value


def check_config(folder: Path, source: str, trust_remote_code: bool) -> Any:
    """The teacher's configuration, as transformers reads it.

    Raises:
        UserError: it is missing or damaged, its architecture cannot be linearized, or it needs code of its own.
    """
    from transformers import AutoConfig

    raw = read_json(folder / "config.json", source)
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind.startswith(PREFIX):
        raise UserError(f"teacher {source} is already a linearized model ({kind}); give its softmax original")
    reason = text_refusal(raw)
    if reason is not None and not (trust_remote_code and "auto_map" in raw):
        raise UserError(f"teacher {source}: {reason}")
    quantized = raw.get("quantization_config") or raw.get("compression_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise _quantized(source, f"config.json says {method or 'quantized'}")
    _check_values(raw, source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise UserError(f"teacher {source}: config.json is not usable ({_first_line(error)})") from None
    reason = text_refusal(config.to_dict())
    if reason is not None:
        raise UserError(f"teacher {source}: {reason}")
    return config


def text_refusal(values: Mapping[str, Any]) -> str | None:
    """Why the stages cannot linearize a teacher, in one line; None where they can. They read text alone."""
    reason = refusal(values)
    if reason is None and modality(values) == "image":
        name = values["model_type"]
        return f"architecture {name!r} takes images and the stages read text; `lolcats_core.linearize` takes it"
    return reason


def _check_values(raw: dict[str, Any], source: str) -> None:
    """Refuse what would cost memory, time or a download, or lead elsewhere, before transformers reads it."""
    if raw.get(_REDIRECTION) is not None:
        raise UserError(
            f"teacher {source}: `{_REDIRECTION}` in config.json must be absent, got {shown(raw[_REDIRECTION])}; the "
            f"weights are read from {WEIGHTS} or {INDEX}"
        )
    check_code_is_own(raw, "config.json", source)
    for name, most in _COUNTS.items():
        value = raw.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= most):
            limit = f"a whole number from 1 to {most}"
            raise UserError(f"teacher {source}: `{name}` in config.json must be {limit}, got {shown(value)}")
    for name, value in raw.items():
        if name.endswith("attn_implementation") and value not in _ATTENTIONS:
            known = ", ".join(filter(None, _ATTENTIONS))
            raise UserError(f"teacher {source}: `{name}` in config.json must be one of {known}, got {shown(value)}")


def check_code_is_own(raw: Mapping[str, Any], name: str, source: str) -> None:
    """Refuse an `auto_map` into another repository: trust is given to the code of one teacher at one revision.

    Raises:
        UserError: there is one.
    """
    classes = raw.get("auto_map")
    for value in classes.values() if isinstance(classes, dict) else [classes]:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "--" in each:
                raise UserError(
                    f"teacher {source}: `auto_map` in {name} must name the teacher's own files, got {shown(each)}, "
                    "which is code of another repository"
                )


def declared_shapes(config: Any, source: str, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model that the configuration describes; none of them takes memory.

    Raises:
        UserError: it describes no model that can be made.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", trust_remote_code=trust_remote_code
            )
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"teacher {source}: config.json describes no model that can be made ({reason})") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _quantized(source: str, sign: str) -> UserError:
    return UserError(
        f"teacher {source}: quantized weights cannot be linearized ({sign}); give the unquantized model, or a GGUF file"
    )


def weight_files(folder: Path, source: str, listed: set[str]) -> list[str]:
    """Names of the safetensors files that hold the weights.

    Args:
        listed: names of the files that exist, in `folder` or on the hub.

    Raises:
        UserError: there are none, only pickled ones, or the index names one that does not exist.
    """
    if _ADAPTER in listed:
        raise UserError(
            f"teacher {source}: {_ADAPTER} says that an adapter belongs onto the weights; merge it "
            "(`merge_and_unload` of peft) and give the merged model, or remove it"
        )
    if INDEX in listed:
        mapping = read_json(folder / INDEX, source).get("weight_map")
        if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
            raise UserError(f"teacher {source}: {INDEX} has no `weight_map`; fetch or copy it again")
        shards = sorted(set(mapping.values()))
        if any("/" in shard or "\\" in shard for shard in shards):
            raise UserError(f"teacher {source}: {INDEX} names files outside the model's directory")
        missing = [shard for shard in shards if shard not in listed]
        if WEIGHTS in listed and shards != [WEIGHTS]:
            raise UserError(
                f"teacher {source}: {WEIGHTS} and {INDEX}, which names other files, cannot both be the weights; "
                "remove one of the two"
            )
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"teacher {source}: {missing[0]}{more}, named in {INDEX}, is missing; fetch or copy it")
        return shards
    if WEIGHTS in listed:
        return [WEIGHTS]
    pickled = sorted(name for name in listed if name.endswith(_PICKLED) and "/" not in name)
    if pickled:
        raise UserError(
            f"teacher {source}: only {pickled[0]} was found, and pickled weights are not loaded since they can run "
            f"code; convert them once with `save_pretrained` of transformers, which writes {WEIGHTS}"
        )
    raise UserError(f"teacher {source}: the weights are missing; {WEIGHTS} or {INDEX} was expected")


def read_header(path: Path, source: str) -> dict[str, Any]:
    """Header of a safetensors file: tensor name -> dtype, shape, offsets.

    Raises:
        UserError: the file is missing, cut short or otherwise damaged.
    """

    def damaged(reason: str) -> UserError:
        return UserError(f"teacher {source}: {path.name} is damaged ({reason}); fetch or copy it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise damaged("its header is cut short")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"teacher {source}: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"teacher {source}: {path.name} cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is malformed")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: _offsets(item[1])):
        begin, after = _offsets(entry)
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)) or after < begin:
            raise damaged("its header is malformed")
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise damaged(f"the dtype of {name} is {shown(dtype)}")
        if begin != end or (after - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise damaged(f"the bytes of {name} are not those of its shape, or of another tensor too")
        end = after
    if not tensors:
        raise damaged("its header is malformed")
    if end != size - 8 - length:
        raise damaged(f"{size} bytes, its header says {end + 8 + length}")
    return tensors


def _offsets(entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end; (-1, -1), where none can lie, if the entry does not say so."""
    found = entry.get("data_offsets") if isinstance(entry, dict) else None
    whole = isinstance(found, list) and len(found) == 2 and all(type(n) is int for n in found)
    return (found[0], found[1]) if whole and found else (-1, -1)


def check_weights(folder: Path, names: list[str], source: str, declared: Mapping[str, tuple[int, ...]]) -> Weights:
    """Read every header and compare with the index and with the shapes that the configuration declares.

    Raises:
        UserError: a file is damaged, a tensor that the index names is not in its file or has another shape, or the
            weights are quantized.
    """
    headers = {name: read_header(folder / name, source) for name in names}
    if (folder / INDEX).is_file() and names != [WEIGHTS]:
        for tensor, name in read_json(folder / INDEX, source)["weight_map"].items():
            if tensor not in headers[name]:
                raise UserError(f"teacher {source}: {name} lacks the tensor {tensor}; fetch or copy the file again")
    sizes: dict[str, int] = {}
    rows = None
    for tensors in headers.values():
        for name, entry in tensors.items():
            if _PACKED.search(name) or (name.endswith(".weight") and entry["dtype"] not in _FLOATS):
                raise _quantized(source, f"{name} is {entry['dtype']}")
            shape = tuple(entry["shape"])
            if declared.get(name, shape) != shape:
                raise UserError(
                    f"teacher {source}: {name} has shape {list(shape)}, config.json says {list(declared[name])}; they"
                    " do not belong together: fetch or copy both again"
                )
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + math.prod(entry["shape"])
            if name.endswith(_EMBEDDINGS) and len(entry["shape"]) == 2:
                rows = entry["shape"][0]
    return Weights(
        parameters=sum(sizes.values()),
        embedding_rows=rows,
        bytes=sum((folder / name).stat().st_size for name in names),
        dtype=max(sizes, key=lambda dtype: sizes[dtype]),
    )


def check_tokenizer(folder: Path, source: str, rows: int, trust_remote_code: bool) -> Any:
    """The teacher's tokenizer.

    Args:
        rows: how many tokens the model has embeddings for.

    Raises:
        UserError: it is missing or damaged, or has tokens that the model does not know.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(f"teacher {source}: the tokenizer is missing; tokenizer.json was expected beside config.json")
    for name in (name for name in SMALL_FILES if (folder / name).is_file()):
        if (size := (folder / name).stat().st_size) > _LARGEST:
            raise UserError(f"teacher {source}: {name} must have at most {_LARGEST} bytes, got {size}")
        if name in ("tokenizer.json", "tokenizer_config.json"):
            check_code_is_own(read_json(folder / name, source), name, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise UserError(f"teacher {source}: the tokenizer cannot be loaded ({_first_line(error)})") from None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise UserError(f"teacher {source}: the tokenizer is empty; fetch or copy its files again")
    if highest >= rows:
        raise UserError(
            f"teacher {source}: the tokenizer has token {highest}, the model embeddings for {rows} tokens only; "
            "they do not belong together: give the tokenizer that the model was trained with"
        )
    return tokenizer


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
