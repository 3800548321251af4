"""What must not be told: passwords in addresses, and the values of variables that hold secrets.

`redacted` is the one place: every `UserError`, log record, uncaught traceback, page and state of Prefect, and whatever
is written to MLflow as text (`tasks/runner/mlflow_client.py`) goes through it.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import sys
import threading
import traceback
import urllib.parse
from types import TracebackType
from typing import Any

MASK = "***"
# How a word of a variable's name ends, between underscores, whose value is secret: not TOKENIZERS_PARALLELISM, and not
# PWD and OLDPWD, which hold directories.
_NAMES = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|(^|_)(API)?KEY|(^|_)AUTH|WEBHOOK|(^|_)PASS|_PWD|CREDENTIALS?|CONNECTION_STRING)"
    r"(_|$)",
    re.IGNORECASE,
)
_SHORTEST = 6  # characters; a shorter value also stands in harmless text
# Up to the last @ before the path; where a password holds / ? or #, what stands there is no port but has a colon.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*@|[^\s/?#:@'\"<>\[]*:(?!\d+[/?#])[^\s'\"<>]*@)")
_QUERY = re.compile(
    r"(?i)([?&][\w.-]*(?:token|password|passwd|pwd|secret|key|signature|sig|auth|credential)[\w.-]*=)[^&\s'\"<>]+"
)


def redacted(text: str) -> str:
    """`text` with user and password of every address, and every known secret, replaced by ``***``."""
    for secret in _known():
        text = text.replace(secret, MASK)
    return _QUERY.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))


def holds_login(text: str) -> bool:
    """Whether `text` is or has an address with a login, whatever the environment knows."""
    return bool(_USER_INFO.search(text) or _QUERY.search(text))


def _known() -> list[str]:
    """The secrets in this process's environment, in every form in which texts write them; the longest first."""
    found = set()
    for name, value in os.environ.items():
        if _NAMES.search(name):
            found |= {value, value.partition(":")[2]}  # user:password
        if "://" in value:
            for login in _USER_INFO.findall(value):
                found |= {login[:-1], login[:-1].partition(":")[2]}
    written = {form for secret in found for form in _forms(secret) if len(form) >= _SHORTEST}
    return sorted(written, key=len, reverse=True)


def _forms(secret: str) -> set[str]:
    """As it stands, as addresses, JSON, Python and HTML write it, and, of a login, as a header does."""
    plain = {secret, urllib.parse.unquote(secret)}
    forms = plain | {urllib.parse.quote(secret), urllib.parse.quote(secret, safe="")}
    for each in plain:
        forms |= {json.dumps(each)[1:-1], json.dumps(each, ensure_ascii=False)[1:-1], repr(each)[1:-1]}
        forms |= {
            html.escape(each),
            *([base64.b64encode(each.encode(errors="surrogateescape")).decode()] if ":" in each else []),
        }
    return forms


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
    threading.excepthook = _print_thread_exception


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _print_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is not SystemExit and arguments.exc_value is not None:
        _print_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
