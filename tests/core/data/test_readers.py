"""Every kind of file gives the records that are in it, in bounded memory, and says what it cannot read."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams
from lolcats_core.data import readers
from lolcats_core.data.readers import file_records
from lolcats_core.data.sources import raw_records
from tests.conftest import ROOT
from tests.flows.operations import LIGHT

LIMIT = 4_000_000
RECORDS: list[dict[str, Any]] = [
    {"text": 'a "quoted" [text], {with} \\ all\nof it'},
    {"messages": [{"role": "user", "content": "é [1, 2]"}, {"role": "assistant", "content": "}{"}]},
    {"text": "", "nested": {"a": [[], {}, [{"b": None}]]}},
]
LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "array": json.dumps,
    "indented array": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "objects after one another": lambda records: "".join(json.dumps(r, indent=1) for r in records),
    "lines": lambda records: "".join(json.dumps(r) + "\n" for r in records),
    "empty lines around": lambda records: "\n\n " + json.dumps(records) + "\n\n",
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def read(file: Path, limit: int = LIMIT) -> list[dict[str, Any] | str | None]:
    return [raw.fields if raw.reason is None else raw.reason for raw in file_records(file, file.name, limit)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_is_read_however_it_is_laid_out_and_packed(layout: str, mark: bytes, packed: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.json{packed}"
    file.write_bytes(PACKED[packed](mark + LAYOUTS[layout](RECORDS).encode()))
    assert read(file) == RECORDS
    if layout == "lines":
        assert read(file.rename(tmp_path / f"data.jsonl{packed}")) == RECORDS


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\[]{},'), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(st.text('ab\\"'), values, max_size=3), max_size=5), st.integers(1, 40), st.booleans())
def test_elements_are_found_wherever_the_pieces_that_are_read_end(
    tmp_path: Path, records: list[dict[str, Any]], size: int, ascii_only: bool
) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(readers, "_CHUNK", size)
        assert read(file) == records


def test_elements_that_are_broken_or_too_long_cost_themselves_alone(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('[{"text": "a"}, {"text": b}, 3, [4], {"text": "' + "x" * 300 + '"}, {"text": NaN}, {"text": "c"}]')
    found = read(file, 100)
    assert [found[0], found[-1]] == [{"text": "a"}, {"text": "c"}]
    reasons = [str(reason).split(":")[0] for reason in found[1:-1]]
    long = "longer than `data.max_record_bytes` 100"
    assert reasons == ["not valid JSON", "not an object but int", "not an object but list", long, "not valid JSON"]
    file.write_text('nothing [} of "JSON"} {"text": "d"}')
    assert read(file)[-1] == {"text": "d"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_cut_off_or_of_another_kind_is_damaged(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"data{suffix}"
    whole = PACKED[file.suffix if file.suffix in PACKED else ""](
        json.dumps([{"text": os.urandom(2000).hex()}]).encode()
    )
    contents = [whole[: len(whole) // 2], b"nothing of the kind"]
    for content in contents if suffix != ".json" else contents[:1]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"data\{suffix} (is damaged|cannot be read): ") as caught:
            list(raw_records(DataParams(source=file.name), tmp_path))
        assert len(str(caught.value).splitlines()) == 1


def test_a_large_array_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 1 << 16)
    (tmp_path / "x.json").write_text(json.dumps([{"text": "x" * 10_000}] * 2000))
    tracemalloc.start()
    assert sum(1 for _ in file_records(tmp_path / "x.json", "x", LIMIT)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < (tmp_path / "x.json").stat().st_size / 10


def test_one_large_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    texts = [os.urandom(2000).hex() for _ in range(16_000)]
    chats = [[{"role": "user", "content": text[:2000]}] for text in texts]
    pq.write_table(pa.table({"text": texts, "messages": chats, "more": texts}), tmp_path / "x.parquet")
    del texts, chats
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for _ in file_records(tmp_path / "x.parquet", "x", LIMIT):
        count, peak = count + 1, max(peak, pa.total_allocated_bytes() - before)
    assert count == 16_000
    assert peak < 25_000_000 < (tmp_path / "x.parquet").stat().st_size / 2


def test_large_rows_of_a_table_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_ROW_BYTES", 20_000)
    texts = [os.urandom(5000).hex() for _ in range(20)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    sizes: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counted(self: Any, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        return original(self, batch_size=batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert read(tmp_path / "x.parquet") == [{"text": text} for text in texts]
    assert sizes == [1]


def test_objects_of_a_table_have_no_keys_that_they_lack(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"a": {"type": "x"}}}]},
        {
            "messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}],
            "tools": [{"name": "g", "parameters": {"b": 1}}],
        },
    ]
    pq.write_table(pa.Table.from_pylist([*records, {"messages": None, "tools": []}]), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [*records, {"messages": None, "tools": []}]


@pytest.mark.parametrize(
    ("files", "records"),
    [
        ({"a.json": [{"text": "json"}], "README.md": "about", "LICENSE.txt": "free"}, ["json"]),
        ({"a.json": [{"text": "json"}], "a.txt": "text"}, ["text"]),
        ({"a.json": [{"text": "json"}], "notes.md": "text"}, ["text"]),
        ({"a.json": [{"text": "json"}], "b.jsonl": [{"text": "line"}], "a.txt": "text"}, ["line"]),
        ({"README.md": "about"}, ["about"]),
        ({"A.JSONL": [{"text": "line"}], "b.ndjson": [{"text": "new"}], "C.TXT": "text"}, ["line", "new"]),
        ({"A.TXT": "text", "__init__.py": ""}, ["text"]),
    ],
)
def test_of_a_directory_the_files_that_are_records_are_read(
    files: dict[str, Any], records: list[str], tmp_path: Path
) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
        (tmp_path / name).write_text(text)
    found = [raw.fields["text"] for raw in raw_records(DataParams(source="."), tmp_path) if raw.fields]
    assert found == records


def test_a_value_that_a_dictionary_repeats_is_not_decoded_for_many_rows_at_once(tmp_path: Path) -> None:
    path, size = tmp_path / "x.parquet", 1 << 23
    pq.write_table(pa.table({"text": ["a" * size] * 64}), path, compression="zstd", dictionary_pagesize_limit=size * 2)
    assert path.stat().st_size < 12_000
    before, most = pa.total_allocated_bytes(), 0
    for record in file_records(path, "x", 1 << 30):
        assert record.fields is not None
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 12 * size  # 64 of them were decoded at once


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift writes it, with bytes that say nothing up to `length`."""
    rest, parts = number << 1, []
    while rest or len(parts) < max(length, 1):
        parts.append(rest & 0x7F)
        rest >>= 7
    return bytes(part | 0x80 for part in parts[:-1]) + bytes(parts[-1:])


def lie(path: Path, true: int, said: int) -> None:
    """Let a file's footer say another number, as often as it says this one."""
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    written = varint(true)
    assert written in data[start:-8]
    path.write_bytes(data[:start] + data[start:-8].replace(written, varint(said, len(written))) + data[-8:])


READ = """
import json, resource, sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from lolcats_common.errors import UserError
from lolcats_core.data.readers import file_records

pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]),) * 2)
try:
    found = [raw.reason or len(raw.fields) for raw in file_records(Path(sys.argv[1]), "x", 4_000_000)]
except UserError as error:
    found = str(error)
print(json.dumps(found))
"""


def read_within(path: Path, size: int) -> Any:
    """What a process that gets at most `size` bytes more than it has reads from a file: its records or the error."""
    (path.parent / "lolcats_core.py").write_text(LIGHT.format(library=str(ROOT / "lolcats_core")))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{path.parent}{os.pathsep}{ROOT}",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    command = [sys.executable, "-c", READ, str(path), str(size)]
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_page_that_the_footer_says_is_small_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path, size = tmp_path / "x.parquet", 80 << 20
    pq.write_table(pa.table({"text": ["a" * size]}), path, compression="zstd", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    for number in {chunk.total_uncompressed_size, pq.read_metadata(path).row_group(0).total_byte_size}:
        lie(path, number, 100)
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100
    assert "of its column text decode to 8388" in read_within(path, 64 << 20)


def test_a_text_that_stands_in_a_dictionary_is_not_written_out_for_every_element_of_a_list(tmp_path: Path) -> None:
    path, text = tmp_path / "x.parquet", "a" * (1 << 20)
    contents = pa.DictionaryArray.from_arrays(pa.array([0] + [1] * 1000, pa.int32()), ["b", text])
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 1001), contents], ["role", "content"])
    chats = pa.ListArray.from_arrays([0, 1, 1001], messages)
    pq.write_table(pa.table({"messages": chats}), path, compression="zstd", dictionary_pagesize_limit=1 << 24)
    assert path.stat().st_size < 3000
    # The second record takes a gibibyte.
    found = read_within(path, 128 << 20)
    assert found[0] == 1
    assert found[1].endswith("above `data.max_record_bytes` 4000000")


@pytest.mark.parametrize("said", [0, 1, 63, 2000])
def test_a_footer_that_lies_about_its_rows_ends_in_records_or_one_line(tmp_path: Path, said: int) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(1500)]}), path)
    lie(path, 1500, said)
    found = read_within(path, 64 << 20)
    assert len(found.splitlines()) == 1 if isinstance(found, str) else len(found) <= 2000


def test_more_values_than_the_file_can_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_VALUES", 50_000)
    monkeypatch.setattr(readers, "_PACKED", 10)
    path = tmp_path / "x.parquet"
    nothing = pa.ListArray.from_arrays([0, 100_000], pa.nulls(100_000, pa.string()))
    pq.write_table(pa.table({"messages": nothing}), path)
    with pytest.raises(UserError, match=r"of its column messages.list.element decode to \d+ bytes and 100000 values"):
        list(file_records(path, "x", LIMIT))


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0xFF])
def test_what_is_no_page_is_said_in_one_line(tmp_path: Path, byte: int) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    data = bytearray(path.read_bytes())
    data[4:24] = bytes([byte]) * 20
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged after row 0") as caught:
        list(file_records(path, "x", LIMIT))
    assert len(str(caught.value).splitlines()) == 1


def test_a_column_that_decodes_to_far_more_than_the_file_holds_is_refused_before(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a" * (70 << 20)]}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(
        UserError, match=r"of its column text decode to \d+ bytes and 1 values; it may be packed at most 1000 times"
    ):
        list(file_records(path, "x", 1 << 30))
