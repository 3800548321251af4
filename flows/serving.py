"""The Prefect flows `promote` and `rollback`: which version serves, as `lolcats promote` and `lolcats rollback` do."""

from __future__ import annotations

from prefect import flow

from flows import project_root, without_secrets
from flows.delivery import promote_version, roll_back
from lolcats_common.params import load_params
from tasks.registry.promotion import CHALLENGER


@flow(name="promote", flow_run_name="promote {version}")
@without_secrets
def promote(version: str = CHALLENGER) -> str:
    """Make a version (a number or an alias) that passed its gates the champion; its number.

    Raises:
        UserError: it does not exist, or did not pass.
    """
    root = project_root()
    return promote_version(root, load_params(root / "params.yaml").register.name, version).version


@flow(name="rollback", flow_run_name="rollback to the previous champion")
@without_secrets
def rollback() -> str:
    """Let the previous champion serve again; its number.

    Raises:
        UserError: there is none.
    """
    root = project_root()
    serving, _ = roll_back(root, load_params(root / "params.yaml").register.name)
    return serving
