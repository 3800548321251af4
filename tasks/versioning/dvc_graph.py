"""The stage graph as DVC knows it, and one `dvc repro` at a time in a process group of its own."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import graphlib
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from configobj import ConfigObj, ConfigObjError

from lolcats_common.errors import Unavailable, UserError
from lolcats_common.params import read_yaml
from lolcats_common.secrets import redacted
from tasks.runner.processes import GRACE_SECONDS, end_group
from tasks.runner.stage import ERROR, FLOW_VARIABLE, REPRO_VARIABLE, STATE
from tasks.versioning import objects, package

logger = logging.getLogger(__name__)
State = Literal["ran", "restored", "unchanged"]
LOCK_RETRIES = 10
LOCK_WAIT_SECONDS = 3.0
# A lock that another DVC holds is known by its message alone: the exit code is that of any other error.
_BUSY = ("Unable to acquire lock", "is busy, it is being blocked by", "failed to lock")
NEEDS_GIT = "--set and --preset need one: git init && git add --all && git commit -m start"
# For display only.
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NOISE = re.compile(
    r"^(\s*|To track the changes with git, run:|\s*git add .*|To enable auto staging, run:"
    r"|\s*dvc config core.autostage true|Use `dvc push` to send your updates to remote storage."
    r"|(Generating|Updating) lock file 'dvc.lock'|Data and pipelines are up to date\.|> PATH=.*)$"
)


class StageFailed(UserError):
    """A stage ended with an error; the message is the stage's own line where it left one."""


@dataclass(frozen=True)
class Reproduced:
    """What became of one stage. `restored`: DVC took it from its cache. `seconds`: wall clock of this time."""

    stage: str
    state: State
    seconds: float


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a DVC call: this interpreter's programs first, no analytics, a plain shell for the stages."""
    programs = str(Path(sys.executable).parent)
    values = {
        **os.environ,
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        "DVC_NO_ANALYTICS": "1",
        FLOW_VARIABLE: str(os.getpid()),
        "SHELL": "/bin/sh",
        **(extra or {}),
    }
    values.pop("PYTHONDONTWRITEBYTECODE", None)  # stages start several times faster from bytecode
    return values


def run_dvc(root: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a short DVC command.

    Raises:
        UserError: the command failed; the message is DVC's last line.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    repair(root)
    for attempt in range(LOCK_RETRIES):
        done = subprocess.run(command, cwd=root, env=environment(env), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
        if not any(sign in done.stderr for sign in _BUSY):
            break
        logger.info("DVC is busy in another process, waiting (%d of %d)", attempt + 1, LOCK_RETRIES)
        time.sleep(LOCK_WAIT_SECONDS)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines  # warnings may stand before
    raise UserError(f"`dvc {' '.join(arguments)}` failed: {errors[0] if errors else f'exit code {done.returncode}'}")


def repair(root: Path) -> None:
    """Remove what a killed DVC left half-written, which writes dvc.lock and its lock file in place.

    Without dvc.lock nothing is lost: DVC finds each stage's result in its run cache by what the stage depends on.
    `follow_git` and `package.follow` bring what else DVC reads to the present state.
    """
    follow_git(root)
    package.follow(root)
    lock = root / "dvc.lock"
    if lock.is_file() and not _is_whole(lock):
        logger.warning("dvc.lock was left half-written by a run that was killed; it is made anew")
        lock.unlink()
    rwlock = root / ".dvc" / "tmp" / "rwlock"
    if rwlock.is_file():
        try:
            json.loads(rwlock.read_text(encoding="utf-8") or "{}")
        except (OSError, ValueError):
            rwlock.unlink(missing_ok=True)


def read_settings(file: Path) -> ConfigObj:
    """A file of DVC's settings; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return ConfigObj(str(file), encoding="utf-8", interpolation=False)
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}; correct it, or remove it to lose what it sets") from None


def follow_git(root: Path) -> None:
    """Let DVC work without git where there is none, such as in an unpacked archive, and with it from `git init` on."""
    local = root / ".dvc" / "config.local"
    checkout = any((folder / ".git").exists() for folder in (root, *root.parents))
    if checkout and not local.is_file():
        return
    settings = read_settings(local)
    core = settings.setdefault("core", {})
    if (core.get("no_scm") == "true") != checkout:
        return
    if checkout:
        del core["no_scm"]
    else:
        core["no_scm"] = "true"
        logger.warning("%s is no git checkout: versions lead to no commit; %s", root, NEEDS_GIT)
    settings.write()


def _is_whole(lock: Path) -> bool:
    try:
        values = yaml.safe_load(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or not isinstance(values.get("stages", {}), dict) or "schema" not in values:
        return False
    return all(isinstance(entry, dict) and "cmd" in entry for entry in values.get("stages", {}).values())


def dependencies(root: Path) -> dict[str, set[str]]:
    """Each stage of dvc.yaml with the stages it needs, as DVC derives them."""
    found: dict[str, set[str]] = {}
    for line in run_dvc(root, "dag", "--dot").splitlines():
        names = re.findall(r'"([^"]+)"', line)
        for name in names:
            found.setdefault(name, set())
        if len(names) == 2 and "->" in line:
            found[names[1]].add(names[0])
    if not found:
        raise UserError(f"{root}/dvc.yaml has no stages")
    return found


def stages(root: Path) -> list[str]:
    """The stages in an order in which each comes after what it needs."""
    return list(graphlib.TopologicalSorter(dependencies(root)).static_order())


def changed(root: Path, anew: bool = False) -> dict[str, list[str]]:
    """Stages whose outputs are not those of the current inputs, each with what changed.

    Args:
        anew: read every byte, where DVC otherwise believes what it wrote itself, or read before, by size and times.
    """
    with tempfile.TemporaryDirectory(prefix="lolcats-dvc-") as nothing_read:
        env = {"DVC_SITE_CACHE_DIR": nothing_read} if anew else None
        status = json.loads(run_dvc(root, "status", "--json", env=env) or "{}")
    found: dict[str, list[str]] = {}
    for stage, entries in status.items():
        reasons = []
        for entry in entries:
            if isinstance(entry, str):
                reasons.append(entry)
                continue
            for kind, files in entry.items():
                names = list(files) if isinstance(files, dict) else [str(files)]
                reasons.append(f"{kind}: {', '.join(names)}")
        if reasons:
            found[stage] = reasons
    return found


def drop_damaged(root: Path, stage: str) -> list[Path]:
    """`objects.drop_damaged` for a stage's outputs, as dvc.lock names them."""
    cache = root / run_dvc(root, "cache", "dir").strip()
    outs = {root / out["path"]: str(out.get("md5")) for out in (_locked(root, stage) or {}).get("outs") or []}
    return objects.drop_damaged(cache, outs)


def refresh(root: Path, env: Mapping[str, str] | None = None) -> None:
    """Run the stages that read what lies outside the project, so that `changed` knows it.

    Raises:
        StageFailed: one of them failed.
    """
    for name in read_yaml(root / "dvc.yaml").get("stages") or {}:
        if _reads_outside(root, name):
            repro(name, root, env, on_line=logger.info)


def _reads_outside(root: Path, stage: str) -> bool:
    """Whether dvc.yaml marks the stage as one whose result depends on files that DVC does not see."""
    entry = (read_yaml(root / "dvc.yaml").get("stages") or {}).get(stage)
    return isinstance(entry, dict) and bool((entry.get("meta") or {}).get("outside"))


def push_if_remote(root: Path) -> bool:
    """`dvc push` where a default remote is configured; says whether it did.

    Raises:
        Unavailable: the remote did not take everything.
    """
    if not run_dvc(root, "config", "--list").count("core.remote="):
        return False
    try:
        run_dvc(root, "push", "--run-cache")
    except UserError as error:
        raise Unavailable(str(error)) from None
    return True


def repro(
    stage: str,
    root: Path,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    grace: float = GRACE_SECONDS,
) -> Reproduced:
    """Bring one stage up to date with ``dvc repro --single-item`` and pass its output on.

    On a terminal the output goes there as it is, progress bars included; otherwise line by line to `on_line`
    (standard output by default). Any exception, a cancellation among them, ends the whole process group first.

    Raises:
        StageFailed: the stage failed.
    """
    started = time.monotonic()
    error_file = root / ".scratch" / stage / ERROR
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    if _reads_outside(root, stage):
        command.append("--force")
    for attempt in range(LOCK_RETRIES):
        error_file.unlink(missing_ok=True)
        repair(root)
        before, call = _result(root, stage), uuid.uuid4().hex
        code, told = _stream(command, root, {**environment(env), REPRO_VARIABLE: call}, on_line, grace)
        if code == 0:
            state = _state(before, _result(root, stage), call)
            if state == "restored" and (damaged := drop_damaged(root, stage)):
                logger.warning("%s runs again: DVC's cache had other bytes than it says: %s", stage, damaged[0])
                continue
            return Reproduced(stage, state, time.monotonic() - started)
        if not any(sign in told for sign in _BUSY) or attempt == LOCK_RETRIES - 1:
            break
        logger.info("DVC is busy in another process, waiting (%d of %d)", attempt + 1, LOCK_RETRIES)
        time.sleep(LOCK_WAIT_SECONDS)
    with contextlib.suppress(OSError):
        raise StageFailed(f"{stage}: {error_file.read_text(encoding='utf-8').strip()}")
    errors = [line for line in told.splitlines() if line.startswith("ERROR:")]
    reason = errors[0].removeprefix("ERROR: ") if errors else f"exit code {code}"
    raise StageFailed(f"{stage}: {reason}; its output above says more")


def _result(root: Path, stage: str) -> tuple[dict[str, Any] | None, Any]:
    """The stage's run.json, which its harness writes, and its entry in dvc.lock; each None where missing."""
    written: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        written = dict(json.loads((root / "outputs" / stage / STATE).read_text(encoding="utf-8")))
    return written, _locked(root, stage)


def _locked(root: Path, stage: str) -> Any:
    """The stage's entry in dvc.lock; None where there is none."""
    lock = root / "dvc.lock"
    return (read_yaml(lock).get("stages") or {}).get(stage) if lock.is_file() else None


def _state(before: tuple[Any, Any], after: tuple[Any, Any], call: str) -> State:
    """What a `dvc repro` that ended well did, by the results before and after it."""
    if after[0] is not None and after[0].get("repro") == call:
        return "ran"
    return "unchanged" if before == after else "restored"


def _stream(
    command: list[str], root: Path, env: dict[str, str], on_line: Callable[[str], None] | None, grace: float
) -> tuple[int, str]:
    """Run `command` in a new session; returns the exit code and DVC's own errors."""
    terminal = on_line is None and sys.stdout.isatty() and sys.stderr.isatty()
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        _copy_window_size(writer)
    output = OutputFilter(on_line, terminal)
    process = None
    try:
        try:
            process = subprocess.Popen(
                command,
                cwd=root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                start_new_session=True,
            )
        finally:
            os.close(writer)
        while chunk := _read(reader, process):
            output.take(chunk)
        return process.wait(), output.finish()
    except BaseException:
        if process is not None:
            end_group(process, grace)
        raise
    finally:
        os.close(reader)


def _read(reader: int, process: subprocess.Popen[bytes]) -> bytes:
    """The next piece of output; empty once the process ended and nothing is left to read."""
    while True:
        ready, _, _ = select.select([reader], [], [], 0.5)
        if ready:
            try:
                return os.read(reader, 65536)
            except OSError:  # a pseudo-terminal reports the end this way
                return b""
        if process.poll() is not None:
            return b""


class OutputFilter:
    """Passes a command's output on without DVC's hints, and keeps DVC's errors."""

    def __init__(self, on_line: Callable[[str], None] | None, terminal: bool) -> None:
        self.on_line = on_line or (lambda line: print(line, flush=True))
        self.terminal = terminal
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.rest = ""
        self.errors: list[str] = []

    def take(self, chunk: bytes) -> None:
        """Pass the next piece of output on."""
        text = self.decoder.decode(chunk)
        if self.terminal:
            sys.stdout.write(text)
            sys.stdout.flush()
        *lines, self.rest = re.split(r"\r?\n", self.rest + text)
        self.rest = self.rest[-65536:]
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        plain = redacted(_ANSI.sub("", line).rpartition("\r")[2])
        if plain.startswith("ERROR:") or any(sign in plain for sign in _BUSY):
            self.errors.append(plain)
        if not self.terminal and not _NOISE.match(plain):
            self.on_line(plain)

    def finish(self) -> str:
        """Pass the last line on; DVC's errors, a line each."""
        if self.rest:
            self._line(self.rest)
        return "\n".join(self.errors)


def _copy_window_size(target: int) -> None:
    size = os.get_terminal_size(sys.stdout.fileno())
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
