"""Prefect's broker in memory for its server on SQLite, where transactions begin by waiting for their turn to write.

Prefect's own begin as readers. One that reads and then writes fails at once, whatever the time-outs, when another one
wrote in between ("database is locked": what it read is no longer the newest). The server then answers 503; and an event
whose automations met this four times is given up, or kept for 15 minutes where it followed another one: the message or
the restart that it stands for does not come. The more there is to do, the likelier. A transaction that asks to write
when it begins waits up to a minute for the others instead.

`tasks.operations.services` names this module as the server's broker, because the server imports its broker when it
starts.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.utilities.messaging.memory import Consumer, Publisher, break_topic, ephemeral_subscription

__all__ = ["Consumer", "Publisher", "break_topic", "ephemeral_subscription"]
_begin = AioSqliteConfiguration.begin_transaction


def _begin_to_write(
    self: AioSqliteConfiguration, session: Any, with_for_update: bool = True
) -> AbstractAsyncContextManager[Any]:
    """Prefect's transaction "for update", which SQLite begins with the right to write, whatever was asked for."""
    return _begin(self, session, with_for_update=True)


AioSqliteConfiguration.begin_transaction = _begin_to_write  # type: ignore[assignment,method-assign]
