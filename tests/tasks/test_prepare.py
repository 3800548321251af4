"""The prepare stage: what it writes, that nothing straddles the split, and one clear error for each broken input."""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pandera.errors import SchemaError
from transformers.utils import chat_template_utils

from lolcats_common.errors import UserError
from lolcats_common.params import Params, params_from_dict
from lolcats_core.data.readers import RawRecord
from lolcats_core.data.rows import TokenRows
from lolcats_core.teacher.pin import TeacherPin
from tasks import prepare
from tasks.runner.record_schemas import check_rows
from tests.core.data.test_conversations import CALLING, TOOL_TEMPLATE, TOOLS
from tests.core.tiny import tiny_tokenizer

LENGTH = 32
PIN: dict[str, Any] = dict.fromkeys([field.name for field in fields(TeacherPin)], 0) | {
    "source": "tiny",
    "trust_remote_code": False,
    "files": {},
}
TOKENIZER = tiny_tokenizer()


class FakeStage:
    """A stage without a harness."""

    def __init__(self, work: Path, params: Params) -> None:
        self.root, self.params = work, params
        self.out, self.scratch = work / "out", work / "scratch"
        for folder in (self.out, self.scratch):
            folder.mkdir(exist_ok=True)
        pin = self.input("teacher")
        TOKENIZER.save_pretrained(pin / "tokenizer")
        (pin / "teacher.json").write_text(json.dumps(PIN | {"vocab_size": len(TOKENIZER)}))
        self.datasets: list[Any] = []

    def input(self, stage: str) -> Path:
        path = self.root / "outputs" / stage
        path.mkdir(parents=True, exist_ok=True)
        return path

    def log_dataset(self, *values: Any) -> None:
        self.datasets.append(values)


def run(work: Path, **data: Any) -> tuple[FakeStage, dict[str, float]]:
    values = {"source": "data.jsonl", "sequence_length": LENGTH, "validation_share": 0.2} | data
    stage = FakeStage(work, params_from_dict({"data": values}))
    return stage, dict(prepare.run(stage))  # type: ignore[arg-type]


def texts(count: int, seed: int = 0) -> list[str]:
    words = random.Random(seed)
    return [f"document {i}: " + " ".join(words.choices(["the", "quick", "brown", "fox"], k=12)) for i in range(count)]


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def documents(path: Path) -> set[str]:
    """Documents that lie whole inside the rows of a concatenated split."""
    rows = TokenRows.open(path)
    stream = TOKENIZER.decode(rows.batch(np.arange(len(rows)))["input_ids"].flatten())
    return set(stream.split("<eos>")[1:-1])


def test_rows_hold_the_documents_and_no_document_is_on_both_sides(tmp_path: Path) -> None:
    given = texts(200)
    write(tmp_path / "data.jsonl", [{"text": text} for text in [*given, *given[:50], given[3] + "\n"]])
    stage, metrics = run(tmp_path)
    assert (metrics["records_read"], metrics["duplicates"], metrics["records_rejected"]) == (251, 51, 0)
    assert metrics["train_documents"] + metrics["validation_documents"] == 200
    train, validation = documents(stage.out / "train"), documents(stage.out / "validation")
    assert train
    assert validation
    assert not train & validation
    assert train | validation <= set(given)
    assert 0.1 < metrics["validation_documents"] / 200 < 0.3
    record = json.loads((stage.out / "data.json").read_text())
    assert list(record["files"].values()) == [hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()]
    assert [entry[3] for entry in stage.datasets] == ["training", "validation"]


def test_the_split_of_a_document_depends_on_its_content_alone(tmp_path: Path) -> None:
    given = texts(120)
    sides = []
    for name, order in (("a", given), ("b", given[::-1]), ("c", given[:60] + texts(500, seed=1))):
        work = tmp_path / name
        work.mkdir()
        write(work / "data.jsonl", [{"text": text} for text in order])
        stage, _ = run(work)
        sides.append({side: documents(stage.out / side) for side in prepare.SPLITS})
    for other in sides[1:]:
        assert not sides[0]["train"] & other["validation"]
        assert not sides[0]["validation"] & other["train"]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.jsonl", [{"text": text} for text in texts(100)])
        stage, _ = run(tmp_path / name, packing="documents")
        digests.append([TokenRows.open(stage.out / side, verify=True).digest for side in prepare.SPLITS])
    assert digests[0] == digests[1]


def test_bounds_on_tokens_hold(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"text": text} for text in texts(1200)])
    _, metrics = run(tmp_path, max_train_tokens=10 * LENGTH + 5, max_validation_tokens=3 * LENGTH)
    assert (metrics["train_rows"], metrics["validation_rows"]) == (10, 3)
    assert metrics["records_read"] < 1200


def test_packed_documents_have_positions_and_masks(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"instruction": t, "output": "yes " * 9} for t in texts(60)])
    stage, _ = run(tmp_path, packing="documents", loss_on="completion", sequence_length=512)
    rows = TokenRows.open(stage.out / "train")
    batch = rows.batch(np.arange(len(rows)))
    scored = TOKENIZER.decode(batch["input_ids"][batch["loss_mask"]])
    assert set(scored.split("<eos>")) == {"yes " * 9, ""}
    assert (batch["position_ids"] == 0).sum() > len(rows)


@pytest.mark.parametrize("packing", ["concatenated", "documents"])
def test_every_other_training_row_stands_anywhere_in_its_range_and_validation_rows_at_its_start(
    tmp_path: Path, packing: str
) -> None:
    found = []
    for name, below in {"placed": 10 * LENGTH, "again": 10 * LENGTH, "plain": None}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.jsonl", [{"text": text} for text in texts(200)])
        found.append(run(tmp_path / name, packing=packing, position_range=below)[0].out)
    rows, again, before = (TokenRows.open(out / "train") for out in found)
    assert rows.digest == again.digest
    batch, old = (each.batch(np.arange(len(each))) for each in (rows, before))
    assert torch.equal(batch["input_ids"], old["input_ids"])
    places = batch["position_ids"][:, 0]
    positions = old.get("position_ids", torch.arange(LENGTH).expand(len(rows), -1))
    assert torch.equal(batch["position_ids"], positions + places[:, None])
    assert int(batch["position_ids"].max()) < 10 * LENGTH
    assert not places[::2].any()
    assert 0 <= int(places[1::2].min()) < 3 * LENGTH < 6 * LENGTH < int(places.max())
    held_out = TokenRows.open(found[0] / "validation")
    assert "position_ids" not in held_out.columns or int(held_out.batch([0])["position_ids"][0, 0]) == 0


def test_chat_records_are_laid_out_by_the_template(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "fine"}] for t in texts(80)]
    write(tmp_path / "data.jsonl", [{"messages": messages} for messages in turns])
    stage, metrics = run(tmp_path, loss_on="completion")
    assert metrics["records_rejected"] == 0
    rows = TokenRows.open(stage.out / "train")
    batch = rows.batch(np.arange(len(rows)))
    assert "document" not in TOKENIZER.decode(batch["input_ids"][batch["loss_mask"]])


def conversations(path: Path) -> set[str]:
    """What follows each user's turn up to the next, in the rows of a split."""
    rows = TokenRows.open(path)
    stream = TOKENIZER.decode(rows.batch(np.arange(len(rows)))["input_ids"].flatten())
    return set(stream.split("<|user|>")[1:-1])


def test_rows_and_splits_of_chats_are_the_same_on_every_day_and_for_every_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ strftime_now('%d %b %Y') }}" + TOKENIZER.chat_template)
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "fine"}] for t in texts(80)]
    runs = {}
    for name, (day, loss) in {"today": (1, "all"), "tomorrow": (2, "all"), "masked": (3, "completion")}.items():
        clock = type("Clock", (), {"now": staticmethod(lambda day=day: datetime.date(2026, 1, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.jsonl", [{"messages": messages} for messages in turns])
        runs[name] = run(tmp_path / name, loss_on=loss)[0].out
        assert json.loads((runs[name] / "data.json").read_text())["chat_date"] == "2024-07-26"
    for side in prepare.SPLITS:
        assert len({TokenRows.open(runs[name] / side).digest for name in ("today", "tomorrow")}) == 1
        assert conversations(runs["today"] / side) == conversations(runs["masked"] / side)
    assert any("26 Jul 2024" in text for text in conversations(runs["today"] / "train"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tool_calls_and_their_definitions_are_in_the_rows_whatever_file_they_come_from(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TOOL_TEMPLATE)
    records = [{"messages": [{**CALLING[0], "content": t}, *CALLING[1:]], "tools": TOOLS} for t in texts(60)]
    if kind == "jsonl":
        null = {**CALLING[1], "content": None}
        write(tmp_path / "data.jsonl", [{**r, "messages": [r["messages"][0], null, *CALLING[2:]]} for r in records])
    else:  # one type for all objects: every message has `tool_calls`, the definitions have gaps
        plain = {"messages": CALLING[::3], "tools": [{"type": "function", "function": {"name": "x", "strict": True}}]}
        pq.write_table(pa.Table.from_pylist([*records, plain]), tmp_path / "data.parquet")
    stage, metrics = run(
        tmp_path, source=f"data.{kind}", loss_on="completion", packing="documents", sequence_length=512
    )
    assert metrics["records_rejected"] == 0
    rows = TokenRows.open(stage.out / "train")
    batch = rows.batch(np.arange(len(rows)))
    text, learnt = (
        TOKENIZER.decode(batch["input_ids"].flatten()),
        TOKENIZER.decode(batch["input_ids"][batch["loss_mask"]]),
    )
    call = '<call>get_weather{"city": "Paris"}</call><|end|>'
    assert text.count("get_weather: weather of a city") == text.count(call) == learnt.count(call) > 30
    assert "None" not in text


BAD: list[tuple[Any, str]] = [
    ({"text": ""}, "`text` is empty"),
    ({"text": "  \n"}, "`text` is empty"),
    ({"text": None}, "`text` is not text"),
    ({"text": 3}, "`text` is not text"),
    ({"text": ["a"]}, "`text` is not text"),
    ({"body": "a"}, "columns must be text"),
    ({"\ud800": "a"}, r"got \ud800"),
    ({"text": json.loads("[" * 400 + "]" * 400)}, "`text` is not text"),
    ([1], "not an object but list"),
    ({"instruction": "a", "output": None}, "`output` is not text"),
    ({"instruction": "a", "input": 3, "output": "b"}, "`input` is not text"),
    ({"messages": []}, "`messages` is not a list of messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "`messages` is not a list of messages"),
    ({"text": "a\ud800b"}, "`text` is not valid Unicode"),
    ({"instruction": "a", "input": "\udfff", "output": "b"}, "`input` is not valid Unicode"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "`messages` is not valid Unicode"),
    ({"messages": [{"role": "user", "content": " "}]}, "`messages` is not a list of messages"),
    ({"messages": [{"role": "user"}]}, "`messages` is not a list of messages"),
    ({"messages": [{"role": "user", "content": None}]}, "`messages` is not a list of messages"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part of type input_audio"),
    ({"messages": CALLING, "tools": "none"}, "`tools` is not a list of tool definitions"),
    ({"messages": CALLING, "tools": TOOLS}, "the chat template leaves out `tools`"),
    ({"messages": CALLING[::3], "tools": [{"name": "\ud800"}]}, "`tools` is not valid Unicode"),
    ({"conversations": [{"from": "human", "value": 3}]}, "`messages` is not a list of messages"),
    ({"text": "x" * 5000}, "above `data.max_record_bytes`"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[ascii(record)[:40] for record, _ in BAD])
def test_bad_records_are_rejected_with_their_reason_and_counted(tmp_path: Path, record: Any, reason: str) -> None:
    good = [{"text": text} for text in texts(150)]
    write(tmp_path / "data.jsonl", [*good[:70], record, *good[70:]])
    stage, metrics = run(tmp_path, max_record_bytes=4000)
    (rejected,) = [json.loads(line) for line in (stage.out / "rejected.jsonl").read_text().splitlines()]
    assert rejected["where"] == "data.jsonl:71"
    assert reason in rejected["reason"].replace("longer than", "above")
    assert metrics["records_rejected"] == 1
    assert metrics["rejected_share"] == pytest.approx(1 / 151)


def test_parquet_text_that_is_not_utf8_is_rejected_and_the_rest_is_read(tmp_path: Path) -> None:
    given = [text.encode() for text in texts(150)]
    given[7] = b"ok\xff\xfe"
    offsets = np.cumsum([0, *map(len, given)]).astype(np.int32)
    column = pa.Array.from_buffers(pa.string(), 150, [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(given))])
    pq.write_table(pa.table({"text": column, "unused": [float("nan")] * 150}), tmp_path / "data.parquet")
    stage, metrics = run(tmp_path, source="data.parquet")
    assert (metrics["records_read"], metrics["records_rejected"]) == (150, 1)
    (rejected,) = [json.loads(line) for line in (stage.out / "rejected.jsonl").read_text().splitlines()]
    assert rejected == {"where": "data.parquet:8", "reason": "not UTF-8 at byte 2"}


def test_nan_as_alpaca_input_in_parquet_is_rejected(tmp_path: Path) -> None:
    table = {"instruction": texts(90), "input": [float("nan")] * 90, "output": ["fine"] * 90}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"90 of 90 records were rejected.*`input` is not text"):
        run(tmp_path, source="data.parquet")


def test_with_a_bound_on_training_alone_reading_ends_once_validation_has_a_row(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"text": text} for text in texts(3000)])
    _, metrics = run(tmp_path, max_train_tokens=10 * LENGTH)
    assert metrics["train_rows"] == 10
    assert metrics["validation_rows"] >= 1
    assert metrics["records_read"] < 3000


@pytest.mark.parametrize("bound", ["max_train_tokens", "max_validation_tokens"])
def test_a_bound_below_one_row_is_refused(tmp_path: Path, bound: str) -> None:
    write(tmp_path / "data.jsonl", [{"text": text} for text in texts(10)])
    with pytest.raises(UserError, match=f"`data.{bound}` must be null or at least one row .* 32, got 31"):
        run(tmp_path, **{bound: LENGTH - 1})


def test_plain_text_has_no_completion_to_score(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"text": text} for text in texts(10)])
    with pytest.raises(UserError, match=r"set `data\.loss_on: all`"):
        run(tmp_path, loss_on="completion")


def test_records_are_taken_in_batches_bounded_by_their_size() -> None:
    small, huge = RawRecord("a", {"text": "x"}), RawRecord("b", {"messages": [{"content": "y" * prepare.BATCH_BYTES}]})
    records = iter([small, huge, small, huge, huge, RawRecord("c", reason="broken")])
    assert [len(batch) for batch in iter(lambda: prepare._batch(records), ())] == [2, 2, 1, 1]


def test_numbers_in_parquet_are_rejected_not_turned_into_text(tmp_path: Path) -> None:
    values = [*texts(150), None]
    pq.write_table(pa.table({"text": values}), tmp_path / "data.parquet")
    stage, metrics = run(tmp_path, source="data.parquet")
    assert metrics["records_rejected"] == 1
    assert "`text` is not text" in (stage.out / "rejected.jsonl").read_text()


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        (b"", {}, "holds no record"),
        (b"\n\n\n", {}, "holds no record"),
        (b"\xff\xfe\xfd\n", {}, r"1 of 1 records were rejected.*not UTF-8"),
        (b'{"text": NaN}\n', {}, r"1 of 1 records were rejected.*NaN is not JSON"),
        (b'{"a": 1}\n' * 3, {}, r"3 of 3 records were rejected.*columns must be text.*got a"),
        (b'{"text": "short"}\n', {}, r"no train row of 32 tokens|no validation row of 32 tokens"),
        (b'{"text": "' + b"x" * 9000 + b'"}\n', {"max_record_bytes": 100}, "longer than `data.max_record_bytes` 100"),
        (b'{"text": "abc"', {}, "not valid JSON"),
        (b"\0" * 64, {}, "not valid JSON"),
    ],
)
def test_broken_files_end_in_one_clear_error(
    tmp_path: Path, content: bytes, data: dict[str, Any], message: str
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, **data)
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "out").glob("*/rows.json"))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", [{"text": text} for text in texts(50)])
    stage = FakeStage(tmp_path, params_from_dict({"data": {"source": "data.jsonl", "sequence_length": LENGTH}}))
    (tmp_path / "outputs/teacher/teacher.json").write_text(json.dumps(PIN | {"vocab_size": 40}))
    with pytest.raises(UserError, match="the model embeddings for 40 tokens only"):
        prepare.run(stage)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_standard_library_makes_the_demo_s_rows(tmp_path: Path) -> None:
    stage, metrics = run(tmp_path, source="builtin", max_train_tokens=40_000, max_validation_tokens=4_000)
    assert metrics["train_tokens"] == 40_000 // LENGTH * LENGTH
    assert metrics["rejected_share"] < 0.01
    assert "import " in TOKENIZER.decode(
        TokenRows.open(stage.out / "train").batch(np.arange(200))["input_ids"].flatten()
    )


def test_only_placed_rows_may_begin_elsewhere_than_at_0() -> None:
    row = {"input_ids": np.zeros((2, 4), np.int64), "position_ids": np.array([[0, 1, 0, 1], [3, 4, 3, 4]])}
    check_rows(row, 9, 4, below=8)
    for below in (None, 4):  # not from 0 on; and beyond the range
        with pytest.raises(SchemaError):
            check_rows(row, 9, 4, below)
    with pytest.raises(SchemaError):
        check_rows({**row, "position_ids": np.array([[0, 1, 2, 3], [1, 2, 3, 3]])}, 9, 4)
