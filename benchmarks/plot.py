"""Draw the table of `benchmarks.attention`: seconds of one layer against the length, each kind of work in one panel.

python -m benchmarks.plot docs/benchmarks/attention.csv docs/images/attention.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(table: Path, image: Path) -> None:
    """Read `table` and write `image`."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["batch"] == "1" and row["work"] != "decode"]
    works = ("forward", "backward", "transfer")
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharex=True, sharey=True, layout="constrained")
    for panel, work in zip(panels, works, strict=True):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = [row for row in rows if row["work"] == work and row["implementation"] == name]
            if points:
                tokens, times = zip(*((int(p["tokens"]), float(p["p50_us"]) / 1e3) for p in points), strict=True)
                width = 2.5 if name == "lolcats" else 1.2
                panel.loglog(tokens, times, marker="o", markersize=3.5, linewidth=width, label=name)
        panel.set_title(f"{work}, one sequence")
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds a layer")
    panels[0].legend(fontsize=8)
    shared = rows[0]
    figure.suptitle(
        f"Llama-3-8B heads, {shared['dtype']}, {shared['gpu']}, torch {shared['torch']}, {shared['date']}", fontsize=10
    )
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
