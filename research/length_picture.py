"""The picture and the table of docs/evaluation.md from docs/results/length.json, which research/evaluate_demo.py made.

python research/length_picture.py docs/results/length.json docs/images/length.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.report.charts import GuideLine, Panel, chart, line_of
from spherelm.report.svg import standalone

ARMS = ("gpt", "ngpt")


def ways(found: dict[str, Any]) -> list[str]:
    """The ways to place positions that were measured."""
    return list(dict.fromkeys(key.split(", ")[1] for key in found if key.endswith(", disjoint")))


def seeds(found: dict[str, Any]) -> list[int]:
    """The seeds of which both arms were measured in every way."""
    numbers = sorted({int(key.split(", ")[0].split("-")[1]) for key in found})
    return [n for n in numbers if all(f"{arm}-{n}, {way}, disjoint" in found for arm in ARMS for way in ways(found))]


def losses(found: dict[str, Any], arm: str, seed: int, way: str, windows: str = "disjoint") -> np.ndarray:
    """The loss at each length."""
    return np.array([row["loss"] for row in found[f"{arm}-{seed}, {way}, {windows}"]["lengths"]])


def table(found: dict[str, Any], lengths: list[int]) -> str:
    """A line an arm and way: the mean over seeds at the first length,
    and by how much it changes from there as trained.
    """
    head = ["arm", "positions", f"loss at {lengths[0]}", *(f"at {length:,}" for length in lengths[1:])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in ARMS:
        for way in ways(found):
            values = np.stack([losses(found, arm, seed, way) for seed in seeds(found)])
            changes = values[:, 1:] - values[:, :1]
            spread = changes.std(axis=0, ddof=1) / np.sqrt(len(values))
            cells = [f"{mean:+.4f} ± {error:.4f}" for mean, error in zip(changes.mean(axis=0), spread, strict=True)]
            name = {"gpt": "GPT", "ngpt": "nGPT"}[arm]
            lines.append("| " + " | ".join([name, way, f"{values[:, 0].mean():.4f}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments and write the result."""
    record, picture = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    found = record["results"]
    first = next(iter(found.values()))
    lengths = [row["length"] for row in first["lengths"]]
    lines = [
        line_of(
            arm,
            lengths,
            [losses(found, arm, seed, way) - losses(found, arm, seed, "as trained")[0] for seed in seeds(found)],
            way,
            look,
        )
        for arm in ARMS
        for look, way in enumerate(ways(found))
    ]
    y = "loss less that as trained at\nthe trained length (nats per token)"
    panel = Panel(
        lines, "tokens of a window", y, rules=[GuideLine(first["trained_length"], upright=True)], scale="values"
    )
    drawing = chart(
        "length",
        "Loss over the length of the window",
        "By how much the loss on the same tokens differs from that at the trained length, for both arms and each way to place "
        "positions.",
        [panel],
    )
    picture.write_text(standalone(drawing.svg), encoding="utf-8")
    print(table(found, lengths))


if __name__ == "__main__":
    main()
