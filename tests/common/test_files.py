"""Files and directories appear as a whole."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lolcats_common.errors import DiskRefused, UserError
from lolcats_common.files import (
    atomic_directory,
    atomic_file,
    files_below,
    read_json_lines,
    sha256_tree,
    write_json,
)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_in_a_new_directory_may_be_read_by_whoever_the_umask_lets(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with atomic_directory(tmp_path / "model") as partial:
            save_file({"weight": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {mode}


def test_a_block_that_fails_leaves_the_earlier_directory(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with atomic_directory(tmp_path / "model") as partial:
            (partial / "a").write_text(text)
            if text != "1":
                raise ValueError("broken")

    write("1")
    with pytest.raises(ValueError, match="broken"):
        write("2")
    assert (tmp_path / "model" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


WRITERS: dict[str, Callable[[Path], Any]] = {
    "torch.save": lambda path: torch.save({"weight": torch.zeros(100_000)}, path),
    "safetensors": lambda path: save_file({"weight": torch.zeros(100_000)}, path),
    "numpy": lambda path: np.save(path.open("wb"), np.zeros(100_000)),
    "tofile": lambda path: np.zeros(100_000).tofile(path),
    "text": lambda path: path.write_text("0" * 400_000),
}


def full(path: Path) -> Path:
    """Let a path lead to a disk without space."""
    path.symlink_to("/dev/full")
    return path


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes; the system refuses as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_refuses_is_said_in_one_line_with_the_path_whichever_library_writes(
    writer: str, tmp_path: Path
) -> None:
    write, path = WRITERS[writer], tmp_path / "model"
    advice = "; free space there and run the same command again"
    with file_size_limit(65_536):
        with pytest.raises(DiskRefused, match=rf"^{path}: .+{advice}$"), atomic_file(path) as partial:
            write(partial)
        with pytest.raises(DiskRefused, match=rf"^{path}: .+{advice}$"), atomic_directory(path) as partial:
            write(partial / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", sorted(WRITERS.keys() - {"safetensors"}))  # which renames a file of its own
def test_a_full_disk_is_said_to_be_full(writer: str, tmp_path: Path) -> None:
    with (
        pytest.raises(DiskRefused, match=f"^{tmp_path}/model: No space left on device; free space there"),
        atomic_file(tmp_path / "model") as partial,
    ):
        WRITERS[writer](full(partial))
    assert list(tmp_path.iterdir()) == []


def test_a_write_to_a_full_disk_inside_a_whole_directory_names_the_file(tmp_path: Path) -> None:
    with (
        file_size_limit(65_536),
        pytest.raises(DiskRefused, match=f"^{tmp_path}/out/.*/big.json: File too large"),
        atomic_directory(tmp_path / "out" / "stage") as out,
    ):
        write_json(out / "big.json", {"text": "0" * 100_000})


def test_another_error_of_a_library_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), atomic_file(tmp_path / "a"):
        raise RuntimeError("out of memory")
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        (tmp_path / "missing").read_text()


def test_files_below_are_those_that_rglob_finds_without_hidden_ones_if_asked(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/.d/e", ".f", "g/h/i"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "to a file").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    assert set(files_below(tmp_path)) == {path for path in tmp_path.rglob("*") if path.is_file()}
    shown = {path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path, hidden=False)}
    assert shown == {"a", "b/c", "g/h/i", "to a file"}


@pytest.mark.parametrize("read", [sha256_tree, lambda folder: list(files_below(folder))])
def test_a_directory_that_may_not_be_read_is_named_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the administrator, as whom tests may run, may read everything
    with pytest.raises(UserError, match=r"/closed cannot be read: Permission denied"):
        read(tmp_path)


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a"', '{"a": 1}\n[]\n', "\n"])
def test_lines_of_which_one_is_damaged_are_an_error_that_says_what_to_do(tmp_path: Path, text: str) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert read_json_lines(file, "") == [{"a": 1}, {"a": 2}]
    file.write_text(text)
    with pytest.raises(UserError, match=r"history\.jsonl .*; run it again"):
        read_json_lines(file, "run it again")
