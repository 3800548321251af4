"""Token rows on disk: what is written comes back, and nothing damaged is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_core.data.rows import TokenRows, TokenRowsWriter


def write_rows(path: Path, rows: int = 7, length: int = 5, vocab: int = 300) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    columns = {
        "input_ids": generator.integers(0, vocab, (rows, length)),
        "position_ids": np.tile(np.arange(length), (rows, 1)),
        "loss_mask": generator.integers(0, 2, (rows, length)).astype(bool),
    }
    with TokenRowsWriter(path, sequence_length=length, vocab_size=vocab, columns=tuple(columns)) as writer:
        for row in range(rows):
            writer.append(**{name: values[row] for name, values in columns.items()})
    return columns


@pytest.mark.parametrize("vocab", [2, 256, 257, 65_536, 65_537, 200_000])
def test_rows_come_back_as_written_whatever_the_vocabulary(tmp_path: Path, vocab: int) -> None:
    columns = write_rows(tmp_path / "rows", vocab=vocab)
    rows = TokenRows.open(tmp_path / "rows", verify=True)
    assert (len(rows), rows.sequence_length, rows.vocab_size, rows.tokens) == (7, 5, vocab, 35)
    assert rows.columns == ("input_ids", "position_ids", "loss_mask")
    where = [6, 0, 3, 3]
    batch = rows.batch(where)
    assert [batch[name].dtype for name in rows.columns] == [torch.int64, torch.int64, torch.bool]
    for name, values in columns.items():
        assert np.array_equal(batch[name].numpy(), values[where])


def test_optional_columns_are_absent_when_not_written(tmp_path: Path) -> None:
    with TokenRowsWriter(tmp_path / "rows", sequence_length=4, vocab_size=9) as writer:
        writer.append(input_ids=np.arange(8).reshape(2, 4))
    assert set(TokenRows.open(tmp_path / "rows").batch(np.array([1]))) == {"input_ids"}


def test_a_batch_may_be_changed_without_changing_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows")
    rows = TokenRows.open(tmp_path / "rows")
    before = rows.batch([2])["input_ids"].clone()
    rows.batch([2])["input_ids"].fill_(1)
    assert torch.equal(rows.batch([2])["input_ids"], before)


def test_no_rows_is_a_valid_directory(tmp_path: Path) -> None:
    with TokenRowsWriter(tmp_path / "rows", sequence_length=4, vocab_size=9):
        pass
    rows = TokenRows.open(tmp_path / "rows")
    assert len(rows) == 0
    assert rows.batch([])["input_ids"].shape == (0, 4)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    write_rows(tmp_path / "a")
    write_rows(tmp_path / "b")
    write_rows(tmp_path / "c", rows=6)
    digests = [TokenRows.open(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_a_failed_write_leaves_the_old_rows_and_no_partial_ones(tmp_path: Path) -> None:
    columns = write_rows(tmp_path / "rows")

    def fail() -> None:
        with TokenRowsWriter(tmp_path / "rows", sequence_length=4, vocab_size=9) as writer:
            writer.append(input_ids=[1, 2, 3, 4])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    assert np.array_equal(TokenRows.open(tmp_path / "rows").batch(range(7))["input_ids"].numpy(), columns["input_ids"])


@pytest.mark.parametrize("value", [-1, 9])
def test_a_token_outside_the_vocabulary_is_the_users_error(tmp_path: Path, value: int) -> None:
    with (
        TokenRowsWriter(tmp_path / "rows", sequence_length=2, vocab_size=9) as writer,
        pytest.raises(UserError, match=f"token id {value} lies outside the teacher's vocabulary of 9"),
    ):
        writer.append(input_ids=[0, value])


@pytest.mark.parametrize(
    "columns",
    [{}, {"input_ids": [1, 2, 3]}, {"input_ids": [1, 2], "loss_mask": [1, 1]}, {"loss_mask": [1, 1]}],
    ids=["none", "wrong length", "column not the writer's", "other column"],
)
def test_rows_of_the_wrong_shape_are_refused(tmp_path: Path, columns: dict[str, list[int]]) -> None:
    with (
        TokenRowsWriter(tmp_path / "rows", sequence_length=2, vocab_size=9) as writer,
        pytest.raises(ValueError, match=r"columns must be|rows must be"),
    ):
        writer.append(**columns)


def truncate(path: Path) -> None:
    (path / "input_ids.bin").write_bytes((path / "input_ids.bin").read_bytes()[:-1])


def rewrite_header(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        header = json.loads((path / "rows.json").read_text())
        (path / "rows.json").write_text(json.dumps({**header, **changes}))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no header": (lambda path: (path / "rows.json").unlink(), "half-written"),
    "header cut short": (lambda path: (path / "rows.json").write_text('{"rows": 3,'), "not valid JSON"),
    "header not UTF-8": (lambda path: (path / "rows.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    "header of another kind": (lambda path: (path / "rows.json").write_text("[]"), "not a header"),
    "unknown dtype": (rewrite_header(dtype={"input_ids": "float"}), "not a header"),
    "negative rows": (rewrite_header(rows=-1), "not a header"),
    "rows not a number": (rewrite_header(rows="7"), "not a header"),
    "more rows than bytes": (rewrite_header(rows=8), "damaged"),
    "column cut short": (truncate, "damaged"),
    "column missing": (lambda path: (path / "loss_mask.bin").unlink(), "missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    write_rows(tmp_path / "rows")
    damage(tmp_path / "rows")
    with pytest.raises(UserError, match=message) as caught:
        TokenRows.open(tmp_path / "rows")
    assert "\n" not in str(caught.value)


def test_an_absent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        TokenRows.open(tmp_path / "rows")


def test_changed_bytes_of_the_same_size_are_found_when_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", vocab=300)
    file = tmp_path / "rows" / "input_ids.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(UserError, match="SHA-256 differs"):
        TokenRows.open(tmp_path / "rows", verify=True)
    with pytest.raises(UserError, match="must be below 300"):
        TokenRows.open(tmp_path / "rows").batch([0])
