"""Local folders in the real layout of the data sets behind lm-eval's tasks.

A process whose working directory is the folder reads them in place of the hub's (`load_dataset` takes a local
directory first), so lm-eval's own definitions run unmodified. Rows have every column of the original; texts are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MMLU_SUBJECTS = ("anatomy", "astronomy")


def _arc(n: int) -> dict[str, Any]:
    labels = ["A", "B", "C", "D"] if n % 3 else ["1", "2", "3", "4"]
    options = [str(n), str(2 * n), "ten", "none of these"]
    return {
        "id": f"MCAS_{n}",
        "question": f"What is {n} and {n}?",
        "choices": {"text": options, "label": labels},
        "answerKey": labels[1],
    }


def _piqa(n: int) -> dict[str, Any]:
    return {
        "goal": f"How to count to {n}",
        "sol1": f"Say every number from one to {n}.",
        "sol2": f"Say every number from {n} down to a hundred.",
        "label": n % 2,
    }


def _hellaswag(n: int) -> dict[str, Any]:
    return {
        "ind": n,
        "activity_label": "Counting sheep",
        "ctx_a": f"A person sees {n} sheep.",
        "ctx_b": "the person",
        "ctx": f"A person sees {n} sheep. the person",
        "endings": [f"counts {n} of them.", "[title] flies away.", "eats  the fence.", f"counts {n + 1} wolves."],
        "source_id": f"activitynet~v_{n}",
        "split": "val",
        "split_type": "indomain",
        "label": str(n % 4),
    }


def _winogrande(n: int) -> dict[str, Any]:
    return {
        "sentence": f"The box held {n} apples but the bag held more because _ was larger.",
        "option1": "box",
        "option2": "bag",
        "answer": str(1 + n % 2),
    }


def _mmlu(n: int) -> dict[str, Any]:
    return {
        "question": f" What comes after {n}?",
        "subject": "anatomy",
        "choices": [str(n + k) for k in range(4)],
        "answer": 1 + n % 3,
    }


def _wikitext(n: int) -> dict[str, Any]:
    return {"page": f" = Page {n} = \n\n The page number {n} , as it were , ends @-@ here . \n"}


def _lambada(n: int) -> dict[str, Any]:
    return {"text": f"He counted the {n} sheep again and again until at last he fell asleep"}


# dataset_path: {configuration: (its splits, the maker of row n)}
DATASETS: dict[str, dict[str, tuple[tuple[str, ...], Any]]] = {
    "baber/piqa": {"default": (("train", "validation"), _piqa)},
    "allenai/ai2_arc": {name: (("train", "validation", "test"), _arc) for name in ("ARC-Easy", "ARC-Challenge")},
    "Rowan/hellaswag": {"default": (("train", "validation"), _hellaswag)},
    "allenai/winogrande": {"winogrande_xl": (("train", "validation"), _winogrande)},
    "EleutherAI/wikitext_document_level": {"wikitext-2-raw-v1": (("train", "validation", "test"), _wikitext)},
    "EleutherAI/lambada_openai": {"default": (("test",), _lambada)},
    "cais/mmlu": {},
}


def make_hub(root: Path, rows: int = 7, mmlu_subjects: tuple[str, ...] = MMLU_SUBJECTS) -> Path:
    """Write every data set under `root`, `rows` rows to a split, and return `root`."""
    mmlu = {subject: (("test", "validation", "dev"), _mmlu) for subject in mmlu_subjects}
    for path, configurations in {**DATASETS, "cais/mmlu": mmlu}.items():
        folder, header = root / path, []
        for name, (splits, row) in configurations.items():
            files = []
            for shift, split in enumerate(splits):
                file = folder / name / f"{split}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(row(shift * rows + n)) for n in range(rows)]
                file.write_text("\n".join(lines), encoding="utf-8")
                files.append({"split": split, "path": f"{name}/{split}.jsonl"})
            header.append({"config_name": name, "data_files": files, "default": name == "default"})
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': header})}---\n", encoding="utf-8")
    return root
