"""The Prefect flows. Importing this package chooses Prefect's settings, which it reads when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

from lolcats_common.project import find_root
from lolcats_common.secrets import keep_secrets


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
