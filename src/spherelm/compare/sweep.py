"""Many runs that differ in a field or two, and the table of how they ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spherelm.analysis.drawing import require_matplotlib
from spherelm.compare.jobs import Job, run_jobs
from spherelm.compare.sweep_page import Row, write_page
from spherelm.recipes import make_run
from spherelm.train.record import command_line, git_commit, versions, write_json

UNTRAINED = 1.0
"""How far above the loss of an even guess, ln(vocab_size) nats, a validation may come out before a run counts as diverged."""


def name_of(choice: Mapping[str, Any], seed: int) -> str:
    """The name of the run directory of a choice and a seed."""
    parts = [str(choice["arm"])] + [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                                    for key, value in choice.items() if key != "arm"]  # fmt: skip
    return "-".join([*parts, f"seed={seed}"]).replace("/", "_")


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value from each axis, the last axis varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`"alpha_init=0.05,0.25"` as ("alpha_init", [0.05, 0.25]); raises `ValueError` if it does not read so.

    A value that is a list itself stands in brackets: `"betas=[0.9,0.95],[0.9,0.99]"`.
    """
    field, _, values = text.partition("=")
    if not field or not values:
        raise ValueError(f"cannot read {text!r}: write a field and its values, such as alpha_init=0.05,0.25")
    together = _value(f"[{values}]")
    return field, together if isinstance(together, list) else [_value(value) for value in values.split(",")]


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

    Writes `out/sweep.json` (one object a choice: `choice`, `losses`, `runs`, `mean`, `standard_error`, `difference` from the
    first choice of the arm; and the command, commit and versions) and the page `out/index.html`, and returns its rows, best
    mean first, diverged ones last. A run whose validation loss rises far above an untrained model's counts as diverged.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    require_matplotlib()  # the page comes last: do not train for it in vain
    limit = {"stop_above": math.log(vocab_size) + UNTRAINED}
    jobs = [
        Job(make_run(**{**limit, **choice}, vocab_size=vocab_size, data=data, seed=seed), out / name_of(choice, seed))
        for choice in choices
        for seed in range(seeds)
    ]
    losses = iter(run_jobs(jobs, workers, "sweep"))
    rows = [
        Row(choice, [next(losses) for _ in range(seeds)], [name_of(choice, seed) for seed in range(seeds)])
        for choice in choices
    ]
    rows = against_base(rows)
    rows.sort(key=lambda row: (math.isnan(row.mean), row.mean))
    about = {"command": command_line(), "git_commit": git_commit(), "versions": versions()}
    write_json(out / "sweep.json", {"rows": [row.record() for row in rows], **about})
    write_page(rows, out)
    return rows


def against_base(rows: Sequence[Row]) -> list[Row]:
    """Each row with the losses of the first of its arm to be compared with."""
    first: dict[Any, Row] = {}
    for row in rows:
        first.setdefault(row.choice["arm"], row)
    return [replace(row, base=None if (base := first[row.choice["arm"]]) is row else base.losses) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row.choice))
    lines = [f"| {' | '.join(keys)} | validation loss | s.e. | against base | seeds |", "|" + "---|" * (len(keys) + 4)]
    for row in rows:
        error, difference = row.standard_error, row.difference
        cells = [str(row.choice.get(key, "")) for key in keys]
        cells += ["diverged" if math.isnan(row.mean) else f"{row.mean:.4f}", "" if error is None else f"{error:.4f}"]
        cells += ["" if difference is None or math.isnan(difference) else f"{difference:+.4f}"]
        lines.append(f"| {' | '.join(cells)} | {len(row.losses)} |")
    return "\n".join(lines)
