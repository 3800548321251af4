"""Registered versions: finding one, fetching its files, and checking the stored bytes."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote, urlparse

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.files import read_json
from lolcats_common.records import Evaluation, GatesRecord
from tasks.registry.manifest import check_stored
from tasks.runner.mlflow_run import connect, first_line, is_missing

P = ParamSpec("P")
R = TypeVar("R")
# What a version keeps: the model and what `lolcats export` and `lolcats compare` need besides.
ARTIFACTS = {
    "model": Path("outputs/finetune/model"),
    "adapter": Path("outputs/finetune/adapter"),
    "evaluation": Path("outputs/evaluate/evaluation.json"),
    "samples": Path("outputs/evaluate/samples"),
    "report": Path("outputs/report/report.html"),
    "teacher": Path("outputs/teacher/teacher.json"),
    "params": Path("params.yaml"),
}
COMPLETE = "registration"  # a tag, set to "complete" after the alias, so that a version cut short is recognised
GATES_TAG, REASONS_TAG = "gates", "gates.reasons"


@dataclass(frozen=True)
class VersionStatus:
    """Gate result and aliases of a version. `passed`: None before its gates ran."""

    version: str
    passed: bool | None
    reasons: str
    aliases: tuple[str, ...]

    def to_record(self) -> GatesRecord:
        """What the summary says."""
        return {"passed": self.passed, "reasons": self.reasons, "aliases": list(self.aliases)}


def mlflow_errors_as_unavailable(function: Callable[P, R]) -> Callable[P, R]:
    """Turn an error of MLflow's, or of the system beneath it, into `Unavailable` in one line."""

    @wraps(function)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except UserError:
            raise
        except OSError as error:
            raise Unavailable(f"{function.__name__}: {error.strerror or first_line(error)}") from error
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException):
                raise
            raise Unavailable(f"{function.__name__}: MLflow failed: {first_line(error)}") from error

    return wrapped


@mlflow_errors_as_unavailable
def version_status(root: Path, name: str, which: str) -> VersionStatus:
    """Whether a version, by number or alias, passed its gates, why not, and the aliases it has.

    Raises:
        Unavailable: the store cannot be used.
        UserError: there is no such version.
    """
    return read_status(connect(root), name, which)


def read_status(client: Any, name: str, which: str) -> VersionStatus:
    """As `version_status`, of a store that is open already."""
    version = find_version(client, name, which)
    gates, reasons = version.tags.get(GATES_TAG), version.tags.get(REASONS_TAG, "")
    passed = None if gates is None else gates == "passed"
    return VersionStatus(str(version.version), passed, reasons, tuple(sorted(version.aliases)))


def alias_version(client: Any, name: str, alias: str) -> Any:
    """The version that an alias names; None where the alias or the model does not exist.

    Raises:
        Unavailable: the store does not answer.
    """
    return _ask(client.get_model_version_by_alias, name, alias)


def split_name(name: str, which: str) -> tuple[str, str]:
    """The model, `name` unless `which` says another, and the number or alias in `which`."""
    for separator in "@/":
        if separator in which:
            model, _, wanted = which.partition(separator)
            return model, wanted
    return name, which


def find_version(client: Any, name: str, which: str) -> Any:
    """A version of `name` by number or alias: ``3``, ``candidate``, ``name/3`` or ``name@candidate``.

    Raises:
        Unavailable: the store does not answer.
        UserError: there is none, or it is another model's.
    """
    model, wanted = split_name(name, which)
    if model != name:
        raise UserError(f"{which} is a version of {model}; this project's are of {name} (`register.name`)")
    found = _ask(client.get_model_version if wanted.isdigit() else client.get_model_version_by_alias, name, wanted)
    if found is None:
        raise UserError(f"{name} has no version or alias {which!r}; `lolcats status` lists them")
    return found


def _ask(question: Callable[..., Any], *arguments: str) -> Any:
    """MLflow's answer; None where it says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return question(*arguments)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise Unavailable(f"MLflow failed: {first_line(error)}") from error


def require_complete(version: Any) -> Any:
    """The version itself.

    Raises:
        UserError: its registration was cut short.
    """
    if version.tags.get(COMPLETE) != "complete":
        raise UserError(
            f"{version.name} version {version.version}: its registration was cut short; `lolcats register` completes it"
        )
    return version


def download(root: Path, name: str, which: str) -> Path:
    """The model directory of a registered version: ``3``, ``alias``, ``name/3`` or ``name@alias``.

    Raises:
        UserError: there is no such version.
    """
    return version_files(root, name, which)[1] / "model"


def version_files(root: Path, name: str, which: str) -> tuple[Any, Path]:
    """A registered version and the directory of its checked files: model, and what `ARTIFACTS` names.

    Raises:
        UserError: there is no such version, or its files are gone or not those registered.
    """
    name, wanted = split_name(name, which)
    client = connect(root)
    try:
        version = wanted if wanted.isdigit() else client.get_model_version_by_alias(name, wanted).version
        found = client.get_model_version(name, str(version))
    except Exception as error:
        if not is_missing(error):
            raise Unavailable(f"MLflow failed: {first_line(error)}") from error
        raise UserError(f"{which}: no such directory or registered version; {_registered(client)}") from error
    copy = tempfile.mkdtemp(prefix="lolcats-version-")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    return found, _checked(client, found, copy) / "artifacts"


def _registered(client: Any) -> str:
    """What there is, for a person who asked for something else."""
    found = [
        f"{model.name}@{alias} is version {number}"
        for model in client.search_registered_models()
        for alias, number in sorted((model.aliases or {}).items())
    ]
    return ", ".join(found) or "none is registered; `lolcats run` registers one"


@contextlib.contextmanager
def stored_model(client: Any, version: Any) -> Iterator[Path]:
    """The directory of a version's MLflow model, held against its manifest.

    Of a store on another machine it is a copy that ends with the block.

    Raises:
        Unavailable: the store does not answer.
        UserError: the store has no such model, or its files are not those registered.
    """
    with tempfile.TemporaryDirectory(prefix="lolcats-stored-") as temporary:
        yield _checked(client, version, temporary)


def _checked(client: Any, version: Any, copy: str) -> Path:
    """The directory of a version's MLflow model, below `copy` where the store is not on this machine.

    Every use of stored files goes through here.
    """
    import mlflow.artifacts

    try:
        location = urlparse(client.get_logged_model(version.source.rpartition("/")[2]).artifact_location)
        if location.scheme in ("", "file"):
            path = Path(unquote(location.path))
        else:
            path = Path(mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=copy))
    except Exception as error:
        kind = UserError if is_missing(error) else Unavailable
        raise kind(f"the files of {_label(version)} cannot be fetched: {first_line(error)}") from error
    if not (path / "MLmodel").is_file():
        raise UserError(f"the files of {_label(version)} are missing from the store: {path}")
    check_stored(client, version, path)
    return path


def read_evaluation(stored: Path) -> Evaluation:
    """The evaluation.json that was registered with a version.

    Raises:
        UserError: it is missing or damaged.
    """
    evaluation: Evaluation = read_json(stored / "artifacts" / "evaluation.json", "register the model again")
    return evaluation


@mlflow_errors_as_unavailable
def find_model(client: Any, name: str, md5: str) -> Any:
    """The newest completely registered version of this model, of any commit; None where there is none.

    Raises:
        Unavailable: the store does not answer.
    """
    return max(tagged_versions(client, name, {"model.md5": md5, COMPLETE: "complete"}), key=number, default=None)


def tagged_versions(client: Any, name: str, tags: Mapping[str, str]) -> list[Any]:
    """Every version that has all of these tags."""
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return [version for version in found if all(version.tags.get(tag) == value for tag, value in tags.items())]


def number(version: Any) -> int:
    """A version's number; later ones are larger."""
    return int(version.version)


def _label(version: Any) -> str:
    return f"{version.name} version {version.version}"
