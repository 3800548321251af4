"""The harness that every stage runs in: inputs, atomic outputs, resume state, tracking, signals and exit codes.

A stage is a function ``run(stage) -> metrics`` in ``tasks/<name>.py``. Its outputs appear in ``outputs/<name>/`` in one
rename after `run` returned; what it needs to continue after a kill lives in ``.scratch/<name>/<key>/``, where the key
is a hash of everything that dvc.yaml says the stage depends on. The harness needs neither torch nor MLflow to answer
``--help`` or to refuse params.yaml, so it imports the stage's module only after that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from lolcats_common.errors import UserError
from lolcats_common.files import (
    atomic_directory,
    disk_refusals,
    sha256_file,
    sha256_json,
    sha256_tree,
    write_json,
    write_text,
)
from lolcats_common.machine import device_tags
from lolcats_common.params import Params, load_params, read_yaml
from tasks.runner.exits import Terminated, raise_terminated, run_and_report
from tasks.runner.logs import quiet_progress_bars, setup_logging
from tasks.runner.mlflow_run import Run, finite, first_line
from tasks.runner.processes import alone, exit_when_gone, process_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
FLOW_VARIABLE = "LOLCATS_FLOW_PID"
RESULTS_VARIABLE = "LOLCATS_RESULTS"
REPRO_VARIABLE = "LOLCATS_REPRO"  # one call of `tasks.versioning.dvc_graph.repro`, which run.json then names
STATE = "run.json"
ERROR = "error.txt"
RANK = "RANK"  # set by torchrun


class Stage:
    """What `run` gets: where to read, where to write, where to keep resume state, and how to log."""

    def __init__(self, name: str, root: Path, params: Params, out: Path, scratch: Path, run: Run | Untracked) -> None:
        self.name, self.root, self.params = name, root, params
        self.out, self.scratch = out, scratch
        self._run = run
        # Measurements that outlive the stage; a worktree shares those of the checkout that it hangs from.
        self.results = Path(os.environ.get(RESULTS_VARIABLE) or root / ".scratch" / "results")

    def device(self) -> torch.device:
        """Where the stage computes, after joining the other processes if there are any.

        Raises:
            UserError: this machine has no such device.
        """
        from lolcats_core.compute import distributed
        from lolcats_core.compute.device import resolve_device

        return distributed.start(resolve_device(self.params.compute.device))

    def input(self, stage: str) -> Path:
        """The output directory of an earlier stage.

        Raises:
            UserError: that stage has not run.
        """
        path = self.root / "outputs" / stage
        if not path.is_dir():
            raise UserError(f"outputs/{stage} is missing, which {self.name} needs; run `dvc repro {self.name}`")
        return path

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers to MLflow, at `step` where they belong to one."""
        self._run.log_metrics(values, step)

    def log_figure(self, name: str, figure: Any) -> None:
        """Log a matplotlib figure to MLflow under a file name such as ``loss.png``."""
        _without_failing(f"figure {name}", self._run.log_figure, name, figure)

    def log_text(self, name: str, text: str) -> None:
        """Log a text, such as a report, to MLflow under a file name."""
        _without_failing(name, self._run.log_text, text, name)

    def log_dataset(
        self, name: str, source: str, digest: str, context: str, profile: dict[str, Any] | None = None
    ) -> None:
        """Log a dataset that the stage reads; `context` says what for, such as ``training``."""
        _without_failing(f"dataset {name}", self._run.log_dataset, name, source, digest, context, profile)


Work = Callable[[Stage], Mapping[str, float]]  # what a stage does; it returns its metrics


def _without_failing(what: str, function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:
        logger.warning("MLflow did not take %s: %s", what, first_line(error))


def scratch_key(name: str, root: Path, params: Params) -> str:
    """Hash of the parameter values and the contents of the dependencies that dvc.yaml lists for the stage.

    Raises:
        UserError: dvc.yaml has no such stage, or names a parameter or file that does not exist.
    """
    stages = read_yaml(root / "dvc.yaml").get("stages") or {}
    if name not in stages:
        raise UserError(f"dvc.yaml has no stage {name!r}; its stages: {', '.join(stages)}")
    chosen: dict[str, Any] = {}
    for entry in stages[name].get("params") or []:
        # A mapping names the values of another file, such as package.yaml outside a checkout.
        for file, keys in entry.items() if isinstance(entry, dict) else [("", [entry])]:
            values = read_yaml(root / file) if file else dataclasses.asdict(params)
            chosen |= {f"{file}:{key}" if file else key: _lookup(values, key, name) for key in keys}
    contents = {dep: _content(root / dep, dep, name) for dep in stages[name].get("deps") or []}
    return sha256_json({"params": chosen, "deps": contents})[:16]


def _lookup(values: Any, dotted: str, stage: str) -> Any:
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            raise UserError(f"dvc.yaml: stage {stage} depends on the parameter `{dotted}`, which does not exist")
        values = values[part]
    return values


def _content(path: Path, dep: str, stage: str) -> str:
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise UserError(f"{dep} is missing, which {stage} needs; run `dvc repro {stage}`")
    return sha256_tree(path)


def main(
    name: str, run: Work | None = None, *, parallel: bool = False, preflight: bool = False, tracked: bool = True
) -> NoReturn:
    """Run one stage in the current directory and exit: 0, 1 after one line for the user, 143 or 130 when ended.

    Args:
        run: by default that of the module ``tasks.<name>``, which is imported once params.yaml was read; so a stage
            calls `main` above its own imports.
        parallel: several processes can do the stage; they do when `compute.processes` says so.
        preflight: refuse first what this or a later stage would refuse about the pinned teacher.
        tracked: the stage is an MLflow run.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{name}",
        description=f"Run the stage {name} of dvc.yaml with params.yaml, in the project's root. "
        "`dvc repro` does so when its inputs changed.",
    )
    parser.parse_args()
    if parallel and RANK not in os.environ:
        _launch(name, Path.cwd())
    setup_logging(logging.INFO if _rank() == 0 else logging.ERROR)
    signal.signal(signal.SIGTERM, raise_terminated)
    sys.exit(execute(name, Path.cwd(), run, preflight=preflight, tracked=tracked))


def _launch(name: str, root: Path) -> None:
    """Become torchrun with `compute.processes` processes of this stage, if that is more than one."""
    try:
        processes = load_params(root / "params.yaml").compute.processes
    except UserError:
        return  # said by `execute`
    if processes > 1:
        # This imports torch, which a single process does later.
        from lolcats_core.compute.distributed import threads, torchrun

        command = [sys.executable, *torchrun(processes), "-m", f"tasks.{name}"]
        os.execve(sys.executable, command, threads(processes))


def _rank() -> int:
    """This process's number among those that torchrun started; 0 for a single one."""
    return int(os.environ.get(RANK, "0"))


class Untracked:
    """Stands for the MLflow run of a stage that has none, and of the ranks other than 0."""

    id, resumed = None, False

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def log_figure(self, name: str, figure: Any) -> None:
        pass

    def log_text(self, text: str, path: str) -> None:
        pass

    def log_dataset(self, *arguments: Any) -> None:
        pass

    def finish(self, status: str = "FINISHED", message: str | None = None) -> None:
        pass


def execute(name: str, root: Path, run: Work | None = None, *, preflight: bool = False, tracked: bool = True) -> int:
    """Run one stage in `root` and return its exit code; a user's error is one line, printed and left for the flow."""
    error_file = root / ".scratch" / name / ERROR

    def work() -> None:
        if _rank() == 0:
            with contextlib.suppress(OSError):
                error_file.unlink(missing_ok=True)
        _watch_ancestors()
        if _rank() == 0:
            params = load_params(root / "params.yaml")
            with alone(name, root):
                _run_stage(name, root, params, run, preflight, tracked)
        else:
            _run_worker_rank(name, root, run, preflight)

    def on_error(message: str) -> None:
        if _rank() != 0:
            return  # rank 0 has met the error as well and says it
        with contextlib.suppress(OSError):
            write_text(error_file, message + "\n")
        print(f"{name}: {message}", file=sys.stderr, flush=True)

    return run_and_report(work, name, on_error)


def _run_worker_rank(name: str, root: Path, run: Work | None, preflight: bool) -> None:
    """Run the stage on a rank other than 0: it computes but writes and logs nothing."""
    params = load_params(root / "params.yaml")
    scratch = root / ".scratch" / name / scratch_key(name, root, params)
    run = _ready(name, root, run, params, preflight)
    with tempfile.TemporaryDirectory(prefix="lolcats-") as out:
        run(Stage(name, root, params, Path(out), scratch, Untracked()))
        _leave_group()


def _ready(name: str, root: Path, run: Work | None, params: Params, preflight: bool) -> Work:
    """What is to run, by default that of the stage's module, whose imports take seconds; checked and seeded."""
    work: Work = run or importlib.import_module(f"tasks.{name}").run
    if preflight:
        from tasks.runner.preflight import check_pinned

        check_pinned(params, root)
    _seed(params.seed)
    return work


def _computes() -> bool:
    """Whether the stage has loaded torch; one that has not needs no seed and uses no GPU."""
    return "torch" in sys.modules


def _seed(seed: int) -> None:
    if _computes():
        from lolcats_core.compute.device import seed_everything

        seed_everything(seed)
        quiet_progress_bars()


def _leave_group() -> None:
    """Leave the processes that the stage joined, if any."""
    if _computes():
        from lolcats_core.compute import distributed

        distributed.finish()


def _run_stage(name: str, root: Path, params: Params, run: Work | None, preflight: bool, tracked: bool) -> None:
    key = scratch_key(name, root, params)
    scratch = root / ".scratch" / name / key
    try:
        with disk_refusals(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{scratch} cannot be made: {error.strerror}; remove what is in its place") from None
    run = _ready(name, root, run, params, preflight)
    state = _read_state(scratch)
    mlflow_run: Run | Untracked = Untracked()
    if tracked:
        tags = device_tags() if _computes() else {}
        mlflow_run = Run.start(root, name, params=params, resume=state.get("run_id"), tags=tags, system_metrics=True)
    if mlflow_run.resumed:
        logger.info("%s: continuing the run that was cut short (MLflow run %s)", name, mlflow_run.id)
    earlier = float(state.get("seconds", 0.0))
    write_json(scratch / STATE, {"run_id": mlflow_run.id, "seconds": earlier})
    started = time.monotonic()
    try:
        with atomic_directory(root / "outputs" / name) as out:
            stage = Stage(name, root, params, out, scratch, mlflow_run)
            metrics = finite(run(stage), name)
            _leave_group()
            seconds = earlier + time.monotonic() - started
            metrics = {"seconds": seconds, **metrics, "stage_seconds": seconds, **_peaks()}
            write_json(out / "metrics.json", metrics)
            written_by = os.environ.get(REPRO_VARIABLE)
            write_json(out / STATE, {"run_id": mlflow_run.id, "stage": name, "key": key, "repro": written_by})
        stage.log_text("metrics.json", json.dumps(metrics, indent=2, sort_keys=True))
    except BaseException as error:
        with _signals_held():
            killed = isinstance(error, Terminated | KeyboardInterrupt)
            with contextlib.suppress(OSError):
                spent = earlier + time.monotonic() - started
                write_json(scratch / STATE, {"run_id": mlflow_run.id, "seconds": spent})
            mlflow_run.finish("KILLED" if killed else "FAILED", None if killed else f"{first_line(error)}")
        raise
    with _signals_held():
        mlflow_run.finish()
        shutil.rmtree(scratch.parent, ignore_errors=True)
    logger.info("%s: done in %.0f s", name, metrics["stage_seconds"])


def _peaks() -> dict[str, float]:
    """Most memory that this process and, where there is one, its GPU held."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if _computes():
        import torch

        if torch.cuda.is_available():
            peaks["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
    return peaks


def _read_state(scratch: Path) -> dict[str, Any]:
    """The harness's own record in the scratch directory; a damaged one counts as none."""
    try:
        state = json.loads((scratch / STATE).read_text(encoding="utf-8"))
        return {"run_id": str(state["run_id"]), "seconds": float(state["seconds"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is damaged and is started anew", scratch / STATE)
        return {}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Keep a second SIGTERM or Ctrl-C from cutting the tidying up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch_ancestors() -> None:
    """End this stage when the `dvc` or the flow that started it is gone.

    Ending `dvc repro` does not end its command, so a killed flow would leave a training process behind.
    """
    watched = process_of(FLOW_VARIABLE)
    if "DVC_STAGE" in os.environ:  # set by `dvc repro` for its command
        with contextlib.suppress(psutil.Error):
            ancestors = psutil.Process().parents()
            watched += [p for p in ancestors if any(Path(part).name == "dvc" for part in p.cmdline()[:3])][:1]
    exit_when_gone(watched)
