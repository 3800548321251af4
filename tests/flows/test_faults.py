"""A short form of the fault campaign (tests/flows/faults.py); docs/operations.md has the counts of the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.processes import end_group
from tests.flows.faults import Campaign, PrefectServer


@pytest.mark.slow
def test_killed_processes_lose_nothing_and_leave_nothing_half_done(
    fake_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server of its own: one that a flow starts for itself outlives that flow's sudden death.
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "2")
    server = PrefectServer(tmp_path)
    try:
        campaign = Campaign(fake_project, seed=1, server=server)
        campaign.disturb(kills=3)
    finally:
        end_group(server.process, 5)
    assert sum(campaign.victims.values()) == 3
