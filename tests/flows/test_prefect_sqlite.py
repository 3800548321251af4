"""Transactions of Prefect's server on SQLite wait for each other instead of failing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from tasks.operations import services
from tests.conftest import ROOT

# Two transactions that read before they write, as those do that count events for an automation; the second one runs
# between the first one's reading and writing, if it can.
OVERLAPPING = """
import asyncio, sys
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.utilities.messaging import create_publisher

create_publisher("events")  # imports the broker, as the server does when it starts

async def main():
    database = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{sys.argv[1]}")
    engine = await database.engine()
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE counts (n INTEGER)"))
        await connection.execute(sa.text("INSERT INTO counts VALUES (0)"))
    read, counted = asyncio.Event(), asyncio.Event()

    async def count(between):
        async with await database.session(engine) as session:
            async with database.begin_transaction(session):
                n = (await session.execute(sa.text("SELECT n FROM counts"))).scalar_one()
                await between()
                await session.execute(sa.text(f"UPDATE counts SET n = {n + 1}"))

    async def first():
        async def between():
            read.set()
            await (counted.wait() if sys.argv[2] == "to the end" else asyncio.sleep(0.3))
        await count(between)

    async def second():
        await read.wait()
        await count(lambda: asyncio.sleep(0))
        counted.set()

    found = await asyncio.gather(first(), second(), return_exceptions=True)
    async with engine.connect() as connection:
        n = await connection.scalar(sa.text("SELECT n FROM counts"))
    print([type(error).__name__ for error in found if error], n)
    await engine.dispose()

asyncio.run(main())
"""


def overlapped(tmp_path: Path, environment: dict[str, str], second_runs: str) -> str:
    command = [sys.executable, "-c", OVERLAPPING, str(tmp_path / "counts.db"), second_runs]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_transactions_that_read_before_they_write_both_succeed(tmp_path: Path) -> None:
    addresses = {"PREFECT_API_URL": "http://127.0.0.1:1/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:2"}
    variables = {**addresses, "PREFECT_HOME": str(tmp_path)}
    _, environment = services._server(tmp_path, "prefect", variables)
    assert overlapped(tmp_path, environment, "if it can") == "[] 2"


def test_without_it_one_of_them_fails_which_is_why_it_is_there(tmp_path: Path) -> None:
    """Once this fails, Prefect waits by itself, and `flows.prefect_sqlite` can go."""
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    assert overlapped(tmp_path, environment, "to the end") == "['OperationalError'] 1"


def test_the_server_s_broker_is_a_module_that_exists() -> None:
    assert importlib.util.find_spec(services.BROKER) is not None
