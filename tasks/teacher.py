"""Stage `teacher`: find, check and pin the model that is to be linearized, and keep its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from lolcats_core.teacher.pin import resolve_teacher, write_pin
from tasks.runner.stage import Stage, main


def run(stage: Stage) -> Mapping[str, float]:
    """Write teacher.json and tokenizer/; metrics of the teacher's size."""
    pin = resolve_teacher(stage.params.teacher, stage.root)
    write_pin(pin, stage.root, stage.out)
    return {
        "parameters": pin.parameters,
        "layers": pin.layers,
        "vocab_size": pin.vocab_size,
        "bytes": pin.bytes,
    }


if __name__ == "__main__":
    main(run)
