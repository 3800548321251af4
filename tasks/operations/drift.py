"""Drift: does recent text surprise the champion more than the text it was validated on?"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats_common.errors import UserError
from lolcats_common.params import DataParams, Params
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.compute.numbers import check_folder
from lolcats_core.data.packing import DocumentPacker
from lolcats_core.data.records import Encoder, detect_shape, documents_of, read_record
from lolcats_core.data.rows import TokenRows, TokenRowsWriter
from lolcats_core.data.segments import RecordError
from lolcats_core.data.sources import raw_records
from lolcats_core.training.perplexity import perplexity
from tasks.registry.promotion import CHAMPION
from tasks.registry.versions import find_version, read_evaluation, stored_model
from tasks.runner.mlflow_run import connect
from tasks.runner.record_schemas import rejected_records


@dataclass(frozen=True)
class Drift:
    """Perplexity of a version on recent text, over that on its validation rows."""

    version: str
    recent: float
    validation: float
    bound: float

    @property
    def drifted(self) -> bool:
        """Whether the ratio is above its bound."""
        return not self.recent <= self.bound * self.validation

    def __str__(self) -> str:
        return (
            f"champion, version {self.version}: perplexity {self.recent:.4g} on recent text, {self.validation:.4g} on "
            f"its validation rows, {self.recent / self.validation:.3f} times; the bound is {self.bound:g}"
        )


def measure(root: Path, params: Params) -> Drift:
    """Measure the champion on `relinearize.drift_source`.

    Raises:
        Unavailable: the registry cannot be used.
        UserError: there is no champion or no such text, or it holds no whole row.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = params.relinearize.drift_source
    if source is None:
        raise UserError("`relinearize.drift_source` names no recent text; give a file, a directory or a glob")
    client, device = connect(root), resolve_device(params.compute.device)
    version = find_version(client, params.register.name, CHAMPION)
    with stored_model(client, version) as stored, tempfile.TemporaryDirectory() as temporary:
        path = stored / "artifacts" / "model"
        tokenizer = AutoTokenizer.from_pretrained(path)
        check_folder(path, f"version {version.version}")
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=resolve_dtype(params.compute.precision), use_safetensors=True
        )
        data = dataclasses.replace(params.data, source=source, revision=None, packing="documents")
        rows = _rows(root, data, tokenizer, model.config.vocab_size, params.relinearize.drift_tokens, Path(temporary))
        recent = perplexity(model.to(device).eval(), rows, batch_size=params.evaluate.batch_size, name="the champion")
        validation = read_evaluation(stored)["perplexity"]["finetuned"]
    return Drift(str(version.version), recent.perplexity, validation, params.relinearize.max_drift)


def _rows(root: Path, data: DataParams, tokenizer: Any, vocab_size: int, limit: int, out: Path) -> TokenRows:
    """Rows of the recent text, packed by document, up to `limit` tokens."""
    encoder, completion = Encoder(tokenizer), data.loss_on == "completion"
    packer = DocumentPacker(data.sequence_length, encoder.eos)
    with TokenRowsWriter(
        out / "rows", sequence_length=data.sequence_length, vocab_size=vocab_size, columns=packer.columns
    ) as writer:
        for raw in raw_records(data, root):
            if writer.rows * data.sequence_length >= limit:
                break
            if raw.fields is None:
                continue
            try:
                shape = detect_shape(raw.fields, data.format)
                record = read_record(raw.fields, shape)
                if rejected_records([record], shape, data.max_record_bytes):
                    continue
                documents = documents_of(record, shape, completion, tokenizer)
            except (RecordError, UnicodeEncodeError):
                continue
            for tokens, targets in encoder.encode(documents):
                for row in packer.add(tokens, targets):
                    writer.append(**row)
        for row in packer.flush():
            writer.append(**row)
    if not writer.rows:
        raise UserError(f"`relinearize.drift_source`: {data.source} holds no usable record")
    return TokenRows.open(out / "rows")
