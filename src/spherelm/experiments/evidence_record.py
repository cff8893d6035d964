"""The content of `evidence.json`: measurements, costs of steps and speedups; written, read again, and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spherelm.errors import UserError
from spherelm.experiments.evidence_plan import Grid
from spherelm.experiments.growth import all_speedups, growth
from spherelm.runs.record import command_line, git_commit, or_nan, versions

PLACE = ("size", "context", "tokens", "contender")
"""The fields that tell two measurements on the same text apart."""

TEXT = ("data", "test", "test_windows")
"""The fields of a `Grid` that all measurements of one `evidence.json` share, wherever the text that they name lies."""


def with_row(measured: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`measured` with `row` in the place of an earlier one of the same point and contender,
    unless that has more seeds.
    """
    rows = {tuple(one[name] for name in PLACE): one for one in measured}
    at = tuple(row[name] for name in PLACE)
    if at not in rows or len(rows[at]["test"]) <= len(row["test"]):
        rows[at] = row
    return list(rows.values())


def on_record(path: Path, grid: Grid, identity: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The measurements and the costs of steps that earlier commands left in `path`,
    nothing where there is no such file.

    identity: the sha256 of the grid's "data" and "test".
    Raises `ValueError` for what `spherelm evidence` did not write, or wrote of other text than that of `grid`.
    """
    if not path.is_file():
        return [], []
    try:
        record = json.loads(path.read_text("utf-8"))
        text = {name: record["grid"][name] for name in TEXT}
        before = record.get("identity", {})  # earlier versions did not write it
        measured = [restored(row) for row in record["measured"]]
        costs = [dict(cost) for cost in record.get("costs", [])]
        summary(grid, identity, measured, costs)  # holds what speedups are computed from
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not what spherelm evidence wrote ({error!r}): move it away") from error
    for name in TEXT:
        same = before[name] == identity[name] if name in before else text[name] == getattr(grid, name)
        if not same:
            raise UserError(
                f"{path} was measured with {name} {text[name]!r}, now it is {getattr(grid, name)!r}: choose another --out"
            )
    return measured, costs


def restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement as JSON gives it back, with NaN again where a run diverged."""
    lists = {name: list(map(or_nan, row[name])) for name in ("validation", "test")}
    rates = {rate: or_nan(loss) for rate, loss in row["rates"].items()}
    return {**row, **lists, "rates": rates, "test_mean": or_nan(row["test_mean"])}


def summary(
    grid: Grid,
    identity: Mapping[str, str],
    measured: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of `evidence.json`: every measurement, the speedups between them, how they grow, and how it was made.

    identity: as for `on_record`.
    """
    speedups = list(all_speedups(measured, costs))
    about = {"command": command_line(), "git_commit": git_commit(), "versions": versions()}
    found = {"measured": list(measured), "costs": list(costs), "speedups": speedups, "growth": growth(speedups)}
    return {"grid": asdict(grid), "identity": dict(identity), **found, **about}


def evidence_table(record: Mapping[str, Any]) -> str:
    """The measurements and speedups as two Markdown tables."""
    lines = ["| size | context | tokens | contender | peak rate | test loss | seeds |", "|---|---|---|---|---|---|---|"]
    for row in record["measured"]:
        error = f" ± {row['test_error']:.3f}" if row["test_error"] is not None else ""
        loss = f"{row['test_mean']:.3f}{error}" if all(map(math.isfinite, row["test"])) else "diverged"
        place = f"| {row['size']} | {row['context']} | {row['tokens']:,} | {row['contender']} | {row['lr']:g} "
        lines.append(f"{place}| {loss} | {len(row['test'])} |")
    lines += [
        "",
        "| size | context | tokens | baseline | contender | fewer tokens, times | 95 % | fewer seconds, times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["speedups"]:
        edges = f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}" if row["interval"] else ""
        value, seconds = (
            "unknown" if ratio is None else f"{row['bound'] or ''} {ratio:.2f}".strip()
            for ratio in (row["speedup"], row["seconds"])
        )
        place = f"| {row['size']} | {row['context']} | {row['tokens']:,} | {row['baseline']} | {row['contender']} "
        lines.append(f"{place}| {value} | {edges} | {seconds} |")
    return "\n".join(lines)
