"""The commands about a project as a whole: init, serve, ui, stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lolcats_common.project import find_root
from tasks.runner.logs import setup_logging

app = typer.Typer()


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made where it is missing.")] = Path()) -> None:
    """Lay out a project in DIR, or here: params.yaml, dvc.yaml, prefect.yaml, git and DVC."""
    setup_logging()
    from tasks.versioning import new_project

    new_project.init(folder)
    print(f"A project in {folder.resolve()}: params.yaml holds every parameter.")
    print(f"Next:  {'' if folder == Path() else f'cd {folder} && '}lolcats run")


@app.command()
def serve() -> None:
    """Start Prefect's server, a worker and MLflow's server on loopback, with the deployments of prefect.yaml."""
    root = find_root()
    from tasks.operations import services

    variables = services.start(root, say=_say)
    print(f"Prefect: {variables['PREFECT_API_URL'].removesuffix('/api')}")
    print(f"MLflow:  {variables['MLFLOW_TRACKING_URI']}")
    print(f"For `lolcats`, `prefect` and `mlflow` in a shell:  . {services.VARIABLES}")


@app.command()
def ui(
    browser: Annotated[bool, typer.Option(help="Open both pages; without it, only say where they are.")] = True,
) -> None:
    """Open MLflow's and Prefect's pages; what of the two servers does not run is started, without a worker."""
    root = find_root()
    import webbrowser

    from tasks.operations import services

    for name, url in services.pages(root, say=_say).items():
        print(f"{name + ':':<8} {url}")
        if browser:
            webbrowser.open(url)
    print("`lolcats stop` ends the servers.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def stop() -> None:
    """End what `lolcats serve` started."""
    root = find_root()
    from tasks.operations import services

    ended = services.stop(root)
    print(f"Ended: {', '.join(ended)}." if ended else "Nothing was running.")
