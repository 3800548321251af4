"""MLflow behind one small class: runs, metrics in batches, dataset inputs, figures and system metrics.

Only the MLflow client is used, never the fluent API, so that no run is active behind anyone's back. The store is
`MLFLOW_TRACKING_URI`, or ``mlflow.db`` and ``mlartifacts/`` at the project's root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
import json
import logging
import math
import os
import platform
import re
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.machine import versions
from lolcats_common.params import Params
from lolcats_common.secrets import redacted
from tasks.runner import moved_store, new_store
from tasks.runner.git import git_state
from tasks.runner.logs import quiet_libraries
from tasks.runner.servers import require_answer

logger = logging.getLogger(__name__)
EXPERIMENT = "lolcats"
# What MLflow's UI reads: an experiment's kind (training opens with runs and charts, not with traces), a description.
KIND, NOTE = "mlflow.experimentKind", "mlflow.note.content"
EXPERIMENT_TAGS = {
    KIND: "custom_model_development",
    NOTE: "Each `lolcats run` is a run with the results, named by preset, overrides and the student's perplexity over "
    "the teacher's. The runs of its stages hang from it, with their losses. `lolcats status` lists them, too.",
}
FLOW_TAG = "flow"
PARENT_VARIABLE = "LOLCATS_PARENT_RUN_ID"
PARENT_TAG = "mlflow.parentRunId"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FLUSH_SECONDS = 2.0
FLUSH_METRICS = 500  # MLflow takes at most 1000 in one call


def tracking_uri(root: Path) -> str:
    """The store's address, absolute where it is a local database and without the login of a server.

    MLflow prints a server's address; a login in it moves to the variables that MLflow and the stages read it from.

    Raises:
        UserError: the address names a store that MLflow no longer has.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{root.resolve() / uri.removeprefix('sqlite:///')}"
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI is {uri!r}, but MLflow keeps runs in a database or a server: unset it, "
            "or give sqlite:///mlflow.db or http://host:port"
        )
    return _without_login(uri) if uri.startswith(("http://", "https://")) else uri


def _without_login(uri: str) -> str:
    parts = urllib.parse.urlsplit(uri)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return uri
    user, _, password = login.partition(":")
    bare = urllib.parse.urlunsplit(parts._replace(netloc=host))
    os.environ["MLFLOW_TRACKING_USERNAME"] = urllib.parse.unquote(user)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = urllib.parse.unquote(password)
    os.environ["MLFLOW_TRACKING_URI"] = bare
    return bare


def connect(root: Path) -> Any:
    """A client of the project's store, through which no secret passes.

    Raises:
        Unavailable: the store cannot be reached.
        UserError: its address is wrong.
    """
    uri = tracking_uri(root)
    if uri.startswith(("http://", "https://")) and RETRIES not in os.environ:
        # A person waits for the first answer. Later calls, those of the stages too, wait for a server that is away for
        # a moment; where the variable is set, as a worker has it, the first one does as well.
        require_answer("MLflow", uri, "MLFLOW_TRACKING_URI", "runs then go into mlflow.db here")
        os.environ[RETRIES] = "3"
    quiet_libraries()
    import mlflow

    from tasks.runner.mlflow_client import RedactingClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints a traceback, and raises as well
    database = _database(uri)
    try:
        if database:
            new_store.ensure(database)
        # The registry's database store looks logged models up in the global address, not in its client's.
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = RedactingClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        if database:
            moved_store.follow(database, EXPERIMENT)
    except Exception as error:
        raise Unavailable(f"MLflow at {uri} cannot be used: {first_line(error)}") from error
    return client


def _database(uri: str) -> Path | None:
    """The file of a store that is a local database."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, without secrets, or its type where there is none."""
    lines = [
        line for line in redacted(str(error)).strip().splitlines() if not line.startswith("(raised as a result of")
    ]
    return lines[0] if lines else type(error).__name__


def is_missing(error: BaseException) -> bool:
    """Whether an error says that something is not there; any other may be over at the next call."""
    answer = getattr(error, "response", None)
    code = getattr(error, "error_code", None)
    return (
        code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
        or isinstance(error, FileNotFoundError)
        or getattr(answer, "status_code", None) == 404
    )


def experiment_id(client: Any) -> str:
    """The id of the store's experiment, made on first use."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        database = _database(client.tracking_uri)
        location = moved_store.artifacts_of(database).as_uri() if database else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=EXPERIMENT_TAGS))
        except Exception:  # another process made it in the meantime
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    for key, value in EXPERIMENT_TAGS.items():
        if key not in found.tags:  # one of before; what a person chose since stays
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def flatten(params: Params) -> dict[str, str]:
    """Dotted parameter names with their values as text."""
    flat = {}
    for section, values in dataclasses.asdict(params).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{section}.{key}" if key else section] = json.dumps(value) if not isinstance(value, str) else value
    return flat


def _clean(name: str) -> str:
    """A name that MLflow takes as a metric's key."""
    return re.sub(r"[^\w\-./ ]", "_", name)


class Run:
    """One MLflow run. Metrics are buffered and a store that fails for a while does not end a training run."""

    def __init__(self, client: Any, run_id: str, resumed: bool = False) -> None:
        self.client, self.id, self.resumed = client, run_id, resumed
        self._buffer: list[Any] = []
        self._last_step: dict[str, int] = {}
        self._flushed = time.monotonic()
        self._monitor: Any = None

    @classmethod
    def start(
        cls,
        root: Path,
        name: str,
        *,
        params: Params | None = None,
        resume: str | None = None,
        tags: Mapping[str, str] | None = None,
        system_metrics: bool = False,
    ) -> Run:
        """Open a run, a child of `LOLCATS_PARENT_RUN_ID` where that is set; `resume` continues one that was cut short.

        Raises:
            UserError: the store cannot be used.
        """
        client = connect(root)
        try:
            run = cls._reopen(client, resume) or cls._create(client, root, name, tags)
            if params is not None and not run.resumed:
                run._log_params(flatten(params))
        except UserError:
            raise
        except Exception as error:
            raise Unavailable(f"MLflow at {client.tracking_uri} cannot be written: {first_line(error)}") from error
        if system_metrics:
            run._start_monitor()
        return run

    @classmethod
    def _reopen(cls, client: Any, run_id: str | None) -> Run | None:
        if not run_id:
            return None
        from mlflow.exceptions import MlflowException

        try:
            found = client.get_run(run_id)
        except MlflowException as error:
            if not is_missing(error):
                raise
            logger.warning("MLflow run %s is gone; starting a new one", run_id)
            return None
        if found.info.lifecycle_stage != "active":
            return None
        client.update_run(run_id, status="RUNNING")
        parent = os.environ.get(PARENT_VARIABLE)
        if parent:
            client.set_tag(run_id, PARENT_TAG, parent)
        return cls(client, run_id, resumed=True)

    @classmethod
    def _create(cls, client: Any, root: Path, name: str, tags: Mapping[str, str] | None) -> Run:
        commit, dirty = git_state(root)
        all_tags = {
            "mlflow.user": _user(),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": f"tasks.{name}",
            "mlflow.source.git.commit": commit,
            "git.dirty": str(dirty).lower(),
            "process": process_tag(os.getpid()),
            **(tags or {}),
        }
        if parent := os.environ.get(PARENT_VARIABLE):
            all_tags[PARENT_TAG] = parent
        created = client.create_run(experiment_id(client), run_name=name, tags=all_tags)
        run = cls(client, created.info.run_id)
        with contextlib.suppress(Exception):  # a store that takes no files is said where a result is lost
            run.log_text(json.dumps(versions(), indent=2), "versions.json")
        return run

    def describe(self, text: str, name: str | None = None) -> None:
        """Give the run a description in Markdown and, with `name`, another name."""
        self.set_tags({NOTE: text})
        if name:
            self.client.update_run(self.id, name=name[:250])

    def _log_params(self, flat: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in flat.items()]
        for start in range(0, len(entities), 100):
            self.client.log_batch(self.id, params=entities[start : start + 100])

    def _start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        with contextlib.suppress(Exception):
            self._monitor = SystemMetricsMonitor(
                self.id, sampling_interval=5, resume_logging=self.resumed, tracking_uri=self.client.tracking_uri
            )
            self._monitor.start()

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Buffer `values`; a resumed run leaves out the steps it already has."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in values.items():
            key, at = _clean(name), step or 0
            if self.resumed and step is not None and at <= self._known_step(key):
                continue
            self._buffer.append(Metric(key, float(value), now, at))
        if len(self._buffer) >= FLUSH_METRICS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def _known_step(self, key: str) -> int:
        if key not in self._last_step:
            try:
                history = self.client.get_metric_history(self.id, key)
            except Exception:
                # A store that cannot be read must not end a training run: at worst a resumed run logs a point twice.
                history = []
            self._last_step[key] = max((point.step for point in history), default=-1)
        return self._last_step[key]

    def flush(self) -> None:
        """Send the buffered metrics; what a failing store refuses stays buffered."""
        self._flushed = time.monotonic()
        while self._buffer:
            chunk = self._buffer[:FLUSH_METRICS]
            try:
                self.client.log_batch(self.id, metrics=chunk)
            except Exception as error:
                logger.warning("MLflow did not take %d metrics, kept for later: %s", len(chunk), first_line(error))
                return
            del self._buffer[: len(chunk)]

    def log_figure(self, name: str, figure: Any) -> None:
        """Store a matplotlib figure as the artifact `name`."""
        self.client.log_figure(self.id, figure, name)

    def log_dataset(
        self, name: str, source: str, digest: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record a dataset input; `digest` is shortened to the 36 characters that MLflow keeps."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name[:500],
            digest=digest[:36] or hashlib.sha256(source.encode()).hexdigest()[:36],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(dict(profile)) if profile else None,
        )
        tag = InputTag("mlflow.data.context", context)
        self.client.log_inputs(self.id, datasets=[DatasetInput(dataset=dataset, tags=[tag])])

    def log_text(self, text: str, path: str) -> None:
        """Store `text` as the artifact `path`."""
        self.client.log_text(self.id, text, path)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set several tags in one call."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def finish(self, status: str = "FINISHED", message: str | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED, with the error's text as a tag."""
        if self._monitor is not None:
            with contextlib.suppress(Exception):
                self._monitor.finish()
            self._monitor = None
        self.flush()
        try:
            if message:
                self.client.set_tag(self.id, "error", message)
            self.client.set_terminated(self.id, status)
        except Exception as error:
            logger.warning("MLflow run %s could not be ended as %s: %s", self.id, status, first_line(error))


def finite(values: Mapping[str, Any], stage: str) -> dict[str, float]:
    """`values` as plain floats and ints.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    plain: dict[str, float] = {}
    for name, value in values.items():
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{stage}: metric `{name}` is {number}; training diverged, try a lower `lr`")
        plain[name] = number
    return plain


def process_tag(pid: int) -> str:
    """Names one process of one machine, now and ever; empty when it does not run."""
    import psutil

    try:
        return f"{platform.node()} {pid} {psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return ""


def close_abandoned(root: Path, name: str) -> None:
    """End runs of the flow `name` that are marked as running although their process on this machine is gone."""
    client = connect(root)
    running = client.search_runs(
        [experiment_id(client)], filter_string=f"attributes.status = 'RUNNING' and tags.{FLOW_TAG} = '{name}'"
    )
    for run in running:
        node, _, rest = run.data.tags.get("process", "").partition(" ")
        pid = rest.partition(" ")[0]
        if node == platform.node() and pid.isdigit() and process_tag(int(pid)) != f"{node} {rest}":
            logger.info("MLflow run %s was left open by a process that is gone; it counts as killed", run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
