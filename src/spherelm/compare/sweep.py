"""Many runs that differ in a field or two, and the table of how they ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.compare.jobs import Job, run_jobs
from spherelm.recipes import make_run
from spherelm.train.record import command_line, git_commit, versions, write_json


@dataclass(frozen=True)
class Row:
    """One configuration of a sweep: what was chosen, and the final validation losses (nats per token) of its seeds."""

    choice: dict[str, Any]
    losses: list[float]

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN if any seed diverged."""
        return float(np.mean(self.losses))

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; `None` for one seed."""
        return float(np.std(self.losses, ddof=1) / math.sqrt(len(self.losses))) if len(self.losses) > 1 else None


def name_of(choice: Mapping[str, Any], seed: int) -> str:
    """The name of the run directory of a choice and a seed."""
    parts = [str(choice["arm"])] + [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                                    for key, value in choice.items() if key != "arm"]  # fmt: skip
    return "-".join([*parts, f"seed={seed}"]).replace("/", "_")


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value from each axis, the last axis varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`"alpha_init=0.05,0.25"` as ("alpha_init", [0.05, 0.25]); raises `ValueError` if it does not read so."""
    field, _, values = text.partition("=")
    if not field or not values:
        raise ValueError(f"cannot read {text!r}: write a field and its values, such as alpha_init=0.05,0.25")
    return field, [_value(value) for value in values.split(",")]


def parse_fields(words: Sequence[str]) -> dict[str, Any]:
    """`["schedule=log", "rho=0.05"]` as a mapping; raises `ValueError` for what is no field with one value."""
    fields = {}
    for text in words:
        field, values = parse_axis(text)
        if len(values) > 1:
            raise ValueError(f"{text!r} gives {field} {len(values)} values: a run has one")
        fields[field] = values[0]
    return fields


def _value(text: str) -> Any:
    """A JSON value where it is one, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def sweep(
    choices: Sequence[Mapping[str, Any]],
    seeds: int,
    out: Path,
    *,
    vocab_size: int,
    data: str | None = None,
    workers: int | None = None,
) -> list[Row]:
    """Train every choice (keywords of `recipes.make_run`, "arm" among them) with every seed; resumable by calling again.

    Writes `out/sweep.json` (one object a choice: `choice`, `losses`, `mean`, `standard_error`; and the command, commit and
    versions) and returns its rows, best mean first, diverged ones last.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    jobs = [
        Job(make_run(**choice, vocab_size=vocab_size, data=data, seed=seed), out / name_of(choice, seed))
        for choice in choices
        for seed in range(seeds)
    ]
    losses = iter(run_jobs(jobs, workers, "sweep"))
    rows = [Row(dict(choice), [next(losses) for _ in range(seeds)]) for choice in choices]
    rows.sort(key=lambda row: (math.isnan(row.mean), row.mean))
    record = [{**vars(row), "mean": row.mean, "standard_error": row.standard_error} for row in rows]
    about = {"command": command_line(), "git_commit": git_commit(), "versions": versions()}
    write_json(out / "sweep.json", {"rows": record, **about})
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row.choice))
    lines = [f"| {' | '.join(keys)} | validation loss | s.e. | seeds |", "|" + "---|" * (len(keys) + 3)]
    for row in rows:
        error = row.standard_error
        cells = [str(row.choice.get(key, "")) for key in keys]
        cells += ["diverged" if math.isnan(row.mean) else f"{row.mean:.4f}", "" if error is None else f"{error:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {len(row.losses)} |")
    return "\n".join(lines)
