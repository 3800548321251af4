"""Measures one stored model as whoever serves it would load it.

``python -I tasks/registry/gate_probe.py MODEL RESULT`` runs alone, in a process that cannot see the project: the
model comes with its own code. Writes RESULT as JSON:
``text``, ``recurrent`` and ``left_padding`` (differences of logits over the largest logit), ``tokens_per_second``,
``memory_gib``; or ``error``.
"""

from __future__ import annotations

import json
import pickletools
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

PROMPT = "def add(a, b):\n    "
# What a registration writes; MLflow's `MLmodel` has no suffix.
TEXT = {"", ".css", ".html", ".j2", ".jinja", ".md", ".py", ".txt", ".yaml", ".yml"}
JSON, LINES, PIECES, WEIGHTS = ".json", ".jsonl", ".model", ".safetensors"
# Steps of a pickle that run what it names.
CALLS = {
    "GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "REDUCE",
    "BUILD",
    "STACK_GLOBAL",
    "EXT1",
    "PERSID",
    "BINPERSID",
}
MAX_LENGTH = 160  # tokens; with 64 of them in a window, whole windows and a part of one are behind the last


def check_files(path: Path) -> None:
    """Refuse a stored model with a file that is not, by name and by content, of a kind that a registration writes.

    Raises:
        ValueError: there is one, such as a pickle or an archive, or no safetensors file.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        if file.suffix not in {*TEXT, JSON, LINES, PIECES, WEIGHTS}:
            raise ValueError(f"{name} is of no known kind, so it may be a pickle; only safetensors is loaded")
        if problem := _problem(file):
            raise ValueError(f"{name} {problem}, only safetensors is loaded")
    if not any(file.suffix == WEIGHTS for file in files):
        raise ValueError("it holds no safetensors file")


def _problem(file: Path) -> str | None:
    """What is wrong with the content of a file whose suffix is known."""
    if file.suffix == WEIGHTS:
        with file.open("rb") as opened:
            start = opened.read(9)
        # Eight bytes of length, which may be any, come before the header.
        return None if start[8:] == b"{" else "holds no safetensors"
    if zipfile.is_zipfile(file) or tarfile.is_tarfile(file):
        return "holds an archive"
    content = file.read_bytes()
    if _is_pickle(content):
        return "holds a pickle"
    if file.suffix == PIECES and not content.startswith(b"{"):
        return None if content.startswith(b"\n") else "holds no tokenizer"  # the first field of sentencepiece's message
    try:
        text = content.decode("utf-8")
        if file.suffix in (JSON, PIECES):
            json.loads(text)
        for line in text.splitlines() if file.suffix == LINES else ():
            json.loads(line)
    except (ValueError, RecursionError):
        return f"holds no {'text' if file.suffix in TEXT else 'JSON'}"
    return "holds no text" if "\0" in text else None


def _is_pickle(content: bytes) -> bool:
    """Whether a pickle of any protocol begins here that would run something; those of protocol 0 look like text."""
    calls = content[:1] == b"\x80"  # begins every pickle since protocol 2, and no text
    try:
        for step, _, _ in pickletools.genops(content):
            calls |= step.name in CALLS
    except Exception:  # an argument that is none has many types of errors
        return content[:1] == b"\x80"
    return calls


def measure(path: Path) -> dict[str, Any]:
    """Load the model by MLflow's pyfunc and measure it; greedy decoding and fixed tokens, so twice gives the same."""
    check_files(path)
    import mlflow.pyfunc
    import torch

    loaded = mlflow.pyfunc.load_model(str(path))
    text = loaded.predict([PROMPT], params={"max_new_tokens": 8})[0]
    served: Any = loaded.unwrap_python_model()
    model = served.model.float()
    context = getattr(model.config, "max_position_embeddings", MAX_LENGTH) or MAX_LENGTH
    length = min(MAX_LENGTH, context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(served.tokenizer), (1, length), generator=generator).to(model.device)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        scale = whole.abs().max().item() or 1.0
        steps, cache = [], dict[str, Any]()
        started = time.perf_counter()
        for index in range(length):
            out = model(ids[:, index : index + 1], use_cache=True, **cache)
            # Its name in this version of transformers.
            cache = {name: out[name] for name in ("cache", "past_key_values") if name in out.keys()}  # noqa: SIM118
            steps.append(out.logits)
        seconds = time.perf_counter() - started
        recurrent = (torch.cat(steps, 1) - whole).abs().max().item() / scale
        left_padding = _left_padding(model, ids, whole) / scale
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers(), *_tensors(cache, set())]}
    return {
        "text": text,
        "recurrent": recurrent,
        "left_padding": left_padding,
        "tokens_per_second": length / seconds,
        "memory_gib": sum(t.numel() * t.element_size() for t in tensors.values()) / 2**30,
    }


def _left_padding(model: Any, ids: Any, whole: Any) -> float:
    """A row in a batch with padding before it, against the same row alone."""
    import torch

    short = ids.shape[1] - ids.shape[1] // 3
    padding = ids.shape[1] - short
    batch = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :padding]), ids[:, :short]], 1)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    logits = model(batch, attention_mask=mask, use_cache=False).logits
    apart = [logits[0] - whole[0], logits[1, padding:] - whole[0, :short]]
    return max(difference.abs().max().item() for difference in apart)


def _tensors(value: Any, seen: set[int]) -> list[Any]:
    """Every tensor that a decode cache holds."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen or isinstance(value, str | bytes | int | float | type(None)):
        return []
    seen.add(id(value))
    if isinstance(value, list | tuple | set):
        members: Any = value
    elif isinstance(value, dict):
        members = value.values()
    else:
        members = getattr(value, "__dict__", {}).values()
    return [tensor for member in members for tensor in _tensors(member, seen)]


def main(path: str, result: str) -> None:
    """Measure and write; an error is a result too."""
    try:
        found = measure(Path(path))
    except Exception as error:
        lines = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
