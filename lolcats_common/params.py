"""The pipeline's parameters: params.yaml is read here and nowhere else.

Every section is a frozen dataclass. An unknown key, a wrong type or a broken constraint ends in one `ParamsError`
that names the key, what it must be and the value given.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lolcats_common.errors import ParamsError, shown
from lolcats_common.errors import require as _require
from lolcats_common.files import DEEPEST, load_yaml
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.operation_params import GatesParams, RelinearizeParams
from lolcats_common.project import HOME
from lolcats_common.secrets import holds_login
from lolcats_common.training_params import FinetuneParams, SelectParams, TransferParams

PRESETS = HOME / "presets"
# A path may be so long. Lone surrogates stand for bytes of a command line that are not UTF-8.
_LONGEST, _UNPRINTABLE = 4096, re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class ComputeParams:
    """`device`: auto, cpu, cuda or cuda:N. `precision`: dtype of frozen weights and activations.

    `processes`: how many work on a training stage together, on CUDA each with a GPU of its own. `offload_activations`:
    keep what stage 2's backward pass needs in the machine's memory.
    """

    device: str = "auto"
    processes: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    offload_activations: bool = False

    def __post_init__(self) -> None:
        _require(1 <= self.processes <= 128, "`processes` must be from 1 to 128", self.processes)
        known = self.device in ("auto", "cpu", "cuda") or self.device.removeprefix("cuda:").isdigit()
        _require(known, "`device` must be auto, cpu, cuda or cuda:N", self.device)


@dataclass(frozen=True)
class TeacherParams:
    """`source`: ``builtin``, a directory, a .gguf file, or a Hugging Face id (then `revision` pins the commit)."""

    source: str = "builtin"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _require(
            bool(self.source.strip()),
            "`source` must be builtin, a path or a Hugging Face id",
            self.source,
        )


@dataclass(frozen=True)
class DataParams:
    """Where text comes from and how it becomes token rows.

    `source`: ``builtin`` (the Python standard library's sources), a file, directory or glob of .jsonl, .json,
    .parquet, .txt or .py files, or a Hugging Face dataset id with `revision`. `loss_on: completion` scores only the
    response of Alpaca and chat records. `packing`: ``concatenated`` as published, or ``documents`` (no token attends
    across).
    `position_range`: every other training row stands at random positions below it, so that a student that will read
    longer texts has seen their positions; null: all from 0 on, as published.
    """

    source: str = "builtin"
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    format: Literal["auto", "text", "alpaca", "messages"] = "auto"
    loss_on: Literal["all", "completion"] = "all"
    sequence_length: int = 512
    packing: Literal["concatenated", "documents"] = "concatenated"
    position_range: int | None = None
    validation_share: float = 0.05
    max_rejected_share: float = 0.01
    max_record_bytes: int = 4_000_000
    max_train_tokens: int | None = None
    max_validation_tokens: int | None = None

    def __post_init__(self) -> None:
        _require(bool(self.source.strip()), "`source` must be builtin, a path or a dataset id", self.source)
        _require(self.sequence_length >= 8, "`sequence_length` must be at least 8", self.sequence_length)
        _require(0 < self.validation_share < 1, "`validation_share` must lie in (0, 1)", self.validation_share)
        _require(0 <= self.max_rejected_share <= 1, "`max_rejected_share` must lie in [0, 1]", self.max_rejected_share)
        _require(self.max_record_bytes >= 1, "`max_record_bytes` must be at least 1", self.max_record_bytes)
        _require(
            self.position_range is None or self.position_range >= self.sequence_length,
            f"`position_range` must be null or at least `sequence_length` {self.sequence_length}",
            self.position_range,
        )
        for name in ("max_train_tokens", "max_validation_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"`{name}` must be null or at least 1", value)


@dataclass(frozen=True)
class EvaluateParams:
    """What teacher and student are measured on.

    `tasks`: lm-eval tasks by name (the project's own: code_continuation, and copy, mqar, passkey, needle and RULER's
    ruler_single_1 to 3, ruler_multikey, ruler_multivalue, ruler_multiquery, ruler_tracking with `synthetic_samples`
    items of each of `synthetic_lengths` tokens and three depths). `task_limit`: items per task. `num_fewshot`: examples
    before each question by task; otherwise what the task says. `long_rows`: rows of eight times the training length, as
    far as the teacher's context goes, whose loss is taken by position. `audit_rows`: rows that the branches are
    switched off on. Each of `long_rows`, `generation_prompts` and `audit_rows` may be 0. `control`: whether the plain
    window beside the student takes stage 2 as the student does (``trained``), which costs as much again, or nothing.
    """

    batch_size: int = 8
    max_perplexity_rows: int | None = None
    recall_gaps: tuple[int, ...] = (128, 256)
    recall_samples: int = 32
    tasks: tuple[str, ...] = ("code_continuation",)
    task_limit: int | None = None
    num_fewshot: Mapping[str, int] = field(default_factory=dict, hash=False)
    synthetic_lengths: tuple[int, ...] = (256, 1024)
    synthetic_samples: int = 8
    long_rows: int = 8
    generation_prompts: int = 16
    generation_tokens: int = 128
    audit_rows: int = 8
    control: Literal["untrained", "trained"] = "untrained"

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "`batch_size` must be at least 1", self.batch_size)
        _require(self.recall_samples >= 1, "`recall_samples` must be at least 1", self.recall_samples)
        _require(all(gap >= 8 for gap in self.recall_gaps), "`recall_gaps` must each be at least 8", self.recall_gaps)
        for name in ("synthetic_samples", "generation_tokens"):
            _require(getattr(self, name) >= 1, f"`{name}` must be at least 1", getattr(self, name))
        for name in ("long_rows", "generation_prompts", "audit_rows"):
            _require(getattr(self, name) >= 0, f"`{name}` must be at least 0", getattr(self, name))
        _require(all(n >= 0 for n in self.num_fewshot.values()), "`num_fewshot` must be at least 0", self.num_fewshot)
        for name in ("max_perplexity_rows", "task_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"`{name}` must be null or at least 1", value)


# Aliases that say what became of a version: `tasks.registry.promotion` sets them after the gates, MLflow the last.
RESERVED_ALIASES = ("challenger", "champion", "previous", "latest")


@dataclass(frozen=True)
class RegisterParams:
    """`name`: the registered model. `alias`: given to each new version."""

    name: str = "lolcats-demo"
    alias: str = "candidate"

    def __post_init__(self) -> None:
        for key, value in (("name", self.name), ("alias", self.alias)):
            # MLflow's address, filters and folders are made of it.
            clean = len(value) <= 100 and re.fullmatch(r"\w([\w +-]*\w)?", value)
            _require(bool(clean), f"`{key}` must be a name of at most 100 letters, digits, spaces, + _ or -", value)
        # The gates and the promotion alone move these; a number, or v with one, is MLflow's way to name a version.
        free = self.alias.lower() not in RESERVED_ALIASES and not re.fullmatch(r"[vV]?\d+", self.alias)
        # Letters of other alphabets look like those of an alias that the gates decide.
        _require(self.alias.isascii(), "`alias` must be of ASCII letters, digits, spaces, + _ or -", self.alias)
        reserved = ", ".join(RESERVED_ALIASES)
        _require(free, f"`alias` must be another name than {reserved} and the number of a version", self.alias)


@dataclass(frozen=True)
class Params:
    """All of params.yaml."""

    seed: int = 0
    compute: ComputeParams = field(default_factory=ComputeParams)
    teacher: TeacherParams = field(default_factory=TeacherParams)
    data: DataParams = field(default_factory=DataParams)
    linearize: LinearizeConfig = field(default_factory=LinearizeConfig)
    transfer: TransferParams = field(default_factory=TransferParams)
    select: SelectParams = field(default_factory=SelectParams)
    finetune: FinetuneParams = field(default_factory=FinetuneParams)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)
    register: RegisterParams = field(default_factory=RegisterParams)
    gates: GatesParams = field(default_factory=GatesParams)
    relinearize: RelinearizeParams = field(default_factory=RelinearizeParams)

    def __post_init__(self) -> None:
        calibrated = self.linearize.feature_map_init == "calibrated"
        text = "`linearize.feature_map_init: calibrated` needs `transfer.enabled`, which calibrates"
        _require(self.transfer.enabled or not calibrated, text, self.transfer.enabled)


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check the parameters.

    Raises:
        ParamsError: the file is missing or not YAML, or a key is unknown, ill-typed or out of range.
    """
    return params_from_dict(read_yaml(path), source=str(path))


def params_from_dict(values: dict[str, Any], source: str = "params.yaml") -> Params:
    """Build `Params` from plain values; `source` names them in errors."""
    return typing.cast(Params, _build(Params, values, path="", source=source))


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ParamsError: missing, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the project's root or name the file") from None
    except IsADirectoryError:
        raise ParamsError(f"{path}: is a directory, a YAML file was expected") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 at byte {error.start}") from None
    values = load_yaml(text, f"{path}")
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: must hold a mapping of sections, got {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy of nested `values` with overrides laid over it; keys may be dotted (``transfer.lr``) or nested.

    Raises:
        ParamsError: they are nested deeper (`depth`) than any parameter.
    """
    if depth > DEEPEST:
        raise ParamsError(f"overrides must be nested at most {DEEPEST} deep")
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key, value in overrides.items():
        section, _, rest = str(key).partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict) and isinstance(merged.get(section, {}), dict):
            merged[section] = apply_overrides(merged.get(section, {}), value, depth + 1)
        else:
            merged[section] = value
    return merged


def read_assignments(entries: Iterable[str]) -> dict[str, Any]:
    """Overrides written as ``KEY=VALUE`` on a command line, with the value read as YAML.

    Raises:
        ParamsError: an entry has no ``=``, or its value is not YAML.
    """
    values = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            raise ParamsError(f"`--set` takes KEY=VALUE, such as transfer.lr=0.005, got {entry!r}")
        values[key.strip()] = load_yaml(text, f"`--set {key.strip()}`: the value")
    return values


def presets() -> dict[str, Path]:
    """Name and file of each preset of a model; the recipe that they extend is none by itself."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml")) if path.stem != "published"}


def read_preset(name: str) -> dict[str, Any]:
    """Overrides of one preset, laid over those of the recipe that its `extends` names.

    Raises:
        ParamsError: no preset has that name.
    """
    known = presets()
    if not isinstance(name, str) or name not in known:
        raise ParamsError(f"unknown preset {name!r}{_nearest(name, known)}; presets: {', '.join(known)}")
    values = read_yaml(known[name])
    return apply_overrides(read_yaml(PRESETS / f"{values.pop('extends')}.yaml"), values)


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name that a person may have meant: its abbreviation, its words, or its letters."""
    section, _, key = str(name).rpartition(".")
    known, words = list(known), key.split("_")
    short = [f"{section}.{''.join(word[:1] for word in words)}"] if len(words) > 1 else []
    typo = difflib.get_close_matches(name, known, 1, 0.9)
    fewer = [each for each in known if set(each.rpartition(".")[2].split("_")) <= set(words)]
    close = [each for each in short if each in known] or typo or fewer or difflib.get_close_matches(name, known, 1, 0.0)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _dotted(cls: type, prefix: str = "") -> list[str]:
    """Every key of params.yaml as ``section.key``."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        keys += _dotted(typing.cast(type, hint), f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def _build(cls: type, values: Any, path: str, source: str) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ParamsError(f"{source}: `{path}` must be a mapping, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    given = {}
    for key, value in values.items():
        if key not in fields:
            near = (
                [known for known in _dotted(Params) if known.startswith(prefix)]
                if prefix
                else [*fields, *_dotted(Params)]
            )
            raise ParamsError(f"{source}: unknown key `{prefix}{key}`{_nearest(f'{prefix}{key}', near)}")
        given[key] = _coerce(hints[key], value, f"{prefix}{key}", source)
    try:
        return cls(**given)
    except ValueError as error:
        raise ParamsError(f"{source}: {path}: {error}") from None


def _coerce(hint: Any, value: Any, path: str, source: str) -> Any:
    def refuse(expected: str) -> ParamsError:
        return ParamsError(f"{source}: `{path}` must be {expected}, got {shown(value)}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path, source)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, path, source)
    if origin is Literal:
        if value not in args:
            raise refuse("one of " + ", ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise refuse("a list")
        return tuple(_coerce(args[0], item, f"{path}[{i}]", source) for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise refuse("a mapping")
        # Keys come as numbers from YAML and as text from JSON and dotted overrides; the section's class reads both.
        return {key: _coerce(args[1], item, f"{path}.{key}", source) for key, item in value.items()}
    if hint is bool:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse("a whole number")
        if not -(2**63) <= value < 2**63:
            raise refuse("a whole number of at most 64 bits")
        return value
    if hint is float:
        # PyYAML reads 1e-2 (no dot) as a string; a person means a number.
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or number != number or number in (float("inf"), float("-inf")):
            raise refuse("a finite number")
        return number
    if not isinstance(value, str):
        raise refuse("text")
    if len(value) > _LONGEST or _UNPRINTABLE.search(value):
        raise refuse(f"text of at most {_LONGEST} characters, without line breaks and control characters, in UTF-8")
    if holds_login(value):  # it would stand in git, dvc.lock, every worktree and the registered model
        raise ParamsError(
            f"{source}: `{path}` must hold no login, which belongs in the environment, got {shown(value)}"
        )
    return value
