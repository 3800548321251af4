"""The fault campaign: the processes of a served project are killed at random; nothing may be lost or half-done.

``python -m tests.flows.faults --kills 50`` runs it and prints its counts; with ``--real`` over the demo's own stages on
a tiny teacher, otherwise over stages that count to eight. Servers, worker, flow, DVC and stages are killed (SIGKILL)
while a re-linearization runs; what was killed comes back as it does in operation: a flow through the automations, a
service through `make serve`, which a service manager would call.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from lolcats_common.files import sha256_file, sha256_tree
from lolcats_common.params import apply_overrides
from tasks.operations.services import SERVICES
from tasks.registry.promotion import CHAMPION, PREVIOUS
from tasks.registry.versions import COMPLETE, alias_version, stored_model
from tasks.runner.mlflow_run import connect
from tests.conftest import forget_store, make_fake_project, run_git
from tests.e2e.test_pipeline import make_project
from tests.flows.operations import OVER, Servers, operate, serving
from tests.tasks.processes import processes_in, wait_for

NIGHTLY = "relinearize/nightly"
GOOD = {"Promoted", "UpToDate"}
SIGNS = {"-m prefect.engine": "flow", "-m dvc": "dvc", "fake.py": "stage", "tasks.": "stage", "gate_probe": "gate"}
RESUME_SECONDS = 20.0  # within which Prefect starts a crashed run again


@dataclass
class Project:
    """A project to be operated: its root, how its text changes, and whether a worktree was made from the present text.

    `steps`: tasks of a run in which everything changed.
    """

    root: Path
    name: str
    change: Callable[[int], None]
    current: Callable[[Path], bool]
    steps: int


def fake_stages(root: Path) -> Project:
    """A fake project (`tests.conftest`) whose stages take some seconds and can be hit between their steps."""
    data = operate(root)
    (root / "pause.txt").write_text("0.2")
    run_git(root, "commit", "--all", "--quiet", "--message", "pause")

    def change(number: int) -> None:
        data.write_text(str(12.0 - 0.01 * number))  # the student gets a little better

    return Project(root, "lolcats-demo", change, made_from(data), steps=9)


def made_from(data: Path) -> Callable[[Path], bool]:
    """Whether a fake project's worktree holds the student of the present text."""

    def current(worktree: Path) -> bool:
        return (worktree / "outputs" / "finetune" / "model" / "weights.txt").read_text() == str(float(data.read_text()))

    return current


def real_stages(root: Path) -> Project:
    """The demo's stages on a teacher of two layers; the gates load the artifact, scores of random weights are noted."""
    make_project(root)
    text = root.parent / "text"
    text.mkdir()
    params = yaml.safe_load((root / "params.yaml").read_text())
    noted = dict.fromkeys(("perplexity", "task_recovery", "recall_recovery", "regression"), "dry_run")
    data = {"data.source": str(text / "*.txt"), "data.validation_share": 0.2}  # of 30 files, none may fall into 0.05
    params = apply_overrides(params, {**data, "gates": noted})
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    run_git(root, "commit", "--all", "--quiet", "--message", "text outside")
    for file in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:30]:
        (text / f"{file.stem}.txt").write_text(file.read_text())

    def change(number: int) -> None:
        (text / "changing.txt").write_text(f"# text {number}\n" * 50)

    def current(worktree: Path) -> bool:
        described = json.loads((worktree / "outputs" / "inputs" / "data.json").read_text())
        return sha256_file(text / "changing.txt") in json.dumps(described)

    change(1)
    return Project(root, "lolcats-e2e", change, current, steps=13)


class Campaign:
    """Kills, and what must hold after each and after each run that got through. `versions`: those there before."""

    def __init__(self, project: Project, servers: Servers, seed: int, versions: int = 0) -> None:
        self.project, self.servers, self.chance = project, servers, random.Random(seed)
        self.texts, self.had_champion = versions + 1, False
        self.seconds: dict[int, float] = {}  # how long the run takes from its n-th finished task to the next
        self.victims: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.ends: collections.Counter[str] = collections.Counter()
        self.messages: list[str] = []
        self.place = self.last = ""

    def disturb(self, kills: int, say: Callable[[str], None] = lambda line: None) -> None:
        """Kill until `kills` processes were hit; then one more run has to get through."""
        run = self._next_run()
        while sum(self.victims.values()) < kills:
            if self._reached_random_point(run):
                hit = {self._kill() for _ in range(self.chance.choice([1, 2]))} - {None}
                say(f"{sum(self.victims.values()):3d}  {' and '.join(map(str, hit))} killed {self.place}")
                if hit & set(SERVICES):
                    self._bring_back()
                self.check()
            if self._state(run)["type"] in OVER:
                say(f"     {self._ended(run)}")
                run = self._next_run()
        while (name := self._ended(run)) not in GOOD:
            say(f"     {name}")
            run = self._next_run()

    def check(self) -> None:
        """What must hold at any time, also right after a kill: whoever is named serves, with the bytes registered."""
        client = connect(self.project.root)
        for alias in (CHAMPION, PREVIOUS, "challenger", "candidate"):
            version = alias_version(client, self.project.name, alias)
            if version is not None:
                with stored_model(client, version):
                    pass
            elif alias == CHAMPION:
                assert not self.had_champion, "the champion is lost"
        self.had_champion = self.had_champion or alias_version(client, self.project.name, CHAMPION) is not None
        forget_store()
        for branch in run_git(self.project.root, "branch", "--list", "--format=%(refname)", "relinearize/*").split():
            assert yaml.safe_load(run_git(self.project.root, "show", f"{branch}:dvc.lock"))["stages"]

    def verify(self) -> None:
        """After a run that got through: the present text's student serves, and each text has one whole version."""
        self.check()
        client = connect(self.project.root)
        versions = client.search_model_versions(f"name = '{self.project.name}'", max_results=1000)
        assert len(versions) == self.texts, [version.version for version in versions]
        assert all(version.tags[COMPLETE] == "complete" for version in versions)
        assert all("lock.branch" in version.tags for version in versions)
        worktree = self.project.root / ".worktrees" / "relinearize"
        assert self.project.current(worktree), "the last result is not that of the present text"
        with stored_model(client, client.get_model_version_by_alias(self.project.name, CHAMPION)) as stored:
            served = sha256_tree(stored / "artifacts" / "model")
        assert served == sha256_tree(worktree / "outputs" / "finetune" / "model")
        forget_store()
        for outputs in worktree.glob("outputs/[!.]*"):
            assert (outputs / "metrics.json").is_file(), f"{outputs} is half-done"

    def counts(self) -> dict[str, Any]:
        """What was done, for people."""
        return {
            "kills": sum(self.victims.values()),
            "victims": dict(self.victims),
            "places": dict(self.places),
            "ends of runs": dict(self.ends),
            "messages of runs that failed": self.messages,
            "texts, each with one version": self.texts - 1,  # the newest has had no run yet
        }

    def _state(self, run: str) -> dict[str, Any]:
        return dict(self.servers.api(f"/flow_runs/{run}")["state"])

    def _active(self) -> str | None:
        states = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]}}
        body = {"deployments": {"id": {"any_": [self.servers.deployment(NIGHTLY)]}}, "flow_runs": {"state": states}}
        body["sort"] = "EXPECTED_START_TIME_ASC"
        found = [run for run in self.servers.api("/flow_runs/filter", body) if not run["auto_scheduled"]]
        return str(found[0]["id"]) if found else None

    def _next_run(self) -> str:
        """The run that Prefect started again after a crash, or else a new one."""
        deadline = time.monotonic() + (RESUME_SECONDS if self.last == "Crashed" else 0.0)
        while (run := self._active()) is None and time.monotonic() < deadline:
            time.sleep(0.5)
        return run or self.servers.run(NIGHTLY)

    def _finished_tasks(self, run: str) -> list[str]:
        body = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        found = self.servers.api("/task_runs/filter", {**body, "sort": "END_TIME_DESC"})
        return [task["name"] for task in found]

    def _reached_random_point(self, run: str) -> bool:
        """Wait for a point of the run, each task as likely as any other; False where the run ended before it."""
        target, done, since = self.chance.randrange(self.project.steps), -1, time.monotonic()
        share = self.chance.random()
        while (state := self._state(run)["type"]) not in OVER:
            finished = self._finished_tasks(run)
            self.place, now = f"after {finished[0]}" if finished else "before the first task", len(finished)
            if now > done:
                if done >= 0:
                    self.seconds[done] = (time.monotonic() - since) / (now - done)
                done, since = now, time.monotonic()
            there = done >= target and time.monotonic() - since >= share * self.seconds.get(done, 0.5)
            # A run that is not there yet, or is dead without Prefect knowing it, is no aim.
            if there and state == "RUNNING" and "flow" in self._processes():
                return True
            time.sleep(0.2)
        return False

    def _processes(self) -> dict[str, list[psutil.Process]]:
        """What the project's runs consist of at the moment, by kind."""
        found = collections.defaultdict(list)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self.project.root):
                    command = " ".join(process.cmdline())
                    found[next((kind for sign, kind in SIGNS.items() if sign in command), "other")].append(process)
        found.pop("other", None)
        return found

    def _kill(self) -> str | None:
        """End one process at once and without warning; what it was, None where it was gone before."""
        found = self._processes()
        known = json.loads((self.project.root / ".prefect" / "services.json").read_text())
        kind = self.chance.choice([*found, *found, *SERVICES])
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if kind in SERVICES:
                chosen = psutil.Process(known[kind][0])
                if self.chance.random() < 0.5:  # all of it, or its main process alone
                    os.killpg(chosen.pid, signal.SIGKILL)
            else:
                chosen = self.chance.choice(found[kind])
            chosen.kill()
            with contextlib.suppress(psutil.TimeoutExpired):
                chosen.wait(10)
            self.victims[kind] += 1
            self.places[self.place] += 1
            return kind
        return None

    def _bring_back(self) -> None:
        """What a service manager does when a service is gone."""
        time.sleep(self.chance.uniform(0, 5))
        self.servers.bring_back()

    def _ended(self, run: str) -> str:
        """Wait for the end of a run; the name of its state. After one that got through, everything is checked."""
        state = self.servers.ended(run)
        self.last = str(state["name"])
        self.ends[self.last] += 1
        if self.last == "Failed":
            self.messages.append(str(state["message"])[:300])
        if self.last in GOOD and self._active() is None:
            self.verify()
            self.texts += 1
            self.project.change(self.texts)
        return self.last


def main() -> None:
    """The campaign by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="the demo's own stages on a tiny teacher")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lolcats-faults-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        project = real_stages(folder / "project") if options.real else fake_stages(make_fake_project(folder))
        started = time.monotonic()
        with serving(project.root) as servers:
            campaign = Campaign(project, servers, options.seed)
            try:
                campaign.disturb(options.kills, say=lambda line: print(line, flush=True))
            finally:
                print(json.dumps(campaign.counts(), indent=2), flush=True)
                (Path.cwd() / ".scratch").mkdir(exist_ok=True)
                log = Path.cwd() / ".scratch" / f"faults-{options.seed}.log"
                log.write_text(servers.log())
        wait_for(lambda: not list(processes_in(project.root)), "the end of every process")
        print(f"{(time.monotonic() - started) / 60:.1f} minutes; no process is left")


if __name__ == "__main__":
    main()
