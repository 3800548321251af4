"""The fault campaign: a re-linearization's processes are killed at random points; nothing may be lost or half-done.

``python -m tests.flows.faults --kills 50 --seed 0`` runs it and prints its counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import yaml

from lolcats_core.files import sha256_file
from tasks import registry
from tasks.processes import end_group
from tasks.promotion import CHAMPION, PREVIOUS, alias_version
from tasks.tracking import connect
from tests.conftest import forget_store, make_fake_project, run_git
from tests.flows.operations import free_port, operate
from tests.tasks.processes import wait_for

NAME = "lolcats-demo"
RUN = "from flows.relinearize import relinearize; print('RESULT', relinearize(return_state=True).name, flush=True)"
STEPS = 9  # tasks of a run in which everything changed
GOOD = {"Promoted", "UpToDate"}


class PrefectServer:
    """A Prefect server that several runs share, and that is killed like everything else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        wait_for(self._answers, 180, "Prefect's server")

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)
        except OSError:
            return False

    def restart(self) -> None:
        """Kill it without warning and start it anew."""
        end_group(self.process, 0)
        self.start()


class Campaign:
    """Runs of the flow `relinearize` in a fake project, disturbed or not, and what must hold after each."""

    def __init__(self, project: Path, seed: int, server: PrefectServer | None = None) -> None:
        self.server = server
        self.project, self.data, self.chance = project, operate(project), random.Random(seed)
        (project / "pause.txt").write_text("0.2")  # so that stages, too, are hit between their steps
        run_git(project, "commit", "--all", "--quiet", "--message", "pause")
        self.contents, self.had_champion = 1, False
        self.victims: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.through = 0

    def run(self, disturb: bool) -> str:
        """One run of the flow; the name of its state, or what was killed."""
        log = self.project.parent / "log"
        environment = {**os.environ, "LOLCATS_ROOT": str(self.project), "PREFECT_LOGGING_LEVEL": "INFO"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if self.server:
            environment["PREFECT_API_URL"] = self.server.url
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN],
                cwd=self.project,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        victim = None
        if disturb:
            # Every step of the flow is as likely as every other, however long each takes.
            steps, rest = self.chance.randrange(STEPS), self.chance.uniform(0.0, 5.0)
            while process.poll() is None and log.read_text(errors="replace").count("' - Finished in state") < steps:
                time.sleep(0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rest)
            victim = self._kill(process, log)
        code = process.wait(600)
        wait_for(lambda: not self._left(), 90, "the end of every process")
        if victim:
            self.victims[victim] += 1
            return f"killed {victim}"
        text = log.read_text(errors="replace")
        assert code == 0, text
        return text.rpartition("RESULT ")[2].strip()

    def _kill(self, process: subprocess.Popen[bytes], log: Path) -> str | None:
        """End one process of the run at once and without warning; what it was, None where the run is over."""
        if process.poll() is not None:
            return None
        lines = [line for line in log.read_text(errors="replace").splitlines() if "Task run '" in line]
        place = f"after {lines[-1].split(chr(39))[1]}" if lines else "before the first task"
        if self.server and self.chance.random() < 0.1:
            self.server.restart()
            self.places[place] += 1
            return "server"
        try:
            flow = psutil.Process(process.pid)
            chosen = self.chance.choice([flow, flow, *flow.children(recursive=True)])
            what = self._kind(chosen.cmdline())
            chosen.send_signal(signal.SIGKILL)
        except psutil.Error:
            return None
        self.places[place] += 1
        return what

    def _kind(self, command: list[str]) -> str:
        text = " ".join(command)
        kinds = {"relinearize import": "flow", "prefect.server": "server", "uvicorn": "server", "fake.py": "stage"}
        kinds |= {"dvc": "dvc", "git": "git"}
        return next((kind for sign, kind in kinds.items() if sign in text), "helper")

    def _left(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                inside = Path(process.cwd()).is_relative_to(self.project)
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def check(self) -> None:
        """What must hold at any time, also right after a kill."""
        client = connect(self.project)
        for alias in (CHAMPION, PREVIOUS, "challenger", "candidate"):
            version = alias_version(client, NAME, alias)
            if version is not None:
                with registry.stored_model(client, version) as stored:
                    registry.check_bytes(version, stored)
            elif alias == CHAMPION:
                assert not self.had_champion, "the champion is lost"
        self.had_champion = self.had_champion or alias_version(client, NAME, CHAMPION) is not None
        forget_store()
        for outputs in self.project.glob(".worktrees/*/outputs/[!.]*"):
            assert (outputs / "metrics.json").is_file(), f"{outputs} is half-done"
        for branch in run_git(self.project, "branch", "--list", "--format=%(refname)", "relinearize/*").split():
            assert yaml.safe_load(run_git(self.project, "show", f"{branch}:dvc.lock"))["stages"]

    def settle(self) -> None:
        """An undisturbed run, and what must hold then."""
        state = self.run(disturb=False)
        assert state in GOOD, f"{state}: {(self.project.parent / 'log').read_text(errors='replace')[-6000:]}"
        self.check()
        self.verify()

    def verify(self) -> None:
        """After a run that got through, the present text's student serves and each text has one whole version."""
        self.through += 1
        client = connect(self.project)
        versions = client.search_model_versions(f"name = '{NAME}'", max_results=1000)
        assert len(versions) == self.contents, [version.version for version in versions]
        assert all(version.tags[registry.COMPLETE] == "complete" for version in versions)
        with registry.stored_model(client, client.get_model_version_by_alias(NAME, CHAMPION)) as stored:
            served = (stored / "artifacts" / "model" / "weights.txt").read_text()
            made = next(self.project.glob(".worktrees/*/outputs/finetune/model/weights.txt"))
            assert sha256_file(stored / "artifacts" / "model" / "weights.txt") == sha256_file(made)
        forget_store()
        assert float(served) == float(self.data.read_text())

    def change(self) -> None:
        """New text, whose student is a little better."""
        self.data.write_text(str(12.0 - 0.01 * self.contents))
        self.contents += 1

    def disturb(self, kills: int, say: bool = False) -> None:
        """Kill until `kills` processes were hit; whenever a run gets through, and at the end, check everything."""
        while sum(self.victims.values()) < kills:
            result = self.run(disturb=True)
            self.check()
            if say:
                print(f"{sum(self.victims.values()):3d}  {result}", flush=True)
            if result in GOOD:
                self.verify()
                self.change()
        self.settle()


def main() -> None:
    """The campaign by hand."""
    os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "2"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lolcats-faults-") as temporary:
        os.environ["PREFECT_HOME"] = f"{temporary}/prefect"
        server = PrefectServer(Path(temporary))
        campaign = Campaign(make_fake_project(Path(temporary)), options.seed, server)
        started = time.monotonic()
        try:
            campaign.disturb(options.kills, say=True)
        finally:
            end_group(server.process, 5)
        counts = {
            "kills": sum(campaign.victims.values()),
            "victims": dict(campaign.victims),
            "places": dict(campaign.places),
            "texts and versions": campaign.contents,
            "runs that got through": campaign.through,
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
        print(json.dumps(counts, indent=2))
        shutil.rmtree(campaign.project, ignore_errors=True)


if __name__ == "__main__":
    main()
