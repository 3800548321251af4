"""The harness that every stage runs in: inputs, atomic outputs, resume state, tracking, signals and exit codes.

A stage is a function ``run(stage) -> metrics`` in ``tasks/<name>.py``. Its outputs appear in ``outputs/<name>/`` in one
rename after `run` returned; what it needs to continue after a kill lives in ``.scratch/<name>/<key>/``, where the key
is a hash of everything that dvc.yaml says the stage depends on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from typing import TYPE_CHECKING, Any

import psutil

from lolcats_common.errors import UserError
from lolcats_common.files import atomic_directory, sha256_file, sha256_json, sha256_tree, write_json, write_text
from lolcats_common.machine import device_tags
from lolcats_common.params import Params, load_params, read_yaml
from tasks.runner.logs import quiet_progress_bars, setup_logging
from tasks.runner.mlflow_run import Run, finite, first_line
from tasks.runner.processes import end_with, process_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
FLOW_VARIABLE = "LOLCATS_FLOW_PID"
RESULTS_VARIABLE = "LOLCATS_RESULTS"
STATE = "run.json"
ERROR = "error.txt"
RANK = "RANK"  # set by torchrun


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that no stage catches it by accident."""


class Stage:
    """What `run` gets: where to read, where to write, where to keep resume state, and how to log."""

    def __init__(self, name: str, root: Path, params: Params, out: Path, scratch: Path, run: Run | _NoRun) -> None:
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
    values = dataclasses.asdict(params)
    chosen = {key: _lookup(values, key, name) for key in stages[name].get("params") or []}
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


def main(run: Callable[[Stage], Mapping[str, float]], name: str | None = None, parallel: bool = False) -> None:
    """Run one stage in the current directory and exit: 0, 1 after one line for the user, 143 or 130 when ended.

    Args:
        parallel: the stage can be done by several processes; it is when `compute.processes` says so.
    """
    stage_name = name or Path(run.__code__.co_filename).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{stage_name}",
        description=f"Run the stage {stage_name} of dvc.yaml with params.yaml, in the project's root. "
        "`dvc repro` does so when its inputs changed.",
    )
    parser.parse_args()
    if parallel and RANK not in os.environ:
        _launch(stage_name, Path.cwd())
    setup_logging(logging.INFO if _rank() == 0 else logging.ERROR)
    signal.signal(signal.SIGTERM, raise_terminated)
    sys.exit(execute(run, stage_name, Path.cwd()))


def _launch(name: str, root: Path) -> None:
    """Become torchrun with `compute.processes` processes of this stage, if that is more than one."""
    try:
        processes = load_params(root / "params.yaml").compute.processes
    except UserError:
        return  # said by `execute`
    if processes > 1:
        from lolcats_core.compute.distributed import (  # imports torch, which one process alone does later
            threads,
            torchrun,
        )

        command = [sys.executable, *torchrun(processes), "-m", f"tasks.{name}"]
        os.execve(sys.executable, command, threads(processes))


def _rank() -> int:
    """This process's number among those that torchrun started; 0 alone."""
    return int(os.environ.get(RANK, "0"))


class _NoRun:
    """What the processes besides rank 0 log to."""

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def log_figure(self, name: str, figure: Any) -> None:
        pass

    def log_text(self, text: str, path: str) -> None:
        pass

    def log_dataset(self, *arguments: Any) -> None:
        pass


def _follow(run: Callable[[Stage], Mapping[str, float]], name: str, root: Path) -> None:
    """The part of a process besides rank 0, which does the work and writes nothing."""
    from lolcats_core.compute import distributed
    from lolcats_core.compute.device import seed_everything

    params = load_params(root / "params.yaml")
    seed_everything(params.seed)
    quiet_progress_bars()
    scratch = root / ".scratch" / name / scratch_key(name, root, params)
    with tempfile.TemporaryDirectory(prefix="lolcats-") as out:
        run(Stage(name, root, params, Path(out), scratch, _NoRun()))
        distributed.finish()


def raise_terminated(signum: int, frame: object) -> None:
    """Signal handler that turns SIGTERM into an exception, so that open runs and files are closed."""
    raise Terminated


def execute(run: Callable[[Stage], Mapping[str, float]], name: str, root: Path) -> int:
    """Run one stage in `root` and return its exit code."""
    do = _run_stage if _rank() == 0 else _follow
    return guarded(lambda: do(run, name, root), name, root)


def guarded(work: Callable[[], None], name: str, root: Path) -> int:
    """Do a stage's work and return its exit code; a user's error is one line, printed and left for the flow."""
    error_file = root / ".scratch" / name / ERROR
    try:
        with contextlib.suppress(OSError):
            if _rank() == 0:
                error_file.unlink(missing_ok=True)
        _watch_ancestors()
        work()
    except UserError as error:
        message = " ".join(str(error).split())
        if _rank() != 0:
            return 1  # said by rank 0, which has met it as well
        with contextlib.suppress(OSError):
            write_text(error_file, message + "\n")
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        return 1
    except Terminated:
        print(f"{name}: ended by SIGTERM; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _run_stage(run: Callable[[Stage], Mapping[str, float]], name: str, root: Path) -> None:
    params = load_params(root / "params.yaml")
    key = scratch_key(name, root, params)
    scratch = root / ".scratch" / name / key
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{scratch} cannot be made: {error.strerror}; remove what is in its place") from None
    from lolcats_core.compute import distributed
    from lolcats_core.compute.device import seed_everything

    seed_everything(params.seed)
    quiet_progress_bars()
    state = _read_state(scratch)
    tracked = Run.start(root, name, params=params, resume=state.get("run_id"), tags=device_tags(), system_metrics=True)
    if tracked.resumed:
        logger.info("%s: continuing the run that was cut short (MLflow run %s)", name, tracked.id)
    earlier = float(state.get("seconds", 0.0))
    write_json(scratch / STATE, {"run_id": tracked.id, "seconds": earlier})
    started = time.monotonic()
    try:
        with _stage_output(root / "outputs" / name) as out:
            stage = Stage(name, root, params, out, scratch, tracked)
            metrics = finite(run(stage), name)
            distributed.finish()
            seconds = earlier + time.monotonic() - started
            metrics = {"seconds": seconds, **metrics, "stage_seconds": seconds, **_peaks()}
            write_json(out / "metrics.json", metrics)
            write_json(out / "run.json", {"run_id": tracked.id, "stage": name, "key": key})
        tracked.log_metrics({f"final/{k}": v for k, v in metrics.items()})
    except BaseException as error:
        with _signals_held():
            killed = isinstance(error, Terminated | KeyboardInterrupt)
            with contextlib.suppress(OSError):
                spent = earlier + time.monotonic() - started
                write_json(scratch / STATE, {"run_id": tracked.id, "seconds": spent})
            tracked.finish("KILLED" if killed else "FAILED", None if killed else f"{first_line(error)}")
        raise
    with _signals_held():
        tracked.finish()
        shutil.rmtree(scratch.parent, ignore_errors=True)
    logger.info("%s: done in %.0f s", name, metrics["stage_seconds"])


def _peaks() -> dict[str, float]:
    """Most memory that this process and, where there is one, its GPU held."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if torch.cuda.is_available():
        peaks["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
    return peaks


@contextlib.contextmanager
def _stage_output(path: Path) -> Iterator[Path]:
    """`atomic_directory`, with a message of one line where the disk refuses."""
    try:
        with atomic_directory(path) as out:
            yield out
    except OSError as error:
        if error.errno in (28, 122):  # no space left, quota exceeded
            raise UserError(f"{path}: {error.strerror}; free space and run the same command again") from error
        raise


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
    end_with(watched)
