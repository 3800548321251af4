"""Stage `prepare`: records to checked, deduplicated, split and packed token rows."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("prepare", preflight=True)  # before the imports below, which take seconds

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandera.pandas as pa

from lolcats_common.errors import UserError
from lolcats_common.files import sha256_json, write_json
from lolcats_common.params import DataParams
from lolcats_common.progress import progress
from lolcats_core.data.conversations import CHAT_DATE
from lolcats_core.data.packing import ConcatenatedPacker, DocumentPacker, PositionOffset, Row
from lolcats_core.data.readers import RawRecord
from lolcats_core.data.records import Encoder, Shape, detect_shape, documents_of, identity_of, read_record
from lolcats_core.data.rows import TokenRows, TokenRowsWriter
from lolcats_core.data.segments import RecordError, Segment
from lolcats_core.data.sources import describe, raw_records
from lolcats_core.teacher.pin import Teacher
from tasks.runner.record_schemas import check_rows, rejected_records, texts_in
from tasks.runner.stage import Stage

REJECTED = "rejected.jsonl"
BATCH_RECORDS, BATCH_BYTES = 1000, 2_000_000  # what is held and tokenized at a time, whichever is reached first
SPLITS = ("train", "validation")


@dataclass
class Counts:
    """What happened to the records."""

    read: int = 0
    rejected: int = 0
    duplicates: int = 0
    conversations: int = 0
    bytes: int = 0
    tokens: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    reasons: list[str] = field(default_factory=list)

    def add(self, name: str, size: int, tokens: int) -> None:
        """Count a document that goes into a split."""
        self.documents[name] += 1
        self.bytes += size
        self.tokens += tokens


class Split:
    """Rows of one split, up to its bound; with `offset`, at positions of their own."""

    def __init__(
        self,
        writer: TokenRowsWriter,
        packer: ConcatenatedPacker | DocumentPacker,
        max_tokens: int | None,
        offset: PositionOffset | None,
    ) -> None:
        self.writer, self.packer, self.offset = writer, packer, offset
        self.max_rows = None if max_tokens is None else max_tokens // writer.sequence_length

    @property
    def full(self) -> bool:
        """Whether the bound on its tokens is reached."""
        return self.max_rows is not None and self.writer.rows >= self.max_rows

    def _write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            if not self.full:
                self.writer.append(**(self.offset(row) if self.offset else row))

    def add(self, tokens: list[int], targets: list[bool]) -> None:
        self._write(self.packer.add(tokens, targets))

    def finish(self) -> None:
        self._write(self.packer.flush())


@dataclass(frozen=True)
class Usable:
    """A record that passed: the SHA-256 by which it is known, and its documents with their bytes."""

    digest: bytes
    documents: list[tuple[list[Segment], int]]


def record_hash(text: str) -> bytes:
    """SHA-256 of what a record says with line ends and outer white space made alike: exact duplicates share it."""
    return hashlib.sha256("\n".join(text.strip().splitlines()).encode("utf-8", "surrogatepass")).digest()


def split_of(digest: bytes, validation_share: float) -> str:
    """The split a record belongs to: a function of what it says alone, whatever stands around it or lays it out."""
    return "validation" if int.from_bytes(digest[:8], "big") < validation_share * 2**64 else "train"


def run(stage: Stage) -> Mapping[str, float]:
    """Write train/, validation/, rejected.jsonl and data.json; counts as metrics. A killed run starts over.

    Raises:
        UserError: the source cannot be read, too many records are rejected, or a split ends up empty.
    """
    data = stage.params.data
    teacher = Teacher.open(stage.input("teacher"))
    tokenizer, vocab = teacher.tokenizer(), teacher.pin.vocab_size
    _check_bounds(data)
    source = describe(data, stage.root)
    encoder, counts = Encoder(tokenizer), Counts()
    completion_only, by_document = data.loss_on == "completion", data.packing == "documents"
    with ExitStack() as stack:
        splits: dict[str, Split] = {}
        for name, bound in zip(SPLITS, (data.max_train_tokens, data.max_validation_tokens), strict=True):
            packer = (
                DocumentPacker(data.sequence_length, encoder.eos)
                if by_document
                else ConcatenatedPacker(data.sequence_length, completion_only)
            )
            below = _range(data, name)
            offset = None if below is None else PositionOffset(data.sequence_length, below)
            writer = TokenRowsWriter(
                stage.out / name,
                sequence_length=data.sequence_length,
                vocab_size=vocab,
                columns=tuple(dict.fromkeys((*packer.columns, *(["position_ids"] if offset else [])))),
                positions=below,
            )
            splits[name] = Split(stack.enter_context(writer), packer, bound, offset)
        rejected = stack.enter_context((stage.scratch / REJECTED).open("w", encoding="utf-8"))
        for found in _documents(stage, tokenizer, counts, rejected, splits):
            encoded = encoder.encode([document for document, _, _ in found])
            for (tokens, targets), (_, name, size) in zip(encoded, found, strict=True):
                if not splits[name].full:
                    counts.add(name, size, len(tokens))
                    splits[name].add(tokens, targets)
        for split in splits.values():
            split.finish()
        rejected.flush()
        _check_counts(data, counts, splits, stage.scratch / REJECTED)
    (stage.out / REJECTED).write_bytes((stage.scratch / REJECTED).read_bytes())
    for name in SPLITS:
        _check_written(stage.out / name, _range(data, name))
    metrics = _metrics(counts, splits)
    record = {**source, "counts": metrics, "tokenizer_sha256": sha256_json(_files(teacher.pin_dir))}
    if counts.conversations:
        record["chat_date"] = CHAT_DATE.isoformat()  # what a chat template that writes the date was given
    write_json(stage.out / "data.json", record)
    for name, context in zip(SPLITS, ("training", "validation"), strict=True):
        rows = TokenRows.open(stage.out / name)
        profile = {"rows": len(rows), "tokens": rows.tokens, "sequence_length": rows.sequence_length}
        stage.log_dataset(
            name, data.source + (f"@{data.revision}" if data.revision else ""), rows.digest, context, profile
        )
    return metrics


def _range(data: DataParams, name: str) -> int | None:
    """`position_range` of a split: validation is at the positions that a text begins with."""
    return data.position_range if name == "train" else None


def _check_bounds(data: DataParams) -> None:
    for name in ("max_train_tokens", "max_validation_tokens"):
        bound = getattr(data, name)
        if bound is not None and bound < data.sequence_length:
            raise UserError(
                f"`data.{name}` must be null or at least one row of `data.sequence_length` {data.sequence_length},"
                f" got {bound}"
            )


def _files(pin: Path) -> dict[str, str]:
    files = sorted((pin / "tokenizer").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _documents(
    stage: Stage, tokenizer: Any, counts: Counts, rejected: Any, splits: Mapping[str, Split]
) -> Iterator[list[tuple[list[Segment], str, int]]]:
    """Batches of usable documents that their split has room for, each once; the others are counted and noted."""
    data = stage.params.data
    # 16 bytes a document: the chance that two of a billion differing documents collide is below 1e-20.
    seen: set[bytes] = set()
    target = sum(split.max_rows or 0 for split in splits.values())
    bounded = all(split.max_rows is not None for split in splits.values())
    with progress(target if bounded else 1, "packing rows") as shown:
        done = 0
        records = raw_records(data, stage.root)
        while batch := _batch(records):
            found: list[tuple[list[Segment], str, int]] = []
            for record in _checked(batch, data, tokenizer, counts, rejected):
                if record.digest[:16] in seen:
                    counts.duplicates += 1
                    continue
                seen.add(record.digest[:16])
                name = split_of(record.digest, data.validation_share)
                if splits[name].full:
                    continue
                found += [(document, name, size) for document, size in record.documents]
            yield found
            rows = sum(split.writer.rows for split in splits.values())
            shown.update(rows - done if bounded else 0, records=counts.read)
            done = rows
            if _enough(splits["train"], splits["validation"]):
                return


def _batch(records: Iterator[RawRecord]) -> tuple[RawRecord, ...]:
    """The next records, up to a number of them and of bytes, so that a few huge ones do not fill the memory."""
    batch: list[RawRecord] = []
    size = 0
    for raw in records:
        batch.append(raw)
        size += sum(map(len, texts_in(raw.fields)))
        if len(batch) >= BATCH_RECORDS or size >= BATCH_BYTES:
            break
    return tuple(batch)


def _enough(train: Split, validation: Split) -> bool:
    """Both splits are full; where only `max_train_tokens` is set, validation need only have a row."""
    return train.full and (validation.full or (validation.max_rows is None and validation.writer.rows > 0))


def _checked(
    batch: tuple[RawRecord, ...], data: DataParams, tokenizer: Any, counts: Counts, rejected: Any
) -> Iterator[Usable]:
    """Records of a batch that pass their schema, in order."""
    reasons: dict[int, str] = {}
    records: dict[int, dict[str, Any]] = {}
    shapes: dict[Shape, list[int]] = {}
    for index, raw in enumerate(batch):
        if raw.fields is None:
            reasons[index] = raw.reason or "unreadable"
            continue
        try:
            shape = detect_shape(raw.fields, data.format)
            records[index] = read_record(raw.fields, shape)
            shapes.setdefault(shape, []).append(index)
        except RecordError as error:
            reasons[index] = str(error)
    shape_of: dict[int, Shape] = {}
    for shape, indices in shapes.items():
        failed = rejected_records([records[i] for i in indices], shape, data.max_record_bytes)
        reasons |= {indices[i]: reason for i, reason in failed.items()}
        shape_of |= dict.fromkeys(indices, shape)
    for index, raw in enumerate(batch):
        counts.read += 1
        if index not in reasons:
            record, shape = records[index], shape_of[index]
            try:
                documents = documents_of(record, shape, data.loss_on == "completion", tokenizer)
                sizes = [sum(len(segment.text.encode()) for segment in document) for document in documents]
                digest = record_hash(identity_of(record, shape))
            except RecordError as error:
                reasons[index] = str(error)
            except UnicodeEncodeError:
                reasons[index] = "not valid Unicode (a lone surrogate)"
            else:
                counts.conversations += shape == "messages"
                yield Usable(digest, list(zip(documents, sizes, strict=True)))
                continue
        counts.rejected += 1
        reason = reasons[index].encode("utf-8", "backslashreplace").decode()
        if len(counts.reasons) < 3:
            counts.reasons.append(f"{raw.where}: {reason}")
        rejected.write(json.dumps({"where": raw.where, "reason": reason}) + "\n")


def _check_counts(data: DataParams, counts: Counts, splits: Mapping[str, Split], rejected: Path) -> None:
    examples = "; ".join(counts.reasons)
    share = counts.rejected / max(counts.read, 1)
    if share > data.max_rejected_share:
        raise UserError(
            f"{counts.rejected} of {counts.read} records were rejected, above `data.max_rejected_share`"
            f" {data.max_rejected_share}: {examples} (all of them: {rejected})"
        )
    if counts.read == 0:
        raise UserError(f"`data.source`: {data.source} holds no record")
    for name, split in splits.items():
        if split.writer.rows == 0:
            raise UserError(
                f"no {name} row of {data.sequence_length} tokens came out of {counts.documents[name]} documents"
                f" ({counts.tokens} tokens in all); give more data, a shorter `data.sequence_length` or another"
                f" `data.validation_share`, now {data.validation_share}"
            )


def _check_written(path: Path, below: int | None) -> None:
    rows = TokenRows.open(path)
    for start in range(0, len(rows), 4096):
        batch = rows.batch(np.arange(start, min(start + 4096, len(rows))))
        try:
            check_rows({name: t.numpy() for name, t in batch.items()}, rows.vocab_size, rows.sequence_length, below)
        except pa.errors.SchemaError as error:
            raise RuntimeError(f"{path.name}: packed rows are wrong: {error}") from error


def _metrics(counts: Counts, splits: Mapping[str, Split]) -> dict[str, float]:
    metrics: dict[str, float] = {
        "records_read": counts.read,
        "records_rejected": counts.rejected,
        "rejected_share": counts.rejected / counts.read,
        "duplicates": counts.duplicates,
        "bytes_per_token": counts.bytes / max(counts.tokens, 1),
    }
    for name, split in splits.items():
        metrics[f"{name}_documents"] = counts.documents[name]
        metrics[f"{name}_rows"] = split.writer.rows
        metrics[f"{name}_tokens"] = split.writer.rows * split.writer.sequence_length
        packer = split.packer
        unused = packer.filled if isinstance(packer, DocumentPacker) else packer.dropped
        metrics[f"{name}_{'filler' if isinstance(packer, DocumentPacker) else 'dropped'}_tokens"] = unused
    return metrics | {"tokens": metrics["train_tokens"] + metrics["validation_tokens"]}
