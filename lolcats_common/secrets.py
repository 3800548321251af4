"""What must not be told: passwords in addresses, and the values of variables that hold secrets.

`redacted` is the one place: every `UserError`, log record, uncaught traceback, and MLflow tag, parameter and text goes
through it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import urllib.parse
from types import TracebackType
from typing import Any

MASK = "***"
# Words of a variable's name, between underscores, whose value is secret: not TOKENIZERS_PARALLELISM.
_NAMES = {"TOKEN", "PASSWORD", "PASSWD", "SECRET", "KEY", "AUTH", "WEBHOOK"}
_SHORTEST = 6  # characters; a shorter value also stands in harmless text
_USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"<>]*@")
_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|password|secret|key|signature|auth)[\w.-]*=)[^&\s'\"<>]+")


def redacted(text: str) -> str:
    """`text` with user and password of every address, and every known secret, replaced by ``***``."""
    for secret in _known():
        text = text.replace(secret, MASK)
    return _QUERY.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))


def _known() -> list[str]:
    """The secrets in this process's environment, as they stand and as addresses write them; the longest first."""
    found = set()
    for name, value in os.environ.items():
        if _NAMES & set(name.upper().split("_")):
            found |= {value, value.partition(":")[2]}  # user:password
        if "://" in value:
            for login in _USER_INFO.findall(value):
                found.add(login[:-1].partition(":")[2])
    written = {form for secret in found for form in (secret, urllib.parse.quote(secret), urllib.parse.unquote(secret))}
    return sorted((each for each in written if len(each) >= _SHORTEST), key=len, reverse=True)


class RedactedRecord(logging.LogRecord):
    """A log record that no handler, Prefect's among them, can make tell a secret."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0]:
            # Formatters take this text in place of one of their own.
            self.exc_text = redacted("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:
        """The message with its arguments."""
        return redacted(super().getMessage())


def keep_secrets() -> None:
    """Let every log record and every uncaught traceback of this process go through `redacted`."""
    logging.setLogRecordFactory(RedactedRecord)
    sys.excepthook = _print_exception


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
