"""What a vision transformer loses when its attention becomes linear, by recipe, on labelled images in class folders.

    python -m benchmarks.vision --teacher ./dinov2-small --images ./stamps --pixels 112

Every recipe starts from the same teacher and sees the same images, of which those with equal pixels count once. It
prints, by recipe, the relative error of each layer under teacher forcing (squared error over the mean square of the
softmax output, on test images), the cosine of features with the teacher's, and accuracies: of the teacher's own linear
probe on the student's features, how often both agree, and with --refit of a probe and k-NN fitted anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

import lolcats_core as lc
from lolcats_common.files import write_json
from lolcats_common.machine import device_tags, versions
from lolcats_core.data.images import ImageRows
from lolcats_core.evaluation.vision.features import (
    ImageFeatures,
    feature_cosines,
    image_features,
    linear_probe,
    nearest_neighbours,
)
from lolcats_core.training.attention_transfer import head_errors

logger = logging.getLogger(__name__)
LINEAR = lc.LinearizeConfig(window="none")
CALIBRATED = dataclasses.replace(LINEAR, feature_map_init="calibrated")
# Of a name: the linearized attention, and whether stage 1 trains it.
BASE = "stage 1, calibrated"
RECIPES = {
    "swapped": (LINEAR, False),
    "stage 1": (LINEAR, True),
    BASE: (CALIBRATED, True),
    f"{BASE}, tiles of 4 x 4": (dataclasses.replace(CALIBRATED, window="tiled", window_size=4), True),
}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images as rows, and their labels [N]."""

    rows: ImageRows
    labels: np.ndarray


def read_images(folder: Path, teacher: PreTrainedModel, processor: Any, pixels: int, seed: int) -> tuple[Labelled, ...]:
    """Training and test images (a third) of `folder`/class/*, preprocessed as the teacher's were, in a random order.

    Images with equal pixels are taken once, so that none is in both parts.
    """
    from PIL import Image

    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found: dict[str, tuple[torch.Tensor, int]] = {}
    for label, name in enumerate(names):
        for file in sorted((folder / name).iterdir()):
            with Image.open(file) as image:
                plain = image.convert("RGB")
            key = hashlib.sha256(plain.tobytes()).hexdigest()
            size = {"height": pixels, "width": pixels}
            options = {"size": size, "do_center_crop": False, "return_tensors": "pt"}
            found.setdefault(key, (processor(plain, **options)["pixel_values"], label))
    chosen = [list(found.values())[i] for i in np.random.default_rng(seed).permutation(len(found))]
    cut = len(chosen) // 3
    parts = (chosen[cut:], chosen[:cut])
    return tuple(
        Labelled(lc.image_rows(teacher, [image for image, _ in part]), np.array([label for _, label in part]))
        for part in parts
    )


class Measure:
    """Compares students with a teacher on two parts of the same images."""

    def __init__(self, teacher: PreTrainedModel, train: Labelled, test: Labelled) -> None:
        self.train, self.test = train, test
        self.wanted = image_features(teacher, test.rows)
        known = image_features(teacher, train.rows)
        self.probe = linear_probe(known, train.labels)
        self.answers = self.probe(self.wanted)
        self.teacher = self._fitted(known, self.wanted)

    def _share(self, answers: np.ndarray) -> float:
        return float((answers == self.test.labels).mean())

    def _fitted(self, train: ImageFeatures, test: ImageFeatures) -> dict[str, float]:
        methods = {"probe": linear_probe, "knn": nearest_neighbours}
        return {name: self._share(method(train, self.train.labels)(test)) for name, method in methods.items()}

    def student(self, student: torch.nn.Module, refit: bool) -> dict[str, Any]:
        features = image_features(student, self.test.rows)
        answers = self.probe(features)
        fitted = self._fitted(image_features(student, self.train.rows), features) if refit else {}
        return {
            "cosines": feature_cosines(features, self.wanted),
            "teacher_probe": self._share(answers),
            "agreement": float((answers == self.answers).mean()),
            **fitted,
        }


def layer_errors(student: PreTrainedModel, rows: ImageRows, count: int) -> list[float]:
    """Of each linearized layer: squared error over the mean square of its softmax output."""
    errors = head_errors(student, rows, count, count)
    return [sum(layer["error"]) / sum(layer["power"]) for layer in errors.values()]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All recipes; each result is written as soon as it is there."""
    teacher = AutoModel.from_pretrained(args.teacher).eval().requires_grad_(False)
    processor = AutoImageProcessor.from_pretrained(args.teacher)
    train, test = read_images(args.images, teacher, processor, args.pixels, args.seed)
    order, tokens = range(len(train.labels)), train.rows.sequence_length
    seen, held_out = (ImageRows(train.rows.batch(part), tokens) for part in (order[16:], order[:16]))
    measure = Measure(teacher, train, test)
    results: list[dict[str, Any]] = [{"recipe": "teacher", **measure.teacher}]
    logger.info("%d training and %d test images; teacher %s", len(train.labels), len(test.labels), measure.teacher)
    steps: dict[str, Any] = {"epochs": 10**4, "batch_size": args.batch_size, "schedule": "cosine", "log_every": 20}
    made = {"arguments": {key: str(value) for key, value in vars(args).items()}, **versions(), **device_tags()}

    def note(name: str, student: PreTrainedModel, begun: float, **more: Any) -> None:
        seconds = time.monotonic() - begun
        result = {"recipe": name, "seconds": seconds, "layer_errors": layer_errors(student, test.rows, 16), **more}
        results.append(result | measure.student(student, args.refit))
        logger.info("%s", json.dumps(results[-1]))
        write_json(args.out, {**made, "results": results})

    stage1 = lc.TransferParams(max_steps=args.steps, eval_every=args.steps, lr=args.lr, **steps)
    trained: dict[str, PreTrainedModel] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (settings, trains) in RECIPES.items():
            begun, student = time.monotonic(), lc.linearize(teacher, settings, seed=args.seed)
            if trains:
                lc.attention_transfer(student, seen, held_out, stage1, scratch=Path(scratch, name), seed=args.seed)
                trained[name] = student
            note(name, student, begun)
        budget = lc.SelectParams(softmax_budget={"layers": args.kept}, criterion="normalized_transfer_error", rows=16)
        begun = time.monotonic()
        chosen, selection = lc.select(teacher, trained[BASE], held_out, budget)
        kept = selection.settings.softmax_layers
        note(f"{BASE}, the {args.kept} layers of largest error kept", chosen, begun, kept=kept)
        for scope, lr in (("lora", args.lora_lr), ("full", args.full_lr)):
            stage2 = lc.ImageFinetuneParams(
                scope=scope,  # type: ignore[arg-type]
                lr=lr,
                max_steps=args.finetune_steps,
                eval_every=args.finetune_steps,
                **steps,
            )
            begun, student = time.monotonic(), lc.linearize(teacher, CALIBRATED, seed=args.seed)
            student.load_state_dict(trained[BASE].state_dict())
            folder = Path(scratch, scope)
            model, _ = lc.image_finetune(student, seen, held_out, stage2, scratch=folder, seed=args.seed)
            merged = model.merge_and_unload() if scope == "lora" else model  # type: ignore[operator]
            note(f"{BASE}, then features, {scope}", merged, begun)  # type: ignore[arg-type]
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder of images for each class")
    parser.add_argument("--out", type=Path, default=Path("vision.json"))
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--steps", type=int, default=120, help="of attention transfer")
    parser.add_argument("--finetune-steps", type=int, default=60)
    parser.add_argument("--kept", type=int, default=4, help="layers that keep softmax attention in one recipe")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--refit", action="store_true", help="also fit a probe and k-NN on each student's features")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--lora-lr", type=float, default=2e-3)
    parser.add_argument("--full-lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    """Run as the command line says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(parse())


if __name__ == "__main__":
    main()
