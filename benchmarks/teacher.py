"""A teacher for `benchmarks.ablation`, from a bare checkout: the model, and token rows of the text it learnt from.

    python -m benchmarks.teacher --out /tmp/82m --size 82m --max-minutes 5
    python -m benchmarks.teacher --out /tmp/26m --size 26m --max-minutes 2 --scratch /tmp/82m/.scratch

It is `lolcats teacher` (every flag of which is taken) with the shape of `--size`: heads of 128, as the fused kernels
take them. DIR/teacher is a Hugging Face directory, DIR/train and DIR/validation are token rows as the stage `prepare`
writes them; no package has files in both. The same command continues a killed run.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np

from lolcats_core.data.arrays import ArrayRows
from lolcats_core.data.rows import TokenRowsWriter
from lolcats_core.pretraining import pretrain
from lolcats_core.pretraining.config import config_from_arguments

logger = logging.getLogger(__name__)
SHAPES = {
    "82m": "--layers 12 --hidden-size 768 --heads 6 --kv-heads 2 --intermediate-size 2048 --lr 1.5e-3",
    "26m": "--layers 8 --hidden-size 512 --heads 4 --kv-heads 2 --intermediate-size 1280 --lr 2e-3",
}
COMMON = "--vocab-size 8192 --sequence-length 1024 --batch-rows 64 --copy-share 0.15 --evaluation-rows 0"
ROW_TOKENS = 1024
TOKENS = {"train": 12_000_000, "validation": 1_000_000}


def write_rows(tokens: np.ndarray, vocab_size: int, most: int, path: Path, seed: int) -> int:
    """Write at most `most` tokens of a corpus, evenly spread over it and in random order; returns how many rows."""
    rows = ArrayRows(tokens, ROW_TOKENS, vocab_size, most // ROW_TOKENS)
    order = np.random.default_rng(seed).permutation(len(rows))
    with TokenRowsWriter(path, sequence_length=ROW_TOKENS, vocab_size=vocab_size) as writer:
        writer.append(input_ids=rows.batch(order)["input_ids"].numpy())
    return len(rows)


def main(argv: list[str] | None = None) -> int:
    """Train the teacher and write its rows; 1 after an error's one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=sorted(SHAPES), default="82m")
    options, flags = parser.parse_known_args(argv)
    out = options.out
    paths = ["--out", str(out / "teacher"), "--scratch", str(out / ".scratch")]
    arguments = [*paths, *COMMON.split(), *SHAPES[options.size].split(), *flags]
    if failed := pretrain.main(arguments):
        return failed
    config = config_from_arguments(arguments)
    data = pretrain.prepare_data(config)  # which pretraining has made
    for name, most in TOKENS.items():
        count = write_rows(getattr(data, name), config.vocab_size, most, out / name, config.seed)
        logger.info("%s: %d rows of %d tokens", name, count, ROW_TOKENS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
