"""The Prefect flows. Importing this package chooses Prefect's settings, which it reads when it is imported."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from lolcats_common.project import find_root
from lolcats_common.secrets import keep_secrets, redacted

P = ParamSpec("P")
R = TypeVar("R")


def project_root() -> Path:
    """The project that the working directory lies in, or else the checkout that holds this file."""
    try:
        return find_root()
    except ValueError:
        return Path(__file__).parents[1]


# A value that is already set wins.
for _name, _value in {
    "PREFECT_HOME": str(project_root() / ".prefect"),
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_name, _value)

keep_secrets()  # in a worker's process too, which Prefect starts and whose log its server keeps


def without_secrets(function: Callable[P, R]) -> Callable[P, R]:
    """For what a flow or a task runs: Prefect keeps the text of an exception as the message of the run's state."""

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except Exception as error:
            text = redacted(str(error))
            if text == str(error):
                raise
            raise RuntimeError(f"{type(error).__name__}: {text}") from error

    return wrapped
