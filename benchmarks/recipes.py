"""Recipes side by side on one teacher: perplexity, recall, agreement, audit and decode state, over several seeds.

    python -m benchmarks.recipes --from DIR --recipes benchmarks/recipes.yaml --seeds 0 1 2 --out results.json

DIR holds teacher/ (`save_pretrained`), train/ and validation/ (rows of `TokenRows`). Any other teacher and text:

    python -m benchmarks.recipes --teacher MODEL --train-tokens train.npy --validation-tokens validation.npy \
        --sequence-length 4096 …

MODEL is a Hugging Face directory, and the files hold token ids (`TokenFileRows`). Finished trials lie beside the
results, so a killed run continues, and several processes, each with its own GPU, share the trials:

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.recipes … --seeds 0 1 2 & CUDA_VISIBLE_DEVICES=1 … --seeds 0 1 2 &

Every process writes what all of them have finished. `--table` prints that table and trains nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.files import write_json
from lolcats_common.machine import device_tags, versions
from lolcats_common.params import read_yaml
from lolcats_common.tables import markdown_table, number
from lolcats_core.compute.device import resolve_device, resolve_dtype
from lolcats_core.data.arrays import TokenFileRows
from lolcats_core.data.rows import TokenRows
from lolcats_core.data.special_tokens import special_ids
from lolcats_core.experiments.controls import WINDOW, margins
from lolcats_core.experiments.study import EvalSettings, StudyContext, exclude_ids
from lolcats_core.experiments.trials import Trial, finished_with_controls, run_trials
from lolcats_core.training.loop import Rows

logger = logging.getLogger(__name__)
TOKEN_LIMIT = 10_000_000


@dataclass(frozen=True)
class RecipeSuite:
    """The recipes of a YAML file with `defaults`, `measures` and `recipes`, and what each is measured on."""

    trials: tuple[Trial, ...]
    settings: EvalSettings

    @classmethod
    def read(cls, path: Path, only: Sequence[str] = ()) -> RecipeSuite:
        """Read a file.

        Args:
            only: names, or beginnings of names, of the recipes wanted; all of them by default.

        Raises:
            UserError: the file is malformed, an unknown measure is named, or no recipe is wanted.
        """
        values = read_yaml(path)
        unknown = sorted(values.keys() - {"defaults", "measures", "recipes"})
        if unknown or not isinstance(values.get("recipes"), dict):
            raise UserError(f"{path}: must hold `recipes` and may hold `defaults` and `measures`, got {sorted(values)}")
        defaults, measures = values.get("defaults") or {}, values.get("measures") or {}
        known = {field.name for field in dataclasses.fields(EvalSettings)}
        if set(measures) - known:
            raise UserError(f"measures are {', '.join(sorted(known))}, got {sorted(set(measures) - known)[0]!r}")
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in measures.items()}
        trials = [Trial.from_overrides(name, defaults, each or {}) for name, each in values["recipes"].items()]
        wanted = tuple(trial for trial in trials if not only or any(trial.name.startswith(name) for name in only))
        if not wanted:
            raise UserError(f"no recipe is called {' or '.join(only)}; there are {', '.join(t.name for t in trials)}")
        return cls(wanted, EvalSettings(**settings))

    def seeded(self, seeds: Iterable[int]) -> list[Trial]:
        """Every recipe with each of `seeds`, seed by seed."""
        return [dataclasses.replace(trial, seed=seed) for seed in seeds for trial in self.trials]


def open_study(options: argparse.Namespace, settings: EvalSettings) -> StudyContext:
    """The teacher and rows that the command line names.

    Raises:
        UserError: something is missing or does not fit.
    """
    folder, length = options.folder, options.sequence_length
    files = options.train_tokens, options.validation_tokens
    if folder is None and options.teacher is None:
        raise UserError("either --from or --teacher must be given")
    if len({value is None for value in (*files, length)}) > 1 or (folder is None and length is None):
        raise UserError("--train-tokens, --validation-tokens and --sequence-length must be given together, or --from")
    source = options.teacher or folder / "teacher"
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: has no {source.name}/config.json")
    device = resolve_device(options.device)
    precision = options.precision or ("bfloat16" if device.type == "cuda" else "float32")
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=resolve_dtype(precision))
    teacher = cast(PreTrainedModel, loaded.to(device).eval()).requires_grad_(False)
    known = (source / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(source) if known else None
    excluded = exclude_ids(teacher.config, () if tokenizer is None else special_ids(tokenizer))
    rows: list[Rows] = [
        TokenRows.open(folder / name) if file is None else TokenFileRows(file, length, teacher.config.vocab_size)
        for name, file in zip(("train", "validation"), files, strict=True)
    ]
    work = options.out.with_suffix(".rows")
    return StudyContext(teacher, rows[0], rows[1], settings, work, excluded, tokenizer)


def collect(trials: Iterable[Trial], study: StudyContext) -> list[dict[str, Any]]:
    """Results that any process has finished, with their controls."""
    return [result for trial in trials if (result := finished_with_controls(trial, study)) is not None]


def report(rows: list[dict[str, Any]], study: StudyContext) -> dict[str, Any]:
    """The results file."""
    return {
        "teacher": {"parameters": sum(p.numel() for p in study.teacher.parameters()), **study.teacher_row},
        "measures": dataclasses.asdict(study.settings),
        "sequence_length": study.train_rows.sequence_length,
        "rows": rows,
        "hardware": device_tags(),
        "dtype": str(study.teacher.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """A line per recipe: mean over its seeds, with the sample standard deviation from two seeds on."""
    teacher, measures = results["teacher"], results["measures"]
    gaps, length = [str(gap) for gap in measures["recall_gaps"]], results["sequence_length"]
    recall = ", ".join(f"{gap}: {teacher['recall'][gap]:.3f}" for gap in gaps)
    head = (
        f"Teacher: {teacher['parameters'] / 1e6:.1f}M parameters, perplexity {number(teacher['perplexity'])}, recall "
        f"at {recall}. State at {measures['context']} tokens of one sequence; linear and window off on "
        f"{measures['audit_rows']} rows, over the perplexity there. Losses are nats above the teacher's, by position."
    )
    header = ["recipe", "seeds", "PPL / teacher before LoRA", "PPL / teacher", *(f"recall{g} / t." for g in gaps)]
    ranges = [(each["start"], each["stop"]) for each in teacher.get("positions", ()) if each["stop"] > length]
    header += [f"loss {start}-{stop}" for start, stop in ranges]
    header += [f"needle {length}" for length in teacher.get("needles", {})]
    header += ["same token", "same start", "linear off", "window off"]
    header += ["constant kB", "x published state", "share of kv cache"]
    rows = []
    for name in dict.fromkeys(row["recipe"] for row in results["rows"]):
        found = [row for row in results["rows"] if row["recipe"] == name]
        state = next((row["finetuned"]["state"] for row in found if row["finetuned"]), None)

        def mean(value: Callable[[dict[str, Any]], float | None], digits: int = 3, step: str = "finetuned") -> str:
            return _mean([value(row[step]) if row[step] else None for row in found], digits)  # noqa: B023

        cells = [
            mean(lambda m: _over(m["perplexity"], teacher["perplexity"]), step="transferred"),
            mean(lambda m: _over(m["perplexity"], teacher["perplexity"]), 4),
            *(mean(lambda m, gap=gap: _over(m["recall"][gap], teacher["recall"][gap]), 2) for gap in gaps),
            *(mean(lambda m, start=start: _excess(m, teacher, start)) for start, _ in ranges),
            *(mean(lambda m, at=at: statistics.fmean(m["needles"][at]), 2) for at in teacher.get("needles", {})),
            mean(lambda m: m.get("agreement")),
            mean(lambda m: m.get("exact_prefix"), 2),
            mean(lambda m: _over(m.get("linear_off"), m.get("audited"))),
            mean(lambda m: _over(m.get("window_off"), m.get("audited"))),
            *(("-", "-", "-") if state is None else _state_cells(state)),
        ]
        rows.append([name, str(len(found)), *cells])
    return f"{head}\n\n{markdown_table(header, rows)}\n{control_table(results['rows'], teacher)}"


def control_table(rows: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> str:
    """A line per recipe with a plain window beside it: both perplexities, and by how much the student is better."""
    lines: list[list[str]] = []
    columns: list[str] = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        found = [row for row in rows if row["recipe"] == name]
        if better := margins(found):
            columns = list(better)
            plain = [row["controls"].get(WINDOW, {}).get("finetuned") for row in found]
            ratios = (
                _mean([each and each["perplexity"] / teacher["perplexity"] for each in side], 4)
                for side in ([row["finetuned"] for row in found], plain)
            )
            lines.append([name, *ratios, *(f"{mean:+.4f} ± {error:.4f}" for mean, error in better.values())])
    if not lines:
        return ""
    head = (
        "Beside a plain window and the first four tokens in the bytes of its linear attention, trained alike. How much "
        "the student is better, with the standard error: losses in nats, needles as the share found."
    )
    header = ["recipe", "PPL / teacher", f"PPL / teacher, {WINDOW}", *columns]
    return f"\n{head}\n\n{markdown_table(header, lines)}\n"


def _state_cells(state: Mapping[str, float]) -> tuple[str, str, str]:
    return f"{state['constant'] / 1e3:.0f}", f"{state['over_published']:.3f}", f"{state['share']:.3f}"


def _excess(student: Mapping[str, Any], teacher: Mapping[str, Any], start: int) -> float:
    """Loss above the teacher's, in nats, in the range of positions that begins at `start`."""
    losses = [next(e["loss"] for e in model["positions"] if e["start"] == start) for model in (student, teacher)]
    return float(losses[0] - losses[1])


def _over(value: float | None, whole: float | None) -> float | None:
    return None if value is None or not whole else value / whole


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="folder", type=Path, help="directory with teacher/, train/, validation/")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="Hugging Face directory; by default that of --from")
    parser.add_argument("--train-tokens", type=Path, metavar="FILE", help=".npy of token ids in place of train/")
    parser.add_argument("--validation-tokens", type=Path, metavar="FILE", help="the same in place of validation/")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens of a row that is cut from them")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="recipes whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--table", action="store_true", help="print what is finished, train nothing")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    suite = RecipeSuite.read(given.recipes, given.only)
    study = open_study(given, suite.settings)
    for trial in suite.trials:
        if (tokens := trial.tokens(study.train_rows)) > TOKEN_LIMIT:
            raise UserError(f"recipe {trial.name!r} would train on {tokens} tokens, above the {TOKEN_LIMIT} of all")

    def results() -> dict[str, Any]:
        rows = collect(suite.seeded(range(max(given.seeds) + 1)), study)
        order = [trial.name for trial in suite.trials]
        return report(sorted(rows, key=lambda row: order.index(row["recipe"])), study)

    def note(trial: Trial, result: Mapping[str, Any]) -> None:
        logger.info("%s, seed %d: %s", trial.name, trial.seed, _line(result, study))
        write_json(given.out, results())

    run_trials([] if given.table else suite.seeded(given.seeds), study, note)
    print(markdown(results()))


def _line(result: Mapping[str, Any], study: StudyContext) -> str:
    last, teacher = result["finetuned"], study.teacher_row
    if last is None:
        return "diverged"
    recall = " ".join(f"{gap}:{value:.2f}" for gap, value in last["recall"].items())
    ratio = last["perplexity"] / teacher["perplexity"]
    return f"PPL / teacher {ratio:.4f}, recall {recall}, {result['seconds']['all']:.0f} s"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"recipes: {error}") from None
