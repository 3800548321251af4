"""How programs end: one line for what is the user's, a traceback for a defect."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from tasks.runner.exits import run_and_report


class Full(io.StringIO):
    """A buffered stream to a disk without space."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "some words")


def test_a_full_disk_behind_what_is_printed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert run_and_report(lambda: print("a table"), "lolcats") == 1
    assert capsys.readouterr().err == (
        "Error: the output: No space left on device; free space there and run the same command again\n"
    )


def test_a_refusal_of_the_disk_names_the_file_and_any_other_error_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(number: int) -> None:
        raise OSError(number, "some words", "/a/file")

    assert run_and_report(lambda: refused(errno.EROFS), "lolcats") == 1
    assert capsys.readouterr().err.startswith("Error: /a/file: Read-only file system; ")
    with pytest.raises(IsADirectoryError):
        run_and_report(lambda: refused(errno.EISDIR), "lolcats")
