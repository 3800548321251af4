"""MLflow's client as this project uses it: whatever is written as text is written without secrets.

Importing it loads MLflow, which takes seconds; `tasks.runner.mlflow_run.connect` does so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

from lolcats_common.secrets import redacted

# mypy: disable-error-code="override"
# The methods below take less than MLflow's do: what this project gives.
# Characters of a value that MLflow takes; cut after the secrets are masked, so that no half of one stays.
TAG, PARAM = 5000, 6000


class RedactingClient(MlflowClient):
    """An `MlflowClient` through which no secret passes, whoever writes; longer tags and parameters are cut."""

    def create_run(
        self, experiment_id: str, *, run_name: str | None = None, tags: Mapping[str, str] | None = None, **named: Any
    ) -> Any:
        """As MLflow's."""
        called = run_name and redacted(run_name)
        return super().create_run(experiment_id, run_name=called, tags=_tags(tags), **named)

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        """As MLflow's."""
        super().update_run(run_id, status, name and redacted(name))

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> Any:
        """As MLflow's."""
        plain = [Param(each.key, redacted(each.value)[:PARAM]) for each in params]
        return super().log_batch(run_id, metrics, plain, [RunTag(each.key, _tag(each.value)) for each in tags])

    def log_inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        """As MLflow's."""
        super().log_inputs(run_id, [DatasetInput(_dataset(each.dataset), each.tags) for each in datasets])

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """As MLflow's."""
        super().log_text(run_id, redacted(text), artifact_file)

    def set_tag(self, run_id: str, key: str, value: str) -> Any:
        """As MLflow's."""
        return super().set_tag(run_id, key, _tag(value))

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        """As MLflow's."""
        super().set_registered_model_tag(name, key, _tag(value))

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """As MLflow's."""
        super().set_model_version_tag(name, version, key, _tag(value))

    def create_model_version(
        self,
        name: str,
        source: str,
        *,
        tags: Mapping[str, str] | None = None,
        description: str | None = None,
        **named: Any,
    ) -> Any:
        """As MLflow's."""
        told = description and redacted(description)
        return super().create_model_version(name, source, tags=_tags(tags), description=told, **named)


def _tag(value: str) -> str:
    return redacted(str(value))[:TAG]


def _tags(tags: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if tags is None else {key: _tag(value) for key, value in tags.items()}


def _dataset(dataset: Dataset) -> Dataset:
    return Dataset(
        name=redacted(dataset.name),
        digest=dataset.digest,
        source_type=dataset.source_type,
        source=redacted(dataset.source),
        profile=dataset.profile,
    )
