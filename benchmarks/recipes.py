"""Recipes side by side on one teacher: perplexity, recall, agreement, audit and decode state, over several seeds.

    python -m benchmarks.recipes --from DIR --recipes benchmarks/recipes.yaml --seeds 0 1 2 --out results.json

DIR holds teacher/ (`save_pretrained`), train/ and validation/ (rows of `TokenRows`). Finished rows lie beside the
results, so a killed run continues, and several processes, each with its own GPU and seeds, fill one results file:

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.recipes … --seeds 0 2 & CUDA_VISIBLE_DEVICES=1 … --seeds 1 &

Every process writes what all of them have finished. `--table` prints that table and trains nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from lolcats_common.machine import device_tags, versions
from lolcats_common.params import read_yaml
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.data.rows import TokenRows
from lolcats_core.experiments.recipes import Bench, Measures, Recipe, exclude_ids, run

logger = logging.getLogger(__name__)
TOKEN_LIMIT = 10_000_000


def read_recipes(path: Path, only: Sequence[str] = ()) -> tuple[list[Recipe], dict[str, Any]]:
    """The recipes of a YAML file with `defaults`, `measures` and `recipes`, and its measures.

    Args:
        only: names, or beginnings of names, of the recipes wanted; all of them by default.

    Raises:
        UserError: the file is malformed, or no recipe is wanted.
    """
    values = read_yaml(path)
    unknown = sorted(values.keys() - {"defaults", "measures", "recipes"})
    if unknown or not isinstance(values.get("recipes"), dict):
        raise UserError(f"{path}: must hold `recipes` and may hold `defaults` and `measures`, got {sorted(values)}")
    defaults = values.get("defaults") or {}
    found = [Recipe.of(name, defaults, overrides or {}) for name, overrides in values["recipes"].items()]
    wanted = [recipe for recipe in found if not only or any(recipe.name.startswith(name) for name in only)]
    if not wanted:
        raise UserError(f"no recipe is called {' or '.join(only)}; there are {', '.join(r.name for r in found)}")
    return wanted, values.get("measures") or {}


def open_bench(folder: Path, measures: Mapping[str, Any], work: Path, device: str, precision: str) -> Bench:
    """The teacher and rows of a directory.

    Raises:
        UserError: something is missing in it, or an unknown measure is named.
    """
    if not (folder / "teacher" / "config.json").is_file():
        raise UserError(f"--from {folder}: has no teacher/config.json")
    known = {field.name for field in dataclasses.fields(Measures)}
    if set(measures) - known:
        raise UserError(f"measures are {', '.join(sorted(known))}, got {sorted(set(measures) - known)[0]!r}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in measures.items()}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=resolve_dtype(precision))
    teacher = cast(PreTrainedModel, loaded.to(resolve_device(device)).eval()).requires_grad_(False)
    work.mkdir(parents=True, exist_ok=True)
    train, validation = (TokenRows.open(folder / name) for name in ("train", "validation"))
    return Bench(teacher, train, validation, Measures(**values), work, exclude_ids(teacher.config))


def collect(recipes: Sequence[Recipe], seeds: Sequence[int], bench: Bench) -> list[dict[str, Any]]:
    """Rows that any process has finished."""
    files = [bench.file(recipe, seed) for recipe in recipes for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def report(rows: list[dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """The results file."""
    return {
        "teacher": {"parameters": sum(p.numel() for p in bench.teacher.parameters()), **bench.teacher_row},
        "measures": dataclasses.asdict(bench.measures),
        "sequence_length": bench.train_rows.sequence_length,
        "rows": rows,
        "hardware": device_tags(),
        "dtype": str(bench.teacher.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """A line per recipe: mean over its seeds, with the sample standard deviation from two seeds on."""
    teacher, measures = results["teacher"], results["measures"]
    gaps = [str(gap) for gap in measures["recall_gaps"]]
    recall = ", ".join(f"{gap}: {teacher['recall'][gap]:.3f}" for gap in gaps)
    lines = [
        f"Teacher: {teacher['parameters'] / 1e6:.1f}M parameters, perplexity {teacher['perplexity']:.4g}, recall at "
        f"{recall}. State at {measures['context']} tokens of one sequence; linear and window off on "
        f"{measures['audit_rows']} rows, over the perplexity there.",
        "",
        f"| recipe | seeds | PPL / teacher before LoRA | PPL / teacher | {' | '.join(f'recall{g} / t.' for g in gaps)} "
        "| same token | same start | linear off | window off | constant kB | x published state | share of kv cache |",
        "|" + "---|" * (11 + len(gaps)),
    ]
    names = dict.fromkeys(row["recipe"] for row in results["rows"])
    for name in names:
        found = [row for row in results["rows"] if row["recipe"] == name]
        last = [row["finetuned"] for row in found]
        cells = [
            _mean([_over(row["transferred"]["perplexity"], teacher["perplexity"]) for row in found]),
            _mean([_over(row["perplexity"], teacher["perplexity"]) for row in last], 4),
            *(_mean([_over(row["recall"][gap], teacher["recall"][gap]) for row in last], 2) for gap in gaps),
            _mean([row["agreement"] for row in last]),
            _mean([row["exact_prefix"] for row in last], 2),
            _mean([_over(row["linear_off"], row["audited"]) for row in last]),
            _mean([_over(row["window_off"], row["audited"]) for row in last]),
            f"{last[0]['state']['constant'] / 1e3:.0f}",
            f"{last[0]['state']['over_published']:.3f}",
            f"{last[0]['state']['share']:.3f}",
        ]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _over(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="with teacher/, train/, validation/")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="recipes whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipes, measures = read_recipes(given.recipes, given.only)
    precision = given.precision or ("bfloat16" if resolve_device(given.device).type == "cuda" else "float32")
    bench = open_bench(given.folder, measures, given.out.with_suffix(".rows"), given.device, precision)
    for recipe in recipes:
        tokens = recipe.tokens(bench.train_rows)
        if tokens > TOKEN_LIMIT:
            raise UserError(f"recipe {recipe.name!r} would train on {tokens} tokens, above the {TOKEN_LIMIT} of all")
    for seed in [] if given.table else given.seeds:
        for recipe in recipes:
            row = run(recipe, bench, seed)
            logger.info("%s, seed %d: %s", recipe.name, seed, _line(row, bench))
            write_json(given.out, report(collect(recipes, range(max(given.seeds) + 1), bench), bench))
    print(markdown(report(collect(recipes, range(max(given.seeds) + 1), bench), bench)))


def _line(row: Mapping[str, Any], bench: Bench) -> str:
    last, teacher = row["finetuned"], bench.teacher_row
    ratio = _mean([_over(last["perplexity"], teacher["perplexity"])], 4)
    recall = " ".join(f"{gap}:{value:.2f}" for gap, value in last["recall"].items())
    return f"PPL / teacher {ratio}, recall {recall}, {row['seconds']['all']:.0f} s"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"recipes: {error}") from None
