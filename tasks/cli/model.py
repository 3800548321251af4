"""The commands that use a finetuned model: generate, chat, export, push."""

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
TopP = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Sample among the most probable tokens with this probability together.")
]
Penalty = Annotated[
    float, typer.Option(min=0.5, max=2.0, help="Above 1, tokens that stand in the text already become less probable.")
]


@app.command()
def generate(
    prompt: str,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: int = 0,
) -> None:
    """Continue PROMPT with the linearized model, token by token."""
    path = _model_path(model)
    from tasks.cli.generation import Sampling, stream

    stream(path, prompt, Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed))


@app.command()
def chat(
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each reply.")] = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: int = 0,
) -> None:
    """Talk with the linearized model: each line gets a reply, and the decode state is kept between them.

    /reset starts a new conversation, /exit ends. Without a terminal, lines come from standard input.
    """
    path = _model_path(model)
    from tasks.cli import generation

    generation.chat(path, generation.Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed))


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


@app.command()
def push(
    model: Annotated[
        str,
        typer.Argument(help="A registered version (champion, 3, name@alias, name/3) or an export's directory."),
    ],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    form: Annotated[Literal["merged", "delta"], typer.Option(help="Of a registered version.")] = "merged",
    private: Annotated[bool, typer.Option(help="Of a repository that is made now.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and send nothing.")] = False,
) -> None:
    """Put a model with its card on the Hugging Face hub; the token is that of HF_TOKEN or `hf auth login`."""
    setup_logging(logging.WARNING)
    from tasks.cli import push as pushing

    done = pushing.push(model, repo, form=form, private=private, dry_run=dry_run)
    for name, size in done.files.items():
        print(f"  {size:>15,}  {name}")
    total = f"{len(done.files)} files, {sum(done.files.values()) / 2**20:,.1f} MiB"
    print(f"{total}: {done.url}" if done.url else f"{total} would go to {repo}; nothing was sent.")


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
