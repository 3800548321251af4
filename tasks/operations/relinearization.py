"""What a scheduled re-linearization needs: its worktree, what changed since its last result, and the newest revisions.

Its worktree stays from run to run, so that DVC compares with the outputs of the last one.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lolcats_common.errors import Unavailable
from lolcats_common.files import sha256_json
from lolcats_common.params import Params, read_yaml
from lolcats_core.data import sources
from tasks.registry import promotion, register, versions
from tasks.runner.mlflow_run import connect, first_line
from tasks.versioning import dvc_graph, lock_commits, worktrees

logger = logging.getLogger(__name__)
NAME = "relinearize"
BRANCH_TAG = "lock.branch"


def prepare(root: Path, preset: str | None, values: Mapping[str, Any] | None) -> worktrees.Worktree:
    """The worktree, at HEAD and with the overrides; with `relinearize.follow_hub` at the newest revisions too.

    Raises:
        Unavailable: the hub does not answer.
        UserError: the overrides are wrong, or the project is no git checkout with a commit.
    """
    chosen = worktrees.overrides(preset, values)
    _, params = worktrees.overridden(root, read_yaml(root / "params.yaml"), chosen)
    name = f"{NAME}-{sha256_json(chosen)[:8]}" if chosen else NAME
    newest = newest_revisions(params, root) if params.relinearize.follow_hub else {}
    return worktrees.prepare(root, preset, {**(values or {}), **newest}, name)


def newest_revisions(params: Params, root: Path) -> dict[str, str]:
    """The commits at which a Hugging Face teacher and dataset stand now, as overrides.

    A teacher whose own code is trusted stays at the commit of params.yaml: nobody has read that of the newest.

    Raises:
        Unavailable: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from lolcats_core.teacher.pin import describe as describe_teacher  # loads transformers

    found: dict[str, str] = {}
    try:
        trusted = params.teacher.trust_remote_code
        if not trusted and describe_teacher(params.teacher, root, lambda file: "")["kind"] == "hub":
            found["teacher.revision"] = str(HfApi().model_info(params.teacher.source).sha)
        if sources.describe(params.data, root, lambda file: "")["kind"] == "hub":
            found["data.revision"] = str(HfApi().dataset_info(params.data.source).sha)
    except (HfHubHTTPError, OSError) as error:
        raise Unavailable(f"the newest revisions cannot be asked for: {first_line(error)}") from error
    return found


def changes(root: Path, chosen: worktrees.Worktree) -> dict[str, list[str]]:
    """What a new run would do, by stage with the reasons; empty where the last one's result still stands.

    Code, parameters, the teacher's and the text's files count; and what a run that was cut short left undone for its
    result: registration, the commit, the gates, or the promotion of what passed them.

    Raises:
        UserError: the teacher or the text is not there, or the registry cannot be used.
    """
    dvc_graph.refresh(chosen.root, chosen.environment)
    found = dvc_graph.changed(chosen.root)
    if not found:
        found |= _unfinished(root, chosen)
    return found


def _unfinished(root: Path, chosen: worktrees.Worktree) -> dict[str, list[str]]:
    """What is missing for the present result; a version that was rolled back is finished, and stays where it is."""
    client, name = connect(root), chosen.params.register.name
    version = versions.find_model(client, name, register.current_md5(chosen.root))
    if version is None:
        return {"register": ["the last result was not registered"]}
    if BRANCH_TAG not in version.tags:
        return {"commit": ["the last result was not committed"]}
    status = versions.version_status(root, name, str(version.version))
    if status.passed is None:
        return {"gates": ["the last result was not examined"]}
    if promotion.CHALLENGER in status.aliases:
        return {"promote": ["the last result passed its gates and was not promoted"]}
    return {}


def commit(root: Path, chosen: worktrees.Worktree, version: str, reasons: Mapping[str, list[str]]) -> str:
    """Commit dvc.lock and params.yaml of the run on ``relinearize/<date>``; the branch's name.

    Raises:
        Unavailable: the registry, where the version is told its branch, cannot be used.
        UserError: git refused.
    """
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    branch, name = f"{NAME}/{today}", chosen.params.register.name
    lines = [f"{stage}: {'; '.join(why)}" for stage, why in reasons.items()]
    message = f"Re-linearized: {name} version {version}\n\n" + "\n".join(lines)
    lock_commits.keep_lock(chosen.root, f"refs/heads/{branch}", message)
    promotion.set_tag(root, name, version, BRANCH_TAG, branch)
    return branch
