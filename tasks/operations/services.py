"""`lolcats serve` and `lolcats stop`: Prefect server, worker and MLflow server on loopback, each ended by its own pid.

`LOLCATS_AUTH=user:password` protects both with that login. Ports: `LOLCATS_PREFECT_PORT` (4200) and
`LOLCATS_MLFLOW_PORT` (5000). Whatever talks to the servers needs the variables that `start` writes into
.prefect/services.env.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from tasks.runner import new_store
from tasks.runner.mlflow_run import connect, experiment_id

HOST = "127.0.0.1"
POOL = "lolcats"
NAMES = {"mlflow": "MLflow's server", "prefect": "Prefect's server"}
SERVICES = ("mlflow", "prefect", "worker")
VARIABLES = ".prefect/services.env"  # what clients need, as `export` lines
AUTH = "LOLCATS_AUTH"
MIN_PASSWORD = 12  # what MLflow asks for
BROKER = "flows.prefect_sqlite"  # by name: importing it here would load Prefect
START_SECONDS = 600.0  # the first start makes the databases: minutes on a busy machine
STOP_SECONDS = 20.0


def start(root: Path, *, worker: bool = True, say: Callable[[str], object] = lambda line: None) -> dict[str, str]:
    """Start the three, deploy the flows of prefect.yaml, and return the variables that their clients need.

    Without `worker` the two servers alone, for a person who looks: then no schedule starts anything. `say` gets a line
    before each step, which takes seconds to a minute.

    Where some of the three still run, only those that are gone are started, on the ports and with the login as before.

    Raises:
        UserError: all run already, a port is taken, or one of them does not come up.
    """
    running = _running(root)
    wanted = SERVICES if worker else SERVICES[:2]
    if running.keys() >= set(wanted):
        raise UserError(f"{', '.join(running)} run already; `lolcats stop` ends them")
    servers = [name for name in ("mlflow", "prefect") if name not in running]
    for name in servers:
        _end(_group(root, name))  # what its main process, killed alone, left behind on its port
    if not running:
        say("Making ready the databases of MLflow and Prefect ...")
    variables = _saved(root) if running else _fresh(root)
    deployed = not worker or (bool(running) and "worker" in _known(root))
    new_store.ensure(root / "mlflow.db")  # the server would make it too, but not whole or not at all
    try:
        for name in servers:
            _launch(root, name, *_server(root, name, variables))
        for name, url in (("mlflow", variables["MLFLOW_TRACKING_URI"]), ("prefect", variables["PREFECT_API_URL"])):
            say(f"Waiting for {NAMES[name]} at {url.removesuffix('/api')} ...")
            _wait(root, name, lambda url=url: _answers(f"{url}/health"))  # type: ignore[misc]
        environment = _prefect_environment(variables)
        if not deployed:
            say("Deploying the flows of prefect.yaml ...")
            pool = ["work-pool", "create", POOL, "--type", "process", "--overwrite"]
            for arguments in (pool, ["--no-prompt", "deploy", "--all"]):
                _call([sys.executable, "-m", "prefect", *arguments], root, environment)
            _call([sys.executable, "-m", "flows.automations"], root, environment)
        if worker and "worker" not in running:
            say("Starting the worker ...")
            _launch(root, "worker", [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL], environment)
    except BaseException:
        if not running:
            stop(root)
        raise
    return variables


def pages(root: Path, say: Callable[[str], object]) -> dict[str, str]:
    """Where a person looks: the pages of MLflow and Prefect, whose servers are started if they do not run.

    Raises:
        UserError: as `start`.
    """
    running = _running(root)
    both = "mlflow" in running and "prefect" in running
    variables = _saved(root) if both else start(root, worker=False, say=say)
    return {"MLflow": variables["MLFLOW_TRACKING_URI"], "Prefect": variables["PREFECT_API_URL"].removesuffix("/api")}


def stop(root: Path) -> list[str]:
    """End what `start` started and still runs, worker first; their names.

    A process is known by its pid and the time at which it started, so no other one is ended in its place.
    """
    running, ended = _running(root), []
    for name in reversed(SERVICES):
        tree = _group(root, name) + (_flows(root) if name == "worker" else [])
        if name in running:
            with contextlib.suppress(psutil.Error):
                tree += running[name].children(recursive=True)
            tree = [running[name], *tree]
        if _end(tree):
            ended.append(name)
    for suffix in (".json", ".env"):
        _state(root).with_suffix(suffix).unlink(missing_ok=True)
    return ended


def _end(processes: list[psutil.Process]) -> bool:
    """End the first one in order, which ends the others, and then what is left; whether there was any."""
    for process in processes[:1]:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS if processes else 0)
    for left in alive:
        with contextlib.suppress(psutil.Error):
            left.kill()
    return bool(processes)


def _group(root: Path, name: str) -> list[psutil.Process]:
    """The processes that a service started, also after it was killed itself: its process group, in this project."""
    leader = int(_known(root).get(name, [0])[0])

    def belongs(process: psutil.Process) -> bool:
        return os.getpgid(process.pid) == leader and process.pid != leader

    return _here(root, belongs) if leader else []


def _flows(root: Path) -> list[psutil.Process]:
    """The flows that a worker started, also after it was killed."""
    return _here(root, lambda process: process.cmdline()[1:] == ["-m", "prefect.engine"])


def _here(root: Path, chosen: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if chosen(process) and Path(process.cwd()) == root:
                found.append(process)
    return found


def _state(root: Path) -> Path:
    return root / ".prefect" / "services.json"


def _known(root: Path) -> dict[str, list[float]]:
    try:
        return dict(json.loads(_state(root).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _running(root: Path) -> dict[str, psutil.Process]:
    found = {}
    for name, (pid, created) in _known(root).items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            same = abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE
            if same and Path(process.cwd()) == root:  # a copy of a project knows the original's processes too
                found[name] = process
    return found


def _launch(root: Path, name: str, command: list[str], environment: Mapping[str, str]) -> None:
    log = root / ".prefect" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab" if name in _known(root) else "wb") as output:  # brought back: what it said before stays
        process = subprocess.Popen(
            command,
            cwd=root,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    write_json(_state(root), {**_known(root), name: [process.pid, psutil.Process(process.pid).create_time()]})


def _wait(root: Path, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if name not in _running(root):
            raise UserError(f"{name} ended while it started; its log: .prefect/{name}.log")
        if time.monotonic() > deadline:
            raise UserError(f"{name} did not answer within {START_SECONDS:.0f} s; its log: .prefect/{name}.log")
        time.sleep(0.3)


def _answers(url: str) -> bool:
    """Whether a server is there; one that asks for a login is."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def _call(command: list[str], root: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, cwd=root, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        what = " ".join(command[2:4])
        raise UserError(f"`{what}` failed: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UserError(f"{variable} must be a port from 1 to 65535, got {text!r}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(text)))
        except OSError:
            raise UserError(f"port {text} is taken; choose another with {variable}") from None
    return int(text)


def _login() -> tuple[str, str] | None:
    given = os.environ.get(AUTH, "")
    if not given:
        return None
    user, colon, password = given.partition(":")
    if not user or not colon or len(password) < MIN_PASSWORD:
        raise UserError(f"{AUTH} must be user:password with a password of at least {MIN_PASSWORD} characters")
    return user, password


def _fresh(root: Path) -> dict[str, str]:
    """The variables of clients, from this environment; written into services.env before a server is there."""
    prefect, mlflow = _port("LOLCATS_PREFECT_PORT", 4200), _port("LOLCATS_MLFLOW_PORT", 5000)
    variables = {
        "LOLCATS_ROOT": str(root),
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow}",
        "PREFECT_API_URL": f"http://{HOST}:{prefect}/api",
        "PREFECT_HOME": str(root / ".prefect"),
    }
    if login := _login():
        variables |= {
            "MLFLOW_TRACKING_USERNAME": login[0],
            "MLFLOW_TRACKING_PASSWORD": login[1],
            "PREFECT_API_AUTH_STRING": ":".join(login),
        }
    # The experiment keeps its artifacts in mlartifacts/, whether the server or a command without it writes them.
    with _without("MLFLOW_TRACKING_URI"):
        experiment_id(connect(root))
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items()))
    _private(_state(root).with_suffix(".env"), exports)
    return variables


def _saved(root: Path) -> dict[str, str]:
    """What `_fresh` wrote.

    Raises:
        UserError: it is gone.
    """
    try:
        words = shlex.split(_state(root).with_suffix(".env").read_text(encoding="utf-8"))
    except OSError:
        raise UserError("some servers run, but .prefect/services.env is gone; `lolcats stop` ends them") from None
    return dict(word.split("=", 1) for word in words if word != "export")


def _server(root: Path, name: str, variables: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a server."""
    url = {"mlflow": variables["MLFLOW_TRACKING_URI"], "prefect": variables["PREFECT_API_URL"].removesuffix("/api")}
    listen = ["--host", HOST, "--port", url[name].rpartition(":")[2]]
    if name == "prefect":
        environment = {"PREFECT_SERVER_EVENTS_MESSAGING_BROKER": BROKER, **_prefect_environment(variables)}
        return [sys.executable, "-m", "prefect", "server", "start", *listen], environment
    command = [sys.executable, "-m", "mlflow", "server", *listen, "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(root / "mlartifacts")]
    if "MLFLOW_TRACKING_PASSWORD" in variables:
        command += ["--app-name", "basic-auth"]
    return command, _mlflow_environment(root, variables)


def _prefect_environment(variables: Mapping[str, str]) -> dict[str, str]:
    environment = {
        **os.environ,
        "DO_NOT_TRACK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Slots of a flow that was killed come back when its lease ends, also after the server was started anew.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        **variables,
    }
    environment.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    environment.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # nobody waits: a minute for a server to come back
    environment.pop(AUTH, None)
    if login := variables.get("PREFECT_API_AUTH_STRING"):
        environment["PREFECT_SERVER_API_AUTH_STRING"] = login
    return environment


def _mlflow_environment(root: Path, variables: Mapping[str, str]) -> dict[str, str]:
    environment = {**os.environ, "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # nothing here uses MLflow's own job runner
    for name in ("MLFLOW_TRACKING_URI", AUTH):
        environment.pop(name, None)
    if password := variables.get("MLFLOW_TRACKING_PASSWORD"):
        folder = root / ".prefect" / "mlflow-auth"
        if folder.exists():
            shutil.rmtree(folder)  # so that another password than last time counts
        folder.mkdir(parents=True, mode=0o700)
        lines = ["[mlflow]", "default_permission = NO_PERMISSIONS", f"database_uri = sqlite:///{folder / 'users.db'}"]
        lines += [f"admin_username = {variables['MLFLOW_TRACKING_USERNAME']}"]
        lines += [f"admin_password = {password.replace('%', '%%')}"]
        lines += ["authorization_function = mlflow.server.auth:authenticate_request_basic_auth"]
        _private(folder / "auth.ini", "\n".join(lines) + "\n")
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
        environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)
    return environment


def _private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, before anything stands in it."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    with path.open("w", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    kept = os.environ.pop(variable, None)
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if kept is not None:
            os.environ[variable] = kept
