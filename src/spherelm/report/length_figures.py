"""Perplexity over the length of the window, of runs that `spherelm eval --perplexity --json` measured (nGPT paper, Fig. 13)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.counting import counted
from spherelm.report.figures import Figure
from spherelm.report.ladder_plots import Series, ends_of_runs
from spherelm.report.wording import listed


@dataclass(frozen=True)
class Measured:
    """One measurement: of which arm and size, how positions were placed, on which text, and perplexities by length."""

    arm: str
    size: str
    positions: str
    text: str
    trained: int
    perplexities: Mapping[int, float]


def evaluations(run: Path) -> Iterator[dict[str, Any]]:
    """What `spherelm eval --json` wrote into a run directory, file after file; other files are passed over."""
    for path in sorted(run.glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def read_lengths(run: Path, arm: str, size: str) -> list[Measured]:
    """The perplexities over length that were measured of a run."""
    found = []
    for record in evaluations(run):
        part = record.get("perplexity")
        if isinstance(part, dict):
            windows = "disjoint windows" if part["stride"] is None else f"windows sliding by {part['stride']}"
            files = listed([Path(file).name for file in part["files"]])
            text = (
                f"{counted(part['tokens'], 'token')} of {counted(part['documents'], 'document')} of {files}, {windows}"
            )
            by_length = {int(row["length"]): float(row["perplexity"]) for row in part["lengths"]}
            found.append(Measured(arm, size, part["positions"], text, int(part["trained_length"]), by_length))
    return found


def length_figures(measured: Sequence[Measured]) -> list[Figure]:
    """A figure for each text (and way to cut it) and set of lengths: what was measured on other tokens does not compare."""
    groups: dict[tuple[str, tuple[int, ...]], list[Measured]] = {}
    for one in measured:
        groups.setdefault((one.text, tuple(sorted(one.perplexities))), []).append(one)
    return [
        _figure(text, lengths, group, f"length-{i}")
        for i, ((text, lengths), group) in enumerate(groups.items())
        if len(lengths) > 1
    ]


def _figure(text: str, lengths: Sequence[int], group: Sequence[Measured], key: str) -> Figure:
    kinds: dict[tuple[str, str, str], list[Measured]] = {}
    for one in group:
        kinds.setdefault((one.size, one.positions, one.arm), []).append(one)
    looks = list(dict.fromkeys(kind[:2] for kind in kinds))
    several = len({size for size, _ in looks}) > 1
    series = [
        Series(
            arm,
            f"{size}, {positions}" if several else positions,
            np.array(lengths, dtype=float),
            [np.array([one.perplexities[length] for one in seeds]) for length in lengths],
            looks.index((size, positions)),
        )
        for (size, positions, arm), seeds in kinds.items()
    ]
    title = "Perplexity over the length of the window"
    trained = listed([f"{length:,}" for length in sorted({one.trained for one in group})])
    caption = (
        f"On {text}: at each length the same tokens. Trained at {trained} tokens. Means over seeds (small dots). "
        "Corresponds to figure 13 of the paper."
    )
    drawing = ends_of_runs(series, "tokens of a window", "perplexity", False, key, title, caption)
    return Figure(drawing, title, escape(caption))
