"""The command line `lolcats`. Heavy libraries are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from tasks.cli import registry
from tasks.runner.logs import setup_logging

if TYPE_CHECKING:
    from lolcats_common.params import Params

F = TypeVar("F", bound=Callable[..., Any])
app = typer.Typer(
    name="lolcats",
    help="Linearize pretrained transformers with LoLCATs: a tracked, resumable pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Preset = Annotated[str | None, typer.Option(help="Name of a preset in presets/, laid over params.yaml.")]
Model = Annotated[
    str | None,
    typer.Option(help="A model or delta directory, or a registered version: candidate, 3, name@alias, name/3."),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token each time.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One parameter, such as transfer.lr=0.005.")
]


def find_root() -> Path:
    """`lolcats_common.project.find_root`; `lolcats_core` brings torch with it, so nothing of it is imported above."""
    from lolcats_common.project import find_root as find

    return find()


def _one_line_errors(command: F) -> F:
    """A `UserError` becomes one line and exit code 1, SIGTERM 143 and Ctrl-C 130."""

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from lolcats_common.errors import UserError
        from tasks.runner.stage import Terminated, raise_terminated

        signal.signal(signal.SIGTERM, raise_terminated)
        try:
            return command(*arguments, **options)
        except UserError as error:
            print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(1) from None
        except Terminated:
            print("Ended by SIGTERM; the same command continues from the last checkpoint.", file=sys.stderr)
            raise typer.Exit(143) from None
        except KeyboardInterrupt:
            print("Interrupted; the same command continues from the last checkpoint.", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped  # type: ignore[return-value]


def _parse_overrides(given: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` with the value read as YAML.

    Raises:
        UserError: an entry has no ``=``, or its value is not YAML.
    """
    import yaml

    from lolcats_common.errors import UserError

    values = {}
    for entry in given or []:
        key, equals, text = entry.partition("=")
        if not equals or not key.strip():
            raise UserError(f"`--set` takes KEY=VALUE, such as transfer.lr=0.005, got {entry!r}")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"`--set {key.strip()}`: the value is not valid YAML, got {text!r}") from None
    return values


@app.command()
@_one_line_errors
def run(
    preset: Preset = None,
    set: Overrides = None,
    register: Annotated[bool, typer.Option(help="Register the finetuned model in MLflow.")] = True,
) -> None:
    """Run the whole pipeline; what has not changed is reused.

    Without --preset and --set it runs params.yaml here; with them, in a worktree of its own as a DVC experiment.
    """
    from tasks.runner import processes

    if not processes.supervised():
        raise typer.Exit(processes.supervise(processes.this_command()))
    setup_logging()
    for name in ("PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL"):
        os.environ.setdefault(name, "CRITICAL")  # errors are said once, in one line
    root = find_root()
    from lolcats_common.params import load_params

    load_params(root / "params.yaml")
    from flows.linearize import main as run_flow

    run_flow(preset=preset, set=_parse_overrides(set) or None, register=register)


@app.command()
@_one_line_errors
def status() -> None:
    """Show each stage's state, the newest runs and the registered versions."""
    setup_logging(logging.WARNING)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lolcats_common.params import load_params
    from tasks.runner.mlflow_run import connect, experiment_id
    from tasks.versioning import dvc_graph

    root = find_root()
    params = load_params(root / "params.yaml")
    changed = dvc_graph.changed(root)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    stages = Table("stage", "state", "why", title="Stages", title_justify="left", box=box.SIMPLE_HEAD)
    for name in dvc_graph.stages(root):
        stages.add_row(name, "would run" if name in changed else "up to date", "; ".join(changed.get(name, [])))
    client = connect(root)
    runs = Table("run", "status", "started", "id", title="Newest runs", title_justify="left", box=box.SIMPLE_HEAD)
    for found in client.search_runs([experiment_id(client, root)], max_results=10):
        runs.add_row(found.info.run_name, found.info.status, _moment(found.info.start_time), found.info.run_id)
    versions = Table("model", "version", "alias", "created", title="Registered", title_justify="left")
    versions.box = box.SIMPLE_HEAD
    for model in client.search_registered_models():
        aliases: dict[str, list[str]] = {}
        for alias, number in (model.aliases or {}).items():
            aliases.setdefault(str(number), []).append(alias)
        for version in client.search_model_versions(f"name = '{model.name}'", max_results=10):
            number = str(version.version)
            moment = _moment(version.creation_timestamp)
            versions.add_row(model.name, number, ", ".join(aliases.get(number, [])), moment)
    console.print(stages)
    console.print(runs)
    console.print(versions if versions.row_count else f"{params.register.name} is not registered yet.")


def _moment(milliseconds: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")


@app.command()
@_one_line_errors
def generate(
    prompt: str,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Temperature = 0.0,
    seed: int = 0,
) -> None:
    """Continue PROMPT with the linearized model, token by token."""
    setup_logging(logging.WARNING)
    path = _model_path(find_root(), model)
    from tasks.cli.generation import stream

    stream(path, prompt, max_new_tokens, temperature, seed)


@app.command()
@_one_line_errors
def chat(
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each reply.")] = 200,
    temperature: Temperature = 0.0,
    seed: int = 0,
) -> None:
    """Talk with the linearized model: each line gets a reply, and the decode state is kept between them.

    /reset starts a new conversation, /exit ends. Without a terminal, lines come from standard input.
    """
    setup_logging(logging.WARNING)
    path = _model_path(find_root(), model)
    from tasks.cli.generation import chat as converse

    converse(path, max_new_tokens, temperature, seed)


@app.command()
@_one_line_errors
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
    from tasks.cli.export import export as write

    print(write(root, source, form=form, to=to, max_shard_size=max_shard_size, force=force))


def _model_path(root: Path, model: str | None) -> Path:
    from lolcats_common.errors import UserError

    path = Path(model) if model else root / "outputs" / "finetune" / "model"
    if (path / "config.json").is_file() or (path / "delta.json").is_file():
        return path
    if model is None:
        raise UserError("outputs/finetune/model is missing; run `lolcats run` first, or give --model DIR")
    if path.exists():
        raise UserError(f"--model {model}: no config.json or delta.json in it, so it is no model directory")
    from lolcats_common.params import load_params
    from tasks.registry.versions import download

    return download(root, load_params(root / "params.yaml").register.name, model)


@app.command("register")
@_one_line_errors
def register_command() -> None:
    """Register outputs/finetune/model in MLflow unless this very model is registered already."""
    setup_logging()
    from lolcats_common.params import load_params
    from tasks.registry.register import register

    root = find_root()
    done = register(root, load_params(root / "params.yaml"))
    print(f"{done.name} version {done.version}, alias {done.alias}" + ("" if done.created else " (already registered)"))


@app.command()
@_one_line_errors
def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A version (3, candidate, name@alias), current, or a directory.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="As A; the champion by default.")] = "champion",
) -> None:
    """Put two evaluated students side by side; tasks are paired item by item, so that noise shows as noise."""
    setup_logging(logging.WARNING)
    root = find_root()
    from lolcats_common.params import load_params
    from tasks.studies.compare import compare as put_beside
    from tasks.studies.compare import load, show

    name = load_params(root / "params.yaml").register.name
    show(put_beside(load(root, name, first), load(root, name, second)))


@app.command()
@_one_line_errors
def ablate(
    preset: Preset = None,
    set: Overrides = None,
    section: Annotated[
        list[str] | None,
        typer.Option(help="grid, lora_rank, projections, window_size, transfer_steps, softmax_layers; all by default."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each stage of each row.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    eval_rows: Annotated[int, typer.Option(min=1, help="Validation rows that perplexity is measured on.")] = 12,
) -> None:
    """Run the paper's ablation on the project's teacher and say whether its ordering holds; continues where it was.

    An hour on two cores for the demo's teacher. A larger one needs a GPU and more --steps.
    """
    setup_logging()
    root = find_root()
    from lolcats_core.experiments.ablation import SECTIONS, Budget
    from lolcats_core.experiments.ablation_report import markdown
    from tasks.studies.ablate import ablate as run_rows

    budget = Budget(steps=steps, batch_size=batch_size, eval_rows=eval_rows)
    work, params, environment = _work(root, preset, set)
    report = run_rows(work, params, budget, section or SECTIONS, environment, store=root)
    print(f"\n{markdown(report)}\nWritten to reports/ablation.md and reports/ablation.json.")


@app.command()
@_one_line_errors
def frontier(
    preset: Preset = None,
    set: Overrides = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share of the kv cache that stays; 0, 0.1, 0.25 and 0.5 by default.")
    ] = None,
    finetune: Annotated[bool, typer.Option(help="Stage 2 at each of them as well.")] = True,
) -> None:
    """Measure perplexity and recall against the size of the cache; continues where it was."""
    setup_logging()
    root = find_root()
    from tasks.studies.frontier import RATIOS, markdown
    from tasks.studies.frontier import frontier as measure

    work, params, environment = _work(root, preset, set)
    report = measure(work, params, ratio or RATIOS, finetune=finetune, environment=environment, store=root)
    print(f"\n{markdown(report)}\nWritten to reports/frontier.md, .json and .png.")


def _work(root: Path, preset: str | None, overrides: list[str] | None) -> tuple[Path, Params, Mapping[str, str]]:
    """Checkout, parameters and environment of a command that takes overrides: with any, a worktree of its own."""
    from lolcats_common.params import load_params
    from tasks.versioning import worktrees

    values = _parse_overrides(overrides)
    if preset or values:
        chosen = worktrees.prepare(root, preset, values)
        return chosen.root, chosen.params, chosen.environment
    return root, load_params(root / "params.yaml"), {}


@app.command()
@_one_line_errors
def doctor(preset: Preset = None, set: Overrides = None) -> None:
    """Say what a run will need (memory, disk, time, access) and what is missing; exit code 1 if something is."""
    setup_logging(logging.WARNING)
    root = find_root()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lolcats_common.params import read_yaml
    from lolcats_core.estimation.doctor import doctor as examine
    from tasks.versioning import worktrees

    chosen = worktrees.overrides(preset, _parse_overrides(set))
    _, params = worktrees.overridden(root, read_yaml(root / "params.yaml"), chosen)
    findings = examine(params, root)
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    colours = {"ok": "green", "info": "cyan", "warn": "yellow", "missing": "red"}
    for finding in findings:
        table.add_row(f"[{colours[finding.status]}]{finding.status}[/]", finding.name, finding.detail)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
@_one_line_errors
def plan(
    preset: Preset = None,
    tokens: Annotated[str, typer.Option(help="Trained in each stage, all epochs together, such as 20M.")] = "20M",
    gpus: Annotated[str, typer.Option(help="Such as 1xh200 or 8xh100.")] = "1xh200",
    set: Overrides = None,
) -> None:
    """Memory, disk and hours of each way to run both training stages, and the best on these GPUs."""
    setup_logging(logging.WARNING)
    root = find_root()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lolcats_common.errors import UserError
    from lolcats_common.params import read_yaml
    from lolcats_core.estimation import cost as costs
    from lolcats_core.estimation.doctor import duration, model_shape
    from lolcats_core.estimation.memory import GIB
    from tasks.versioning import worktrees

    chosen = worktrees.overrides(preset, _parse_overrides(set))
    _, params = worktrees.overridden(root, read_yaml(root / "params.yaml"), chosen)
    shape = model_shape(params, root)
    if shape is None:
        raise UserError(f"the shape of {params.teacher.source} is unknown until its config.json can be read")
    count, kind = costs.parse_gpus(gpus)
    columns = ("stage", "mode", "GiB per GPU", "GiB of memory", "GiB of disk", "time", "")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for choice in costs.plan(params, shape, costs.parse_tokens(tokens), count, kind):
        sizes = (f"{size / GIB:,.1f}" for size in (choice.memory, choice.host, choice.disk))
        note = "best" if choice.best else "" if choice.fits else "does not fit"
        table.add_row(choice.stage, choice.mode, *sizes, duration(choice.seconds), note)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    known = costs.GPUS[kind]
    source = "measured" if known.measured else "70 % of the datasheet's, not measured"
    print(f"{kind}: {known.rate / 1e12:.0f} TFLOP/s ({source}); estimates, see docs/scale.md")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Pretrain the built-in teacher (`lolcats teacher --help` lists the options).",
)
@_one_line_errors
def teacher(context: typer.Context) -> None:
    setup_logging()
    from lolcats_core.pretraining.pretrain import main as pretrain

    raise typer.Exit(pretrain(context.args))


registry.add_to(app, _one_line_errors)


def main() -> None:
    """Entry point of the program `lolcats`."""
    app()


if __name__ == "__main__":
    main()
