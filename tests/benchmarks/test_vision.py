"""The benchmark of vision transformers runs every recipe on images in class folders and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor

from benchmarks.vision import RECIPES, parse, read_images, run
from tests.core.tiny_images import tiny_teacher


def make(folder: Path) -> tuple[Path, Path]:
    """A teacher with its processor, and 60 images of two classes, of which one stands in both."""
    teacher, images = folder / "teacher", folder / "images"
    tiny_teacher().save_pretrained(teacher)
    BitImageProcessor(do_center_crop=False).save_pretrained(teacher)
    draw = np.random.default_rng(0)
    for place in range(60):
        file = images / ("dark" if place % 2 else "light") / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 120, (20, 24, 3)) + (0 if place % 2 else 120)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    (images / "light" / "again.png").write_bytes((images / "dark" / "1.png").read_bytes())
    return teacher, images


def test_equal_pixels_are_read_once(tmp_path: Path) -> None:
    teacher, images = make(tmp_path)
    processor = AutoImageProcessor.from_pretrained(teacher)
    train, test = read_images(images, tiny_teacher(), processor, 40, seed=0)
    assert (len(train.labels), len(test.labels)) == (40, 20)
    assert train.rows.columns["pixel_values"].shape == (40, 3, 40, 40)


def test_every_recipe_is_measured(tmp_path: Path) -> None:
    teacher, images = make(tmp_path)
    out = tmp_path / "vision.json"
    options = {
        "teacher": teacher,
        "images": images,
        "out": out,
        "pixels": 40,
        "steps": 1,
        "finetune-steps": 1,
        "kept": 1,
    }
    run(parse([*(f"--{name}={value}" for name, value in options.items()), "--refit"]))
    results = json.loads(out.read_text())["results"]
    assert [result["recipe"] for result in results[1:5]] == list(RECIPES)
    assert len(results) == 1 + len(RECIPES) + 3
    for result in results[1:]:
        assert 0 <= result["probe"] <= 1
        assert len(result["layer_errors"]) == (2 if "kept" in result else 3)
