"""A short form of the fault campaign (tests/flows/faults.py); docs/operations.md has the counts of the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flows.faults import Campaign


@pytest.mark.slow
def test_killed_processes_lose_nothing_and_leave_nothing_half_done(fake_project: Path) -> None:
    campaign = Campaign(fake_project, seed=1)
    campaign.disturb(kills=3)
    assert sum(campaign.victims.values()) == 3
