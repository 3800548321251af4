"""Pretraining the builtin teacher: a small GQA Llama on permissively licensed Python sources, with copy sequences.

`lolcats teacher` and `python -m lolcats_core.pretraining.pretrain` run this on a CPU or a GPU alike. Corpus, tokenizer
and tokens are made once in the scratch directory; training continues from its last checkpoint. The standard library is
never trained on; the record that comes with the model measures it there.

# B rows, T tokens, V vocabulary
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_directory, sha256_file, sha256_json, write_json
from lolcats_common.training_params import TrainingParams
from lolcats_core.compute.device import resolve_device, seed_everything
from lolcats_core.data.arrays import ArrayRows
from lolcats_core.data.sources import stdlib_documents
from lolcats_core.evaluation.recall import copy_recall
from lolcats_core.pretraining import corpus
from lolcats_core.pretraining.config import PretrainConfig, config_from_arguments
from lolcats_core.pretraining.data import (
    IGNORED,
    WindowStarts,
    encode,
    sample_texts,
    save_tokenizer,
    train_tokenizer,
    training_rows,
)
from lolcats_core.training.loop import TrainResult, train
from lolcats_core.training.perplexity import bigram_perplexity, perplexity

logger = logging.getLogger(__name__)
RECORD = "TEACHER.json"


@dataclass
class PretrainData:
    """Token arrays (int16), the text they came from in bytes, and the corpus' record."""

    train: np.ndarray
    validation: np.ndarray
    unseen: np.ndarray
    bytes: dict[str, int]
    record: dict[str, Any]
    tokenizer: Path


def build_model(config: PretrainConfig) -> nn.Module:
    """A freshly initialised `LlamaForCausalLM` in fp32; projections onto the residual stream start smaller."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.hidden_size // config.heads,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * config.layers))
    return model


def prepare_data(config: PretrainConfig) -> PretrainData:
    """Corpus, tokenizer and tokens; read back when the same settings made them before."""
    names = ("seed", "vocab_size", "context", "search_paths", "held_out", "tokenizer_bytes")
    directory = Path(config.scratch) / f"data-{sha256_json([getattr(config, n) for n in names])[:16]}"
    if not (directory / "data.json").exists():
        started = time.monotonic()
        found = corpus.installed_corpus(
            search_paths=config.search_paths or None,
            held_out=[Path(p) for p in config.held_out],
            workers=os.cpu_count() or 1,
        )
        train_texts = [text for source in found.train for text in source.texts]
        texts = {
            "train": train_texts,
            "validation": [text for source in found.validation for text in source.texts],
            "unseen": [text for _, text in stdlib_documents()],
        }
        logger.info("corpus: %.0f s; dropped files: %s", time.monotonic() - started, found.dropped)
        tokenizer = train_tokenizer(sample_texts(train_texts, config.tokenizer_bytes, config.seed), config.vocab_size)
        logger.info("tokenizer: %.0f s", time.monotonic() - started)
        with atomic_directory(directory) as partial:
            save_tokenizer(tokenizer, partial / "tokenizer", config.context)
            sizes = {name: sum(len(text.encode()) for text in values) for name, values in texts.items()}
            for name, values in texts.items():
                np.save(partial / f"{name}.npy", encode(tokenizer, values))
            write_json(partial / "data.json", {"bytes": sizes, "corpus": found.record()})
        logger.info("tokens: %.0f s", time.monotonic() - started)
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("train", "validation", "unseen")}
    made = json.loads((directory / "data.json").read_text())
    record = {
        **made["corpus"],
        "bytes": made["bytes"],
        "tokens": {name: len(array) for name, array in arrays.items()},
        "tokens_sha256": {name: sha256_file(directory / f"{name}.npy") for name in arrays},
    }
    return PretrainData(**arrays, bytes=made["bytes"], record=record, tokenizer=directory / "tokenizer")


def _loss_function(model: Any, config: PretrainConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy per token, fp32 [B, T], of inputs and targets int64 [B, T].

    The layers are compiled one by one (they share their code, so that takes seconds), the head with its loss.
    """
    fast = config.compile and device.type == "cuda"
    compiled: Callable[[Any], Any] = torch.compile if fast else lambda module: module
    layers = [compiled(layer) for layer in model.model.layers]

    def head(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(model.model.norm(hidden), model.lm_head.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")

    head = compiled(head)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = model.model.embed_tokens(inputs)
        positions = torch.arange(inputs.shape[1], device=device)[None]
        cos_sin = model.model.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=cos_sin)
        return head(hidden, targets).view_as(targets)

    return loss


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def _make_step(
    model: nn.Module, tokens: Tensor, config: PretrainConfig, device: torch.device
) -> Callable[[dict[str, Tensor], float], dict[str, Tensor]]:
    per_token = _loss_function(model, config, device)
    max_gap = config.sequence_length // 2

    def step(batch: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        inputs, targets = training_rows(
            tokens, batch["start"], config.sequence_length, config.vocab_size, config.copy_share, max_gap
        )
        with _autocast(device):
            losses = per_token(inputs, targets)
        counted = targets != IGNORED
        loss = losses.sum() / counted.sum()
        (loss * scale).backward()
        copies = int(config.copy_share * len(inputs) + 0.5)
        losses = losses.detach()
        scalars = {"loss": loss.detach(), "text_loss": losses[copies:].mean()}
        if copies:
            scalars["copy_loss"] = losses[:copies].sum() / counted[:copies].sum().clamp(min=1)
        return scalars

    return step


def _steps_for(
    config: PretrainConfig,
    step: Callable[[dict[str, Tensor], float], dict[str, Tensor]],
    model: nn.Module,
    scratch: Path,
) -> int:
    """`max_steps`, or what fits in `max_minutes` at the speed of a few trial steps (kept for a continued run)."""
    if config.max_minutes is None:
        assert config.max_steps is not None
        return config.max_steps
    plan = scratch / "plan.json"
    if plan.exists():
        return int(json.loads(plan.read_text())["steps"])
    device = next(model.parameters()).device
    batch = {"start": torch.zeros(config.batch_rows, dtype=torch.long, device=device)}
    compile_start = started = time.monotonic()
    trials = 10
    for trial in range(-3, trials):
        if trial == 0:
            _wait_for(device)
            started = time.monotonic()
        for _ in range(config.gradient_accumulation):
            step(batch, 1.0)
    _wait_for(device)
    seconds = (time.monotonic() - started) / trials
    model.zero_grad(set_to_none=True)
    left = 60 * config.max_minutes - (time.monotonic() - compile_start)
    # The optimiser, clipping and validation come on top of the trial steps.
    steps = max(1, int(left / (1.15 * seconds)))
    logger.info("speed: %.1f ms a step, %d steps", 1e3 * seconds, steps)
    write_json(plan, {"steps": steps, "seconds_per_step": seconds})
    return steps


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _export(model: Any, data: PretrainData, out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the model (bf16), its tokenizer and the record as one Hugging Face directory; returns the record."""
    import copy
    import shutil

    with atomic_directory(out) as partial:
        copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(partial)
        for file in data.tokenizer.iterdir():
            shutil.copyfile(file, partial / file.name)
        record = record | {"files": {f.name: sha256_file(f) for f in sorted(partial.iterdir())}}
        write_json(partial / RECORD, record)
    return record


def _evaluations(model: Any, config: PretrainConfig, data: PretrainData) -> dict[str, Any]:
    """Perplexity on unseen text beside the bigram and unigram models', and copying recall."""
    train_rows = ArrayRows(data.train, config.sequence_length, config.vocab_size)
    found: dict[str, Any] = {}
    texts = (("standard_library", data.unseen), ("validation_packages", data.validation))
    for name, tokens in texts if config.evaluation_rows else ():
        rows = ArrayRows(tokens, config.sequence_length, config.vocab_size, config.evaluation_rows)
        result = perplexity(model, rows, batch_size=32)
        bytes_per_token = data.bytes["unseen" if name == "standard_library" else "validation"] / max(1, len(tokens))
        found[name] = {
            "perplexity": result.perplexity,
            "tokens": result.tokens,
            "bits_per_byte": result.bits / bytes_per_token,
            "bigram_perplexity": bigram_perplexity(train_rows, rows, config.vocab_size).perplexity,
            # With this weight nothing but the unigram is left.
            "unigram_perplexity": bigram_perplexity(
                train_rows, rows, config.vocab_size, max_train_rows=20_000, weights=(1e15,)
            ).perplexity,
        }
    gaps = [g for g in (64, 128, 256, 512, 1024) if 2 * g <= config.context]
    recall = copy_recall(model, config.vocab_size, gaps, config.recall_samples, config.seed, 16, exclude_ids=(0,))
    found["recall"] = {str(gap): {"value": r.value, "stderr": r.stderr} for gap, r in recall.items()}
    return found


def pretrain(config: PretrainConfig, log: Callable[[dict[str, float], int], None] | None = None) -> dict[str, Any]:
    """Train a teacher and write it to `config.out`; returns the record that is written beside it as TEACHER.json.

    Running it again with the same settings continues an interrupted run.

    Raises:
        UserError: the settings, the installed corpus, the device or a checkpoint do not allow it.
    """
    import transformers

    started = time.monotonic()
    device = resolve_device(config.device)
    scratch = Path(config.scratch) / f"model-{sha256_json(config.without_paths())[:16]}"
    scratch.mkdir(parents=True, exist_ok=True)
    data = prepare_data(config)
    prepared = time.monotonic() - started
    logger.info("tokens: %s; bytes: %s", data.record["tokens"], data.bytes)

    seed_everything(config.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(config).to(device)
    tokens = torch.from_numpy(np.array(data.train)).to(device)
    step = _make_step(model, tokens, config, device)
    steps = _steps_for(config, step, model, scratch)
    seed_everything(config.seed)
    params = TrainingParams(
        lr=config.lr,
        weight_decay=config.weight_decay,
        schedule="cosine",
        warmup_steps=min(config.warmup_steps, max(1, steps // 10)),
        min_lr=config.lr / 100,
        batch_size=config.batch_rows,
        gradient_accumulation=config.gradient_accumulation,
        max_grad_norm=1.0,
        epochs=2**30,
        max_steps=steps,
        eval_every=config.eval_every,
        checkpoint_every=config.eval_every,
        log_every=config.log_every,
    )
    validation = ArrayRows(data.validation, config.sequence_length, config.vocab_size, 128)
    result = TrainResult()
    record: dict[str, Any] = {
        "command": config.command(),
        "data": data.record,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": config.without_paths(),
        "standard_library": platform.python_version(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }

    def evaluate() -> dict[str, float]:
        with _autocast(device):
            return {"loss": perplexity(model, validation, batch_size=32).loss}

    def note(values: dict[str, float], at: int) -> None:
        if "validation_loss" in values:
            logger.info("step %d: validation perplexity %.3f", at, math.exp(values["validation_loss"]))
            if at:
                _export(model, data, Path(config.out), record | {"unfinished_at_step": at})
        if log is not None:
            log(values, at)

    named = dict(model.named_parameters())
    result = train(
        trainable=named,
        step=step,
        rows=WindowStarts(len(data.train), config.sequence_length),
        params=params,
        evaluate=evaluate,
        scratch=scratch,
        seed=config.seed,
        device=device,
        log=note,
        label="pretraining",
        make_optimizer=lambda weights: _optimizer(weights, config, device),
    )
    record["training"] = {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
        "best_step": result.best_step,
        "loss_curve": _thinned(result.history),
    }
    record["seconds"] = {"preparation": prepared, "total": time.monotonic() - started}
    with torch.no_grad():  # what is measured is what is written
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    _export(model, data, Path(config.out), record)
    with _autocast(device):
        record["evaluation"] = _evaluations(model, config, data)
    record["seconds"]["total"] = time.monotonic() - started
    return _export(model, data, Path(config.out), record)


def _optimizer(weights: Iterable[nn.Parameter], config: PretrainConfig, device: torch.device) -> torch.optim.Optimizer:
    weights = list(weights)
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def _thinned(history: list[dict[str, float]], points: int = 100) -> list[dict[str, float]]:
    def rounded(entry: dict[str, float]) -> dict[str, float]:
        return {name: float(f"{value:.5g}") for name, value in entry.items()}

    logged = [h for h in history if "train_loss" in h]
    validated = [h for h in history if "validation_loss" in h]
    kept = logged[:: max(1, len(logged) // points)] + validated
    return [rounded(entry) for entry in sorted(kept, key=lambda entry: entry["step"])]


def summary(record: dict[str, Any]) -> str:
    """What a person wants to see of a record."""
    shown = {"parameters": record["parameters"], **record["training"], **record["evaluation"]}
    shown.pop("loss_curve")
    return json.dumps(shown, indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    """`lolcats teacher` and this module as a program: prints the measurements; 1 after an error's one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        record = pretrain(config_from_arguments(argv))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(summary(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
