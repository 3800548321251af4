"""Rows cut from arrays and files of token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lolcats_common.errors import UserError
from lolcats_core.data.arrays import TokenFileRows


def write(folder: Path, array: np.ndarray, name: str = "tokens.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


def test_a_file_is_cut_into_rows_of_any_length_in_order(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, 1003).astype(np.uint16)
    file = write(tmp_path, ids)
    for length in (8, 100, 1003):
        rows = TokenFileRows(file, length, 60_000)
        assert (len(rows), rows.sequence_length) == (1003 // length, length)
        batch = rows.batch(range(len(rows)))
        assert set(batch) == {"input_ids"}
        assert batch["input_ids"].flatten().tolist() == ids[: len(rows) * length].tolist()
        assert rows.batch(np.array([len(rows) - 1]))["input_ids"].shape == (1, length)


def test_the_digest_is_of_the_content_and_the_length(tmp_path: Path) -> None:
    ids = np.arange(100, dtype=np.uint16)
    first, same, other = write(tmp_path, ids, "a.npy"), write(tmp_path, ids, "b.npy"), write(tmp_path, ids + 1, "c.npy")
    digest = TokenFileRows(first, 10, 200).digest
    assert TokenFileRows(same, 10, 200).digest == digest
    assert len({digest, TokenFileRows(first, 20, 200).digest, TokenFileRows(other, 10, 200).digest}) == 3


@pytest.mark.parametrize(
    ("array", "length", "message"),
    [
        (np.zeros((4, 8), np.uint16), 8, r"one axis of unsigned token ids, got uint16 \[4, 8\]"),
        (np.zeros(32, np.int64), 8, r"got int64 \[32\]"),
        (np.zeros(7, np.uint16), 8, "a row must have 2 to 7 tokens, got 8"),
        (np.zeros(0, np.uint16), 8, "a row must have 2 to 0 tokens, got 8"),
        (np.full(32, 97, np.uint16), 8, "token id 97 where the teacher's ids are below 97"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, array: np.ndarray, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenFileRows(write(tmp_path, array), length, 97)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    for name in ("text.npy", "none.npy"):
        with pytest.raises(UserError, match=rf"{name}: not a .npy file of token ids"):
            TokenFileRows(tmp_path / name, 8, 97)
