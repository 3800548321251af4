"""Writes the finetuned model for others: merged or as a delta, with its tokenizer and a model card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

import lolcats_core  # noqa: F401  (registers the model type)
from lolcats_common.errors import UserError
from lolcats_common.files import atomic_directory, read_json
from lolcats_common.params import load_params, read_yaml
from lolcats_common.sources import source_path
from lolcats_core.compute.numbers import check_folder
from lolcats_core.export.delta import ADAPTER, ADAPTER_CONFIG, DELTA, read_delta
from tasks.registry import register
from tasks.registry.versions import ARTIFACTS, version_files
from tasks.reporting.model_card import Facts, model_card
from tasks.runner.logs import quiet_progress_bars

CARD = "README.md"
_SIZE = re.compile(r"[1-9]\d*(\.\d+)?[KMGT]B")


def export(
    root: Path,
    source: str | None,
    *,
    form: str = "merged",
    to: Path | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
) -> Path:
    """Write one form of the model into a directory, which appears in one rename when it is complete.

    Args:
        source: a registered version, or None for the current outputs.
        form: ``merged`` or ``delta``.
        to: by default ``exports/<registered name>-<form>``.
        max_shard_size: of the merged weights' files, such as ``5GB``.
        force: replace an earlier export.

    Raises:
        UserError: there is no such version, its outputs are stale or incomplete, or `to` holds something.
    """
    name = load_params(root / "params.yaml").register.name
    folder = (to or root / "exports" / f"{name}-{form}").resolve()
    if max_shard_size is not None and form != "merged":
        raise UserError("`--max-shard-size` is for `--form merged`; a delta is one file")
    if max_shard_size is not None and not _SIZE.fullmatch(max_shard_size):
        raise UserError(f"`--max-shard-size` must be a number with KB, MB, GB or TB, got {max_shard_size!r}")
    _check_free(folder, force)
    files, facts = _current(root, form) if source is None else _registered(root, name, source, form)
    if not files[form].is_dir():
        raise UserError(f"{facts.title} was kept without its {form} form; register or run it again")
    quiet_progress_bars()
    try:
        with atomic_directory(folder) as partial:
            if form == "delta":
                _write_delta(files["delta"], partial)
            else:
                _write_merged(files["merged"], partial, max_shard_size)
            AutoTokenizer.from_pretrained(files["merged"]).save_pretrained(partial)
            model_card(facts).save(partial / CARD)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _check_free(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; `--to` takes a directory")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise UserError(f"{folder} is not empty; give another directory, or --force to replace an earlier export")
    if not (folder / CARD).is_file() or not any((folder / file).is_file() for file in ("config.json", DELTA)):
        raise UserError(f"{folder} holds no earlier export, so --force does not replace it; give another directory")


def _write_delta(delta: Path, folder: Path) -> None:
    read_delta(delta)
    for file in (DELTA, ADAPTER_CONFIG, ADAPTER):
        shutil.copyfile(delta / file, folder / file)


def _write_merged(model: Path, folder: Path, max_shard_size: str | None) -> None:
    check_folder(model, str(model))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} does not load as a model: {str(error).splitlines()[0]}") from error
    loaded.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))


def _current(root: Path, form: str) -> tuple[dict[str, Path], Facts]:
    params = load_params(root / "params.yaml")
    kept = {key: root / path for key, path in ARTIFACTS.items()}
    facts = _facts(root, "the current outputs", params.register.name, form, kept, register.lineage(root, params))
    return {"merged": kept["model"], "delta": kept["adapter"]}, facts


def _registered(root: Path, name: str, source: str, form: str) -> tuple[dict[str, Path], Facts]:
    version, folder = version_files(root, name, source)
    kept = {key: folder / path.name for key, path in ARTIFACTS.items()}
    title = f"{version.name} version {version.version}"
    facts = _facts(root, title, version.name, form, kept, {"registered": title, **version.tags})
    return {"merged": kept["model"], "delta": kept["adapter"]}, facts


def _licence(root: Path, teacher: Mapping[str, Any]) -> str | None:
    """The licence that the teacher's own model card names; the built-in teacher's is this project's."""
    source, revision = teacher.get("source", ""), teacher.get("revision")
    if teacher.get("kind") == "builtin":
        return "apache-2.0"
    if teacher.get("kind") == "hub":
        found = try_to_load_from_cache(source, CARD, revision=revision)
    else:
        found = source_path(source, root) / CARD
    try:
        return ModelCard.load(found).data.license if isinstance(found, str | Path) else None
    except (OSError, ValueError):
        return None


def _facts(root: Path, title: str, name: str, form: str, kept: dict[str, Path], lineage: dict[str, str]) -> Facts:
    def read(path: Path) -> Any:
        return read_json(path, "register the model again") if path.is_file() else {}

    teacher = read(kept["teacher"])
    return Facts(
        title=title,
        name=name,
        form=form,
        config=read(kept["model"] / "config.json"),
        teacher=teacher,
        params=read_yaml(kept["params"]) if kept["params"].is_file() else {},
        evaluation=read(kept["evaluation"]),
        lineage=lineage,
        licence=_licence(root, teacher),
    )
