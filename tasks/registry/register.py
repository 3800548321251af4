"""Register the finetuned model in MLflow: log the model, create the version with its tags, then the alias.

Idempotent on (git commit, md5 of the model in dvc.lock), also where two processes register at once. A commit with the
run's dvc.lock and params.yaml is kept beside each version, so that it leads back to every byte. The model is logged as
code ("models from code") with the packages that it needs, so it loads in an environment that has torch and
transformers but not this project.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.files import read_json, sha256_tree
from lolcats_common.machine import device_tags, versions
from lolcats_common.params import Params, read_yaml
from lolcats_common.project import code_path
from lolcats_common.records import SIDES, Evaluation, RegisteredRecord
from tasks.registry import manifest
from tasks.registry.versions import ARTIFACTS, COMPLETE, number, tagged_versions
from tasks.runner.git import git_state
from tasks.runner.mlflow_run import EXPERIMENT, Run, connect, experiment_id, first_line
from tasks.versioning import dvc_graph, lock_commits

logger = logging.getLogger(__name__)
REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pyyaml", "triton")
MODEL = str(ARTIFACTS["model"])
EXAMPLE = ["def add(a, b):\n    "]


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of the registered model. `created`: false where this very model was registered before."""

    name: str
    version: str
    alias: str
    created: bool
    run_id: str | None

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}/{self.version}"

    def to_record(self) -> RegisteredRecord:
        """What the summary says."""
        return {
            "name": self.name,
            "version": self.version,
            "alias": self.alias,
            "created": self.created,
            "uri": self.uri,
        }


def register(root: Path, params: Params, parent_run_id: str | None = None) -> RegisteredVersion:
    """Register ``outputs/finetune/model`` and give the new version its alias.

    A version that an interruption left without its alias is completed. A version that already exists is returned as
    it is, its alias untouched, because someone may have moved it on purpose.

    Raises:
        Unavailable: MLflow or the DVC remote cannot be used.
        UserError: the model is missing, not the one of the current inputs, or a weight of it is no finite number.
    """
    from lolcats_core.compute.numbers import check_folder

    lock = checked_lock(root)
    check_folder(root / MODEL, MODEL)
    commit, dirty = git_state(root)
    key = {"git.commit": commit, "model.md5": _model_md5(lock)}
    client = connect(root)
    name, alias = params.register.name, params.register.alias
    try:
        existing = max(tagged_versions(client, name, key), key=number, default=None)
        if existing is not None and existing.tags.get(COMPLETE) == "complete":
            logger.info("%s version %s is this very model; nothing was registered", name, existing.version)
            return RegisteredVersion(name, str(existing.version), alias, False, existing.run_id)
        if existing is None:
            dvc_graph.push_if_remote(root)
            tags = {**key, "git.dirty": str(dirty).lower(), **_origin(root, params, lock)}
            run_id = parent_run_id or _own_run(root, params)
            if lock_commit := lock_commits.keep_lock(root, f"refs/tags/lolcats/{name}/{key['model.md5'][:12]}"):
                tags["lock.commit"] = lock_commit
            model_id, location, tags[manifest.TAG] = _log_model(client, root, run_id)
            _ensure_registered_model(client, name)
            existing = client.create_model_version(
                name, location, run_id=run_id, tags=tags, model_id=model_id, description=_description(root, params)
            )
            existing = keep_first_version(client, name, key, existing)
            if not parent_run_id:
                client.set_terminated(run_id, "FINISHED")
        version = str(existing.version)
        client.set_registered_model_alias(name, alias, version)
        client.set_model_version_tag(name, version, COMPLETE, "complete")
    except UserError:
        raise
    except Exception as error:
        raise Unavailable(
            f"registering {name} with MLflow at {client.tracking_uri} failed: {first_line(error)}; "
            "`lolcats register` tries again"
        ) from error
    return RegisteredVersion(name, version, alias, True, existing.run_id)


def checked_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock, once the outputs are there and those of the current inputs.

    Raises:
        UserError: they are not.
    """
    if not (root / MODEL / "config.json").is_file():
        raise UserError(f"{MODEL} is missing; run `dvc repro` first")
    stale = dvc_graph.changed(root, anew=True)
    if stale:
        damaged = sum(len(dvc_graph.drop_damaged(root, stage)) for stage in stale)
        because = f" ({damaged} damaged objects of DVC's cache were removed)" if damaged else ""
        raise UserError(
            f"{', '.join(stale)}: outputs are not those of the current inputs{because}; run `dvc repro` first"
        )
    return _lock(root)


def lineage(root: Path, params: Params) -> dict[str, str]:
    """What a version registered now would say about its origin.

    Raises:
        UserError: the outputs are missing or not those of the current inputs.
    """
    lock = checked_lock(root)
    commit, dirty = git_state(root)
    return {"git.commit": commit, "git.dirty": str(dirty).lower(), **_origin(root, params, lock)}


def current_md5(root: Path) -> str:
    """DVC's hash of the model that dvc.lock names.

    Raises:
        UserError: there is none.
    """
    return _model_md5(_lock(root))


def _lock(root: Path) -> dict[str, Any]:
    stages = read_yaml(root / "dvc.lock").get("stages")
    if not isinstance(stages, dict):
        raise UserError("dvc.lock holds no stages; run `dvc repro` first")
    return stages


def _model_md5(lock: Mapping[str, Any]) -> str:
    """DVC's hash of the model: as a dependency of a later stage, or else of the whole output of finetune."""
    entries = [entry for stage in lock.values() for entry in stage.get("deps") or []]
    entries += lock.get("finetune", {}).get("outs") or []
    for path in (MODEL, "outputs/finetune"):
        for entry in entries:
            if entry.get("path") == path and entry.get("md5"):
                return str(entry["md5"])
    raise UserError("dvc.lock has no hash of outputs/finetune; run `dvc repro` first")


def keep_first_version(client: Any, name: str, key: Mapping[str, str], created: Any) -> Any:
    """The version that stays where several processes registered this model at once: all keep the lowest number."""
    first = min(tagged_versions(client, name, key), key=number, default=created)
    if number(first) < number(created):
        logger.info("%s version %s is this very model, registered by another process", name, first.version)
        client.delete_model_version(name, str(created.version))
        return first
    return created


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(name, description="A transformer linearized by the LoLCATs pipeline.")
    client.get_registered_model(name)


def _description(root: Path, params: Params) -> str:
    """What a person reads of a version first."""
    text = f"Student of `{params.teacher.source}` on the text `{params.data.source}`."
    perplexity = _read(root / "outputs" / "evaluate" / "evaluation.json").get("perplexity") or {}
    teacher, student = (perplexity.get(side) for side in SIDES)
    if teacher and student:
        text += f" Perplexity {student:.4g}, {student / teacher:.4g} times the teacher's {teacher:.4g}."
    return text


def _own_run(root: Path, params: Params) -> str:
    return Run.start(root, "register", params=params, tags=device_tags()).id


def _read(path: Path) -> Any:
    """A JSON object among the outputs; empty where there is no such file."""
    return read_json(path, "run `dvc repro`") if path.is_file() else {}


def _origin(root: Path, params: Params, lock: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say where a version comes from: data, teacher, runs, versions, hardware and the main results."""
    outputs = root / "outputs"
    evaluation: Evaluation = _read(outputs / "evaluate" / "evaluation.json")
    teacher = _read(outputs / "teacher" / "teacher.json")
    tags = {
        "teacher.source": params.teacher.source,
        "teacher.revision": str(teacher.get("revision") or params.teacher.revision),
        "data.source": params.data.source,
        manifest.MODEL_TAG: sha256_tree(root / MODEL),
        "lm_eval.version": str(evaluation.get("lm_eval_version", "")),
        "lm_eval.task_hashes": json.dumps(evaluation.get("task_hashes", {}), sort_keys=True),
        **{f"version.{library}": number for library, number in versions().items()},
        **device_tags(),
    }
    for stage, entry in lock.items():
        for out in entry.get("outs") or []:
            tags[f"dvc.md5.{stage}"] = str(out.get("md5", ""))
        run_id = _read(outputs / stage / "run.json").get("run_id")
        if run_id:
            tags[f"run.{stage}"] = str(run_id)
    for step, value in (evaluation.get("perplexity") or {}).items():
        tags[f"perplexity.{step}"] = f"{value:.4f}" if isinstance(value, float) else str(value)
    for task, result in (evaluation.get("tasks") or {}).items():
        for side in SIDES:
            if side in result:
                tags[f"{task}.{side}"] = f"{result[side]['value']:.4f} ± {result[side]['stderr']:.4f}"
    return {key: value for key, value in tags.items() if value}


def _log_model(client: Any, root: Path, run_id: str) -> tuple[str, str, str]:
    """Store the model as a logged model of the run; returns its id, where it is stored, and its manifest's SHA-256."""
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    logged = client.create_logged_model(
        experiment_id(client), name=EXPERIMENT, source_run_id=run_id, model_type="linearized"
    )
    with tempfile.TemporaryDirectory(prefix="lolcats-register-") as temporary:
        local = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            path=str(local),
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
            python_model=str(Path(__file__).with_name("serving_model.py")),
            artifacts={
                name: str(_without_links(root / path, Path(temporary) / "plain" / path.name))
                for name, path in ARTIFACTS.items()
                if (root / path).exists()
            },
            code_paths=_code(root, Path(temporary) / "code"),
            pip_requirements=_requirements(),
            signature=_signature(),
            input_example=EXAMPLE,
        )
        written = manifest.keep_manifest(client, run_id, logged.model_id, local)
        client.log_model_artifacts(logged.model_id, str(local))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id), f"models:/{logged.model_id}", written


def _without_links(path: Path, copy: Path) -> Path:
    """A file or directory, copied where DVC linked it to the cache (``cache.type symlink``): MLflow takes no links."""
    if not any(part.is_symlink() for part in (path, *path.rglob("*"))):
        return path
    copy.parent.mkdir(exist_ok=True)
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    return copy


def _code(root: Path, target: Path) -> list[str]:
    """Copies of the packages that the model imports, under the names by which it imports them.

    Taken from the project (a worktree has its own), or where the installed ones lie if the project has none.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "builtin", "*.safetensors")
    packages = {"lolcats_common": "lolcats_common", "lolcats_core": "lolcats_core", "lolcats_kernels": "kernels"}
    for name, folder in packages.items():
        own = root / folder
        shutil.copytree(own if own.is_dir() else code_path(folder), target / name, ignore=ignore)
    return [str(target / name) for name in packages]


def _requirements() -> list[str]:
    """The serving packages, pinned to the installed versions (a local build tag such as ``+cpu`` left out)."""
    pinned = []
    for name in REQUIREMENTS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            pinned.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
    return pinned


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
