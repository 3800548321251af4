"""Kills inside the work: SIGKILL at a line of a stage's or of the registry's own code, then the same command again.

``python -m tests.tasks.kills --kills 120`` kills that often, prints each place, and compares what the same command ends
in with what an undisturbed run ends in, byte for byte: weights, rows, results, and the curves in MLflow. Every run is a
fork of one process that has imported everything, so a kill costs seconds. The line is chosen among all that the work
passes (a survey counts them): half of the time each as likely as any other, otherwise by how often it is passed.
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
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import mlflow.pyfunc
import mlflow.store.model_registry.sqlalchemy_store  # imported once, before anything is forked
import mlflow.store.tracking.sqlalchemy_store
import yaml

from lolcats_common.files import sha256_file, sha256_tree
from lolcats_common.params import GatesParams, apply_overrides, load_params, read_yaml
from tasks import evaluate, finetune, inputs, prepare, select, teacher, transfer
from tasks.registry import promotion, register, versions
from tasks.runner.logs import setup_logging
from tasks.runner.mlflow_run import connect
from tasks.runner.stage import execute
from tasks.versioning import dvc_graph
from tests.conftest import run_git
from tests.core.evaluation.test_code_continuation import code
from tests.core.tiny import byte_teacher, byte_tokenizer
from tests.tasks.conftest import set_model

ROOT = Path(__file__).parents[2]
NAME = "lolcats-kills"
Place = tuple[str, int]
# Code at whose lines a run is killed: the project's, and what copies, deletes and writes files for it.
OWN = tuple(f"{ROOT / name}{os.sep}" for name in ("lolcats_common", "lolcats_core", "kernels", "tasks"))
WRITERS = (shutil.__file__, sys.modules["torch.serialization"].__file__, sys.modules["safetensors.torch"].__file__)
REGISTRY = (str(Path(mlflow.__file__).parent) + os.sep,)
TRAINING = {
    "batch_size": 2,
    "epochs": 1,
    "max_steps": 6,
    "eval_every": 3,
    "max_eval_rows": 2,
    "log_every": 1,
    "checkpoint_every": 2,
}
OVERRIDES: dict[str, Any] = {
    "compute.device": "cpu",
    "teacher.source": "./model",
    "data": {"source": "text", "sequence_length": 128, "validation_share": 0.3, "max_train_tokens": 128 * 12},
    "linearize": {"window_size": 8, "feature_dim": 8},
    "transfer": TRAINING,
    "select": {"softmax_budget": {"cache_ratio": 0.25}, "rows": 1},
    "finetune": {**TRAINING, "lora_rank": 2},
    "evaluate": {
        "max_perplexity_rows": 2,
        "recall_gaps": [16],
        "recall_samples": 2,
        "tasks": ["copy", "mqar"],
        "synthetic_lengths": [128],
        "synthetic_samples": 1,
        "long_rows": 1,
        "generation_prompts": 1,
        "generation_tokens": 4,
        "audit_rows": 1,
    },
    "register.name": NAME,
}
# What differs from run to run.
TIMES = ("seconds", "stage_seconds", "train_seconds", "tokens_per_second", "peak_memory_bytes")
UNPROBED = GatesParams(
    **dict.fromkeys(("loads", "recurrent", "left_padding", "speed", "memory"), "disabled"),
    **dict.fromkeys(("perplexity", "task_recovery", "recall_recovery", "earns_bytes", "regression"), "dry_run"),
)


@dataclass(frozen=True)
class Command:
    """What is killed and done again.

    Attributes:
        do: the command. begins: the file and the function with which its work begins; lines before it do not count.
        result: what it ends in, as plain values. traced: folders and files whose lines count.
    """

    do: Callable[[Path], object]
    begins: tuple[str, str]
    result: Callable[[Path], Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    traced: tuple[str, ...] = (*OWN, *WRITERS)


def stage(module: Any, overrides: Mapping[str, Any] | None = None) -> Command:
    """A stage of dvc.yaml."""
    name = module.__name__.rpartition(".")[2]

    def do(root: Path) -> None:
        code = execute(name, root)
        assert code == 0, f"{name} ended with {code}"

    return Command(do, (module.__file__, "run"), lambda root: stage_result(root, name), overrides or {})


def stage_result(root: Path, name: str) -> dict[str, Any]:
    """Hashes of the outputs, the numbers and the curves, and whether anything half-done is left."""
    out = root / "outputs" / name
    found: dict[str, Any] = {
        path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()
    }
    for other in ("run.json", "speed.json"):
        found.pop(other, None)
    found["metrics.json"] = _timeless(json.loads((out / "metrics.json").read_text()))
    if (history := out / "history.jsonl").is_file():
        found["history.jsonl"] = [_timeless(json.loads(line)) for line in history.read_text().splitlines()]
    found["left"] = [path.name for path in (root / "outputs").glob(".*")]
    found["left"] += [path.name for path in (root / ".scratch").glob("*") if path.name != "results"]
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        runs = database.execute("SELECT run_uuid, status FROM runs WHERE name = ?", (name,)).fetchall()
        curves = (
            "SELECT key, step, value FROM metrics WHERE run_uuid = ? AND key NOT LIKE 'system/%' ORDER BY key, step"
        )
        points = {run: database.execute(curves, (run,)).fetchall() for run, _ in runs}
    # A stage that was killed after its outputs were there runs again as a run of its own, with the same curves.
    found["runs"] = sorted({status for _, status in runs})
    found["curves"] = []
    for each in points.values():
        curve = [list(point) for point in each if point[0].rpartition("/")[2] not in TIMES]
        if curve not in found["curves"]:
            found["curves"].append(curve)
    return found


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


def registered(root: Path) -> dict[str, Any]:
    """Every version with its tags and its checked bytes, and every alias."""
    client = connect(root)
    model = client.get_registered_model(NAME)
    found: dict[str, Any] = {"aliases": {alias: int(number) for alias, number in model.aliases.items()}}
    found["tags"] = dict(model.tags)
    for version in client.search_model_versions(f"name = '{NAME}'"):
        with versions.stored_model(client, version) as stored:
            parts = {part: sha256_tree(stored / part) for part in ("artifacts", "code")}
        tags = {key: value for key, value in version.tags.items() if key not in ("manifest.sha256", "lock.commit")}
        found[str(version.version)] = {**tags, **parts}
    return found


def _register(root: Path) -> None:
    register.register(root, load_params(root / "params.yaml"))


def _gates(root: Path) -> None:
    promotion.run_gates(root, NAME, UNPROBED, "candidate")


def _promote(root: Path) -> None:
    promotion.promote(root, NAME, str(connect(root).get_model_version_by_alias(NAME, "candidate").version))


STREAMED = {"transfer.mode": "streamed"}
ANYWHERE = (*OWN, *WRITERS, *REGISTRY)
COMMANDS = {
    "inputs": stage(inputs),
    "teacher": stage(teacher),
    "prepare": stage(prepare),
    "transfer": stage(transfer),
    "streamed": stage(transfer, {**STREAMED, "transfer.buffer": "disk"}),
    "streamed in memory": stage(transfer, {**STREAMED, "transfer.buffer": "memory"}),
    "select": stage(select),
    "finetune": stage(finetune),
    "evaluate": stage(evaluate),
    "register": Command(_register, (str(register.__file__), "register"), registered, traced=ANYWHERE),
    "gates": Command(_gates, (str(promotion.__file__), "run_gates"), registered, traced=ANYWHERE),
    "promote": Command(_promote, (str(promotion.__file__), "promote"), registered, traced=ANYWHERE),
}
INSTEAD = ("streamed", "streamed in memory")  # of `transfer`; the other commands come one after the other


class Tracer:
    """Counts how often each line is passed once the work has begun, and ends the process at one of them."""

    def __init__(self, command: Command, die_at: tuple[Place, int] | None, tell: Callable[[str], object]) -> None:
        self.command, self.tell, self.begun = command, tell, False
        self.place, self.left = die_at or (None, 0)
        self.seen: collections.Counter[Place] = collections.Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not self.begun and (code.co_filename, code.co_name) == self.command.begins:
            self.begun = True
        counts = code.co_filename.startswith(self.command.traced) and code.co_name != "<module>"
        return self.line if counts else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.begun and event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.seen[place] += 1
            if place == self.place:
                self.left -= 1
                if self.left == 0:
                    self.tell(f"{place[0]}:{place[1]} in {frame.f_code.co_name}")
                    os.kill(os.getpid(), signal.SIGKILL)
        return self.line


class Campaign:
    """A tiny project, what each command ends in there undisturbed, and the lines it passes."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.root = folder, folder / "project"
        self.expected: dict[str, Any] = {}
        self.places: dict[str, list[tuple[Place, int]]] = {}
        make_project(self.root)
        last = max(list(COMMANDS).index(name) for name in names)
        for name in list(COMMANDS)[: last + 1]:
            if name == "gates":  # of a second version, beside a champion
                for each in (_gates, _promote):
                    self._fork(lambda each=each: each(self.root))
                set_model(self.root, "m2")
                self._fork(lambda: _register(self.root))
            before = "transfer" if name in INSTEAD else name
            if name in INSTEAD:
                if name not in names:
                    continue
                shutil.move(self.root, folder / "kept")
                self._restore(before)
            else:
                shutil.copytree(self.root, folder / before, symlinks=True)
            self._configure(COMMANDS[name])
            self._survey(name)
            if name in INSTEAD:
                shutil.rmtree(self.root)
                shutil.move(folder / "kept", self.root)

    def _survey(self, name: str) -> None:
        command = COMMANDS[name]

        def survey() -> Any:
            tracer = Tracer(command, None, print)
            sys.settrace(tracer)
            try:
                command.do(self.root)
            finally:
                sys.settrace(None)
            return {"lines": list(tracer.seen.items()), "result": command.result(self.root)}

        answer = self._fork(survey)
        self.places[name] = [((file, line), count) for (file, line), count in answer["lines"]]
        self.expected[name] = answer["result"]

    def kill(self, name: str, chance: random.Random, kills: int) -> tuple[list[str], list[str]]:
        """Kill a command up to `kills` times, let it end, and compare: the places, and what differs."""
        command = COMMANDS[name]
        self._restore("transfer" if name in INSTEAD else name)
        self._configure(command)
        places: list[str] = []
        for _ in range(kills):
            weights = [count for _, count in self.places[name]] if chance.random() < 0.5 else None
            ((place, count),) = chance.choices(self.places[name], weights)
            die_at = (place, chance.randint(1, count))
            place_file = self.folder / "place"
            place_file.unlink(missing_ok=True)

            def killed(die_at: tuple[Place, int] = die_at, told: Path = place_file) -> None:
                sys.settrace(Tracer(command, die_at, told.write_text))
                command.do(self.root)

            self._fork(killed, may_die=True)
            if place_file.is_file():
                places.append(place_file.read_text().replace(f"{ROOT}{os.sep}", ""))

        def again() -> Any:
            command.do(self.root)
            return command.result(self.root)

        result, expected = self._fork(again), self.expected[name]
        differing = [
            f"{key}: {str(result.get(key))[:300]} and not {str(expected.get(key))[:300]}"
            for key in sorted(result.keys() | expected.keys())
            if result.get(key) != expected.get(key)
        ]
        return places, differing

    def _configure(self, command: Command) -> None:
        values = apply_overrides(read_yaml(ROOT / "params.yaml"), {**OVERRIDES})
        values = apply_overrides(values, dict(command.overrides))
        (self.root / "params.yaml").write_text(yaml.safe_dump(values))

    def _restore(self, name: str) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.folder / name, self.root, symlinks=True)

    def _fork(self, work: Callable[[], Any], may_die: bool = False) -> Any:
        """What `work` returns in a process of its own."""
        answer, log = self.folder / "answer.json", self.folder / "log"
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with log.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.chdir(self.root)
                setup_logging()
                answer.write_text(json.dumps(work()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if may_die and ended == -signal.SIGKILL:
            return None
        assert ended == 0, f"ended with {ended}: {log.read_text()[-4000:]}"
        return json.loads(answer.read_text())


def make_project(root: Path) -> None:
    """A checkout's code, a teacher of two layers, and some text."""
    root.mkdir()
    for name in ("lolcats_common", "lolcats_core", "kernels", "tasks"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", root)
    byte_teacher(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "text").mkdir()
    for index in range(24):
        (root / "text" / f"{index}.py").write_text(code(20).replace("\n", f"  # {index}\n", 3))
    set_model(root, "m1")
    run_git(root, "init", "--quiet")
    run_git(root, "add", "dvc.yaml")
    run_git(root, "commit", "--quiet", "--message", "start")


def main() -> int:
    """The campaign by hand; the number of runs that ended otherwise than an undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[name for name in COMMANDS if name not in ("inputs", "teacher")])
    options = parser.parse_args()
    chance = random.Random(options.seed)
    dvc_graph.changed = lambda root, anew=False: {}
    dvc_graph.push_if_remote = lambda root: False
    landed: collections.Counter[str] = collections.Counter()
    differing = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lolcats-kills-") as temporary:
        campaign = Campaign(Path(temporary), options.only)
        for name in options.only:
            print(f"{name}: {len(campaign.places[name])} lines", flush=True)
        while sum(landed.values()) < options.kills or len(landed) < len(options.only):
            name = min(options.only, key=lambda each: landed[each])
            places, differences = campaign.kill(name, chance, chance.choice((1, 1, 2, 3)))
            if places:
                landed[name] += len(places)
            print(f"{name}: killed at {', then at '.join(places) or 'nothing'}", flush=True)
            for difference in differences:
                print(f"    DIFFERS {difference}", flush=True)
            differing += bool(differences)
    minutes = (time.monotonic() - started) / 60
    print(json.dumps({"kills": sum(landed.values()), "by command": landed, "differing": differing, "minutes": minutes}))
    return differing


if __name__ == "__main__":
    sys.exit(min(main(), 1))
