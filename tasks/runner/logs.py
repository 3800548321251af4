"""Logging of the command line and the stages: rich on a terminal, plain lines otherwise, noisy libraries quieted."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from lolcats_common.secrets import keep_secrets

QUIET = (
    "alembic",
    "datasets",
    "filelock",
    "fsspec",
    "git",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "mlflow",
    "PIL",
    "sqlalchemy",
    "torch",
    "transformers",
    "urllib3",
)


def setup_logging(level: int = logging.INFO) -> None:
    """Send log records to standard error once, without secrets; a later call replaces the handler."""
    keep_secrets()
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%X")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    quiet_libraries()


def quiet_libraries() -> None:
    """Defaults of the environment that the libraries read when they are imported; a value already set is kept."""
    for name, value in {
        "DO_NOT_TRACK": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)


def quiet_progress_bars() -> None:
    """No bars of transformers ("Loading weights") between ours; only where it is loaded already."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
