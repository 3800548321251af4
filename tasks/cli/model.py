"""The commands that use a finetuned model: generate, chat, export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from lolcats_common.errors import UserError
from lolcats_common.params import load_params
from lolcats_common.project import find_root
from tasks.runner.logs import setup_logging

app = typer.Typer()
Model = Annotated[
    str | None,
    typer.Option(
        help="A model (the teacher too) or delta directory, or a registered version: candidate, 3, name@alias, name/3."
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token each time.")]


@app.command()
def generate(
    prompt: str,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Temperature = 0.0,
    seed: int = 0,
) -> None:
    """Continue PROMPT with the linearized model, token by token."""
    path = _model_path(model)
    from tasks.cli.generation import stream

    stream(path, prompt, max_new_tokens, temperature, seed)


@app.command()
def chat(
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each reply.")] = 200,
    temperature: Temperature = 0.0,
    seed: int = 0,
) -> None:
    """Talk with the linearized model: each line gets a reply, and the decode state is kept between them.

    /reset starts a new conversation, /exit ends. Without a terminal, lines come from standard input.
    """
    path = _model_path(model)
    from tasks.cli import generation

    generation.chat(path, max_new_tokens, temperature, seed)


@app.command()
def export(
    source: Annotated[
        str | None,
        typer.Argument(help="A registered version (candidate, 3, name@alias, name/3); by default the current outputs."),
    ] = None,
    form: Annotated[Literal["merged", "delta"], typer.Option(help="The whole model, or what was trained.")] = "merged",
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="exports/NAME-FORM by default.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Split the merged weights into files of at most this size, such as 5GB.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write the finetuned model with a model card: merged (loads with transformers alone) or as a delta."""
    setup_logging(logging.WARNING)
    root = find_root()
    from tasks.cli import export as exports

    print(exports.export(root, source, form=form, to=to, max_shard_size=max_shard_size, force=force))


def _model_path(model: str | None) -> Path:
    """The directory that --model names; without it, that of the finetuned model."""
    setup_logging(logging.WARNING)
    # A directory needs no project; without one, and with a registered version, there is none without it.
    path = Path(model) if model else find_root() / "outputs" / "finetune" / "model"
    if (path / "config.json").is_file() or (path / "delta.json").is_file():
        return path
    if model is None:
        raise UserError("outputs/finetune/model is missing; run `lolcats run` first, or give --model DIR")
    root = find_root()
    if path.exists():
        raise UserError(f"--model {model}: no config.json or delta.json in it, so it is no model directory")
    from tasks.registry.versions import download

    return download(root, load_params(root / "params.yaml").register.name, model)
