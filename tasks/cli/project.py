"""The commands about a project as a whole: init, serve, stop."""

from __future__ import annotations

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

    variables = services.start(root)
    print(f"Prefect: {variables['PREFECT_API_URL'].removesuffix('/api')}")
    print(f"MLflow:  {variables['MLFLOW_TRACKING_URI']}")
    print(f"For `lolcats`, `prefect` and `mlflow` in a shell:  . {services.VARIABLES}")


@app.command()
def stop() -> None:
    """End what `lolcats serve` started."""
    root = find_root()
    from tasks.operations import services

    ended = services.stop(root)
    print(f"Ended: {', '.join(ended)}." if ended else "Nothing was running.")
