"""Stage `teacher`: find, check and pin the model that is to be linearized, and keep its tokenizer."""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("teacher")  # before the imports below, which take seconds

from collections.abc import Mapping

from lolcats_core.teacher.pin import resolve_teacher, write_pin
from tasks.runner.stage import Stage


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
