"""Sources give records one at a time in a fixed order; what cannot be read is named with its reason."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams
from lolcats_core.data.sources import describe, raw_records, stdlib_documents, stdlib_files


def read(source: Path | str, root: Path, **changes: int) -> list[tuple[object, object]]:
    return [(raw.fields, raw.reason) for raw in raw_records(DataParams(source=str(source), **changes), root)]


def test_the_standard_library_is_large_and_holds_no_foreign_package_or_test() -> None:
    files = stdlib_files()
    assert len(files) > 300
    folders = {part for file in files for part in file.parts[:-1]}
    assert not {"site-packages", "dist-packages", "idlelib"} & folders
    assert "argparse.py" in {file.name for file in files}
    assert files == stdlib_files()
    assert [f.name for f in files[:20]] != sorted(f.name for f in files[:20])


def test_the_standard_library_is_readable_text() -> None:
    name, text = next(stdlib_documents())
    assert name.endswith(".py")
    assert text


def test_jsonl_lines_are_records_or_reasons(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b"", b"[1]", b"{broken", b'{"text": NaN}', b'{"text": "\xff"}', b'{"text": "b"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = read("x.jsonl", tmp_path)
    assert [fields for fields, reason in found if reason is None] == [{"text": "a"}, {"text": "b"}]
    reasons = [str(reason) for fields, reason in found if fields is None]
    assert [r.split(":")[0].split(" at ")[0] for r in reasons] == [
        "not an object but list",
        "not valid JSON",
        "not valid JSON",
        "not UTF-8",
    ]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_over_the_limit_is_skipped_and_the_next_one_read(tmp_path: Path, end: bytes) -> None:
    long = json.dumps({"text": "x" * 500}).encode()
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + long + b"\n" + b'{"text": "b"}' + end)
    found = read("x.jsonl", tmp_path, max_record_bytes=100)
    assert [fields for fields, _ in found] == [{"text": "a"}, None, {"text": "b"}]
    assert "longer than `data.max_record_bytes` 100" in str(found[1][1])


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "x.parquet")
    assert [fields for fields, _ in read("x.parquet", tmp_path)] == [{"text": "a"}, {"text": None}, {"text": "c"}]


def test_directories_and_globs_are_read_in_a_fixed_order(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(str(i))
    whole = read(".", tmp_path)
    assert sorted(fields["text"] for fields, _ in whole) == [str(i) for i in range(9)]  # type: ignore[index]
    assert whole == read(tmp_path, tmp_path / "elsewhere")
    assert len(read("[0-3].txt", tmp_path)) == 4


def test_text_files_that_are_broken_or_large_are_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt").write_text("x" * 99)
    reasons = sorted(str(reason) for _, reason in read(".", tmp_path, max_record_bytes=50))
    assert reasons == ["99 bytes, above `data.max_record_bytes` 50", "not UTF-8 at byte 0"]


@pytest.mark.parametrize("text", ["a paragraph of é words\n\n", "one line of é words\n", "é" * 7])
def test_a_long_text_is_cut_into_documents_that_together_are_the_text(tmp_path: Path, text: str) -> None:
    whole = "x" + text * 20_000
    (tmp_path / "book.txt").write_text(whole, encoding="utf-8")
    found = read("book.txt", tmp_path, max_record_bytes=100)
    parts = [fields["text"] for fields, _ in found]  # type: ignore[index]
    assert "".join(parts) == whole
    assert all(len(part.encode()) <= 1 << 16 for part in parts)
    assert all(part.endswith(text[-2:]) for part in parts)


def test_invalid_bytes_of_a_long_text_cost_their_part_alone(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"words\n" * 20_000 + b"\xff\n" + b"words\n" * 20_000)
    reasons = [reason for _, reason in read("book.txt", tmp_path) if reason]
    assert len(reasons) == 1
    assert "not UTF-8" in str(reasons[0])


def test_readmes_and_hidden_files_beside_data_are_no_records(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_text('{"text": "hidden"}\n')
    (tmp_path / "README.md").write_text("about")
    assert [fields for fields, _ in read(".", tmp_path)] == [{"text": "about"}]
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    assert [fields for fields, _ in read(".", tmp_path)] == [{"text": "a"}]


def test_what_a_directory_holds_besides_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.csv", "c.CSV", "d.jsonl", ".hidden"):
        (tmp_path / name).write_text("" if name == "d.jsonl" else '{"text": "a"}\n')
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    assert read(".", tmp_path) == [({"text": "a"}, None)]
    assert "of . 1 files are read; not read: 2 .csv, 1 empty, 1 link to a folder" in caplog.text


def test_a_link_to_nothing_and_a_folder_of_datasets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "saved" / "train").mkdir(parents=True)
    for name in ("dataset_dict.json", "train/state.json", "train/data-00000-of-00001.arrow"):
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds \.arrow files, which are not read; write Parquet"):
        read("saved", tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "text" / "b.jsonl").symlink_to("/unmounted/b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl is a link to /unmounted/b\.jsonl, which does not exist"):
        read("text", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", r"missing\.jsonl does not exist"),
        ("./nowhere", r"\./nowhere does not exist"),
        ("*.txt", r"nothing matches \*\.txt"),
        ("empty", r"empty holds no \.jsonl"),
        ("table.csv", r"table\.csv must end in \.jsonl"),
        ("broken.parquet", r"broken\.parquet is damaged"),
        ("owner/squad", r"squad does not exist; of the Hugging Face dataset owner/squad, `data\.revision` must"),
        ("org/name", r"`data\.revision` must be a commit of 40 hex digits .*, got None"),
        ("squad", r"squad does not exist, and is no Hugging Face dataset id \(owner/name\)"),
        ("data/**.jsonl", r"\*\* must stand alone between slashes"),
        ("~nosuchuser/x.txt", r"there is no user ~nosuchuser"),
        ("a\0b.txt", r"a path must not hold a NUL"),
        ("\udcff.txt", r"a path must be UTF-8"),
        ("a" * 300, r"255 in each name, got \d+ and 300"),
        ("a/" * 3000, r"at most 4096 bytes"),
        ("loop", r"loop cannot be read: Too many levels of symbolic links"),
        ("pipe.jsonl", r"must be a file or a directory, not a device, a pipe"),
        ("latin", r"is not UTF-8; rename the file"),
    ],
)
def test_sources_that_cannot_be_read_are_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.jsonl")  # nobody writes: whoever opened it would wait for ever
    (tmp_path / "latin").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "latin") + b"/\xe9.txt")).write_text("a")
    params = DataParams(source=source)
    with pytest.raises(UserError, match=message) as caught:
        _ = describe(params, tmp_path), list(raw_records(params, tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"org/name at a{40} cannot be reached .*HF_HUB_OFFLINE"):
        list(raw_records(DataParams(source="org/name", revision="a" * 40), tmp_path))


def test_memory_stays_bounded_for_a_large_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    with (tmp_path / "x.jsonl").open("w") as file:
        for _ in range(3000):
            file.write(line)
    tracemalloc.start()
    assert sum(1 for _ in raw_records(DataParams(source="x.jsonl"), tmp_path)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < (tmp_path / "x.jsonl").stat().st_size / 10


def test_a_byte_order_mark_is_no_part_of_a_text_or_a_record(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "b.py").write_bytes(mark + b"def f(): pass\n")
    (tmp_path / "c.txt").write_bytes(mark + b"line\n" * 20_000)
    found = {
        name: [record.fields["text"] for record in raw_records(DataParams(source=name), tmp_path) if record.fields]
        for name in ("a.jsonl", "b.py", "c.txt")
    }
    assert found["a.jsonl"] == ["first", "second"]
    assert found["b.py"] == ["def f(): pass\n"]
    assert "".join(found["c.txt"]) == "line\n" * 20_000
