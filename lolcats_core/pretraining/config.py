"""Settings of the teacher's pretraining, and their command line."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from lolcats_common.errors import UserError

_PATHS = ("out", "scratch", "search_paths", "held_out")


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `lolcats teacher`. One of `max_steps` and `max_minutes` must be given.

    `out` receives the model; `scratch` keeps the corpus, the tokens and the step checkpoint between interrupted runs.
    `max_minutes` bounds the training itself: the number of steps is set from the speed measured at its start.
    `batch_rows` rows of `sequence_length` tokens make one micro-batch.
    """

    out: str
    scratch: str = ".scratch/pretrain"
    max_steps: int | None = None
    max_minutes: float | None = None
    device: str = "auto"
    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    intermediate_size: int = 768
    context: int = 2048
    sequence_length: int = 2048
    batch_rows: int = 96
    gradient_accumulation: int = 1
    copy_share: float = 0.1
    lr: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    eval_every: int = 1000
    log_every: int = 50
    compile: bool = True
    search_paths: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    tokenizer_bytes: int = 60_000_000
    evaluation_rows: int = 1024
    recall_samples: int = 64

    def __post_init__(self) -> None:
        def require(holds: bool, constraint: str, value: object) -> None:
            if not holds:
                raise UserError(f"{constraint}, got {value!r}")

        limits = (self.max_steps, self.max_minutes)
        require(sum(v is not None for v in limits) == 1, "give one of `max_steps` and `max_minutes`", limits)
        require(all(v is None or v > 0 for v in limits), "`max_steps` or `max_minutes` must be above 0", limits)
        require(300 <= self.vocab_size < 2**15, "`vocab_size` must lie in [300, 32768)", self.vocab_size)
        require(self.hidden_size % self.heads == 0, "`hidden_size` must be a multiple of `heads`", self.hidden_size)
        require(self.heads % self.kv_heads == 0, "`heads` must be a multiple of `kv_heads`", self.heads)
        require(
            16 <= self.sequence_length <= self.context,
            "`sequence_length` must lie between 16 and `context`",
            self.sequence_length,
        )
        require(0 <= self.copy_share < 1, "`copy_share` must lie in [0, 1)", self.copy_share)
        require(self.lr > 0, "`lr` must be greater than 0", self.lr)

    def without_paths(self) -> dict[str, Any]:
        """The settings that a result depends on and that mean the same on every machine."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _PATHS}

    def command(self) -> str:
        """The command line that has these settings, without paths."""
        flags = [
            f"--{field.name.replace('_', '-')} {value}"
            for field in dataclasses.fields(self)
            if field.name not in _PATHS and (value := getattr(self, field.name)) != field.default
        ]
        return " ".join(["lolcats teacher", *flags])


def config_from_arguments(arguments: list[str] | None) -> PretrainConfig:
    """One flag per field of `PretrainConfig`; exits with argparse's message on unknown or ill-typed ones.

    Raises:
        UserError: a value breaks its constraint.
    """
    parser = argparse.ArgumentParser(
        prog="lolcats teacher",
        description="Pretrain the builtin teacher on permissively licensed Python sources of installed packages.",
        epilog="One of --max-steps and --max-minutes must be given.",
    )
    hints = typing.get_type_hints(PretrainConfig)
    for field in dataclasses.fields(PretrainConfig):
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        about = _HELP.get(field.name, "default: %(default)s")
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=about)
        elif typing.get_origin(hint) is tuple:
            parser.add_argument(flag, nargs="*", default=default, metavar="DIR", help=about)
        else:
            kind = next((a for a in typing.get_args(hint) if a is not type(None)), hint)
            metavar = kind.__name__.upper()
            parser.add_argument(flag, type=kind, default=default, required=required, metavar=metavar, help=about)
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return PretrainConfig(**values)


_HELP = {
    "out": "directory that receives the model, its tokenizer and TEACHER.json",
    "scratch": "directory of corpus, tokens and step checkpoint, for continuing (default: %(default)s)",
    "max_steps": "optimiser steps",
    "max_minutes": "training time; the steps are set from the speed at the start",
    "context": "longest sequence the model's configuration states (default: %(default)s)",
    "copy_share": "share of rows that teach copying (default: %(default)s)",
    "evaluation_rows": "rows of each unseen text that the model and a bigram are measured on; 0: none of it",
    "search_paths": "directories with installed packages (default: those of this Python)",
    "held_out": "further directories whose Python files must not be trained on",
}
