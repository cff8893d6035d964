"""Many runs that differ in a field or two, and the table of how they ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.data.output import check_place, write_json
from spherelm.errors import OutputExistsError, UserError
from spherelm.experiments.jobs import Job, run_jobs, say_before
from spherelm.experiments.record import standard_error
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig, read_record
from spherelm.runs.record import command_line, git_commit, or_nan, versions
from spherelm.train.batches import open_data

UNTRAINED = 1.0
"""How far above the loss of an even guess, ln(vocab_size) nats,
a validation may come out before a run counts as diverged.
"""


LONGEST_NAME = 200
"""Bytes of a directory's name, of 255 that most file systems allow."""


def name_of(choice: Mapping[str, Any], seed: int) -> str:
    """The name of the run directory of a choice and a seed."""
    parts = [str(choice["arm"])] + [f"{key}={value:.12g}" if isinstance(value, float) else f"{key}={value}"
                                    for key, value in choice.items() if key != "arm"]  # fmt: skip
    return "-".join([*parts, f"seed={seed}"]).replace("/", "_")


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value from each axis, the last axis varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@dataclass(frozen=True)
class Row:
    """One configuration of a sweep: what was chosen, its run directories,
    and their final validation losses, seed by seed.

    losses: nats per token, NaN for a run that diverged. base: the losses of the first choice of the same arm, `None`
    where this is it.
    """

    choice: Mapping[str, Any]
    losses: Sequence[float]
    runs: Sequence[str] = ()
    base: Sequence[float] | None = None

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN if any seed diverged."""
        return float(np.mean(self.losses))

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; `None` for one seed."""
        return standard_error(self.losses)

    @property
    def difference(self) -> float | None:
        """The mean of this loss minus the base's with the same seed, over seeds of both; `None` for the base itself."""
        return None if self.base is None else float(np.mean(self._differences(self.base)))

    @property
    def difference_error(self) -> float | None:
        """The standard error of `difference`, of seeds in pairs: what a seed does to both is not in it."""
        return None if self.base is None else standard_error(self._differences(self.base))

    def _differences(self, base: Sequence[float]) -> list[float]:
        return [loss - other for loss, other in zip(self.losses, base, strict=False)]

    def record(self) -> dict[str, Any]:
        """As plain values."""
        derived = ("mean", "standard_error", "difference", "difference_error")
        whole = {"choice": dict(self.choice), "losses": list(self.losses), "runs": list(self.runs)}
        return {**whole, "is_base": self.base is None, **{name: getattr(self, name) for name in derived}}


def canonical(choice: Mapping[str, Any]) -> str:
    """A choice as text that is the same for the same choice: 1 is 1.0, and the order of fields is no part of it."""
    return json.dumps({key: _canonical(value) for key, value in choice.items()}, sort_keys=True)


def _canonical(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def sweep(
    choices: Sequence[Mapping[str, Any]],
    seeds: int,
    out: Path,
    *,
    vocab_size: int,
    data: str | None = None,
    workers: int | None = None,
    machine: Mapping[str, Any] = {},
    quiet: bool = False,
) -> list[Row]:
    """Train every choice (keywords of `recipes.make_run`, "arm" among them) with every seed;
    resumable by calling again.

    Writes `out/sweep.json` (one object a choice: `choice`, `losses`, `runs`, `mean`, `standard_error`, `difference`
    from the first choice of the arm; and the commands, commit and versions) and returns its rows, best mean first,
    diverged ones last. What earlier sweeps left in `out` stays there, but for choices whose runs are gone. A run whose
    validation loss rises far above an untrained model's counts as diverged. machine: `threads` and `device` of the
    runs, which are no part of a choice.

    Raises `FileExistsError` where `out` holds what no sweep wrote, and `ValueError` where that sweep was on other text.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    limit = {"stop_above": math.log(vocab_size) + UNTRAINED, **machine}
    jobs = [
        Job(make_run(**{**limit, **choice}, vocab_size=vocab_size, data=data, seed=seed), out / name_of(choice, seed))
        for choice in choices
        for seed in range(seeds)
    ]
    long = [job.out.name for job in jobs if len(job.out.name.encode()) > LONGEST_NAME]
    if long:
        raise UserError(
            f"a run's directory would be called {long[0][:60]}... , which is too long: vary fewer fields at once"
        )
    on_record(out, jobs[0].config)  # what is refused is refused before anything is trained
    if not quiet:
        say_before(jobs, workers)
    losses = iter(run_jobs(jobs, workers, "" if quiet else "sweep"))
    rows = [
        Row(choice, [next(losses) for _ in range(seeds)], [name_of(choice, seed) for seed in range(seeds)])
        for choice in choices
    ]
    bases, others, commands = on_record(out, jobs[0].config)  # again: another sweep may have written meanwhile
    rows = against_base(together(bases, rows, others))
    rows.sort(key=lambda row: (math.isnan(row.mean), row.mean))
    commands = list(dict.fromkeys([*commands, command_line()]))
    about = {"commands": commands, "git_commit": git_commit(), "versions": versions()}
    write_json(out / "sweep.json", {"rows": [row.record() for row in rows], **about})
    return rows


def on_record(out: Path, config: RunConfig) -> tuple[list[Row], list[Row], list[str]]:
    """Rows of earlier sweeps in `out` whose runs are still there: each arm's base, the others, and the commands.

    Raises as `check_place` does, `FileExistsError` where `out` holds files that a sweep would write over and did not
    write, and `ValueError` where what is there was trained on other text than that of `config`.
    """
    check_place(out)
    foreign = [name for name in ("sweep.json", "index.html") if (out / name).exists()]
    if not foreign:
        return [], [], []
    try:
        record = json.loads((out / "sweep.json").read_text("utf-8"))
        is_base = [bool(row.get("is_base", row["difference"] is None)) for row in record["rows"]]
        rows = [stored_row(row) for row in record["rows"]]
        commands = [str(command) for command in record.get("commands") or [record["command"]]]
        against_base(rows)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise OutputExistsError(
            f"{out / foreign[0]} was not written by spherelm sweep: choose another --out, or move it away"
        ) from error
    left = [(row, base) for row, base in zip(rows, is_base, strict=True) if is_there(row, out)]
    if left and (before := text_of(out / left[0][0].runs[0])) != (now := open_data(config).identity):
        differing = next(name for name in now if before.get(name) != now[name])
        raise UserError(f"{out} holds a sweep on other text: its {differing} data differ; choose another --out")
    return [row for row, base in left if base], [row for row, base in left if not base], commands


def stored_row(record: Mapping[str, Any]) -> Row:
    """A row as `sweep.json` gives it back, with NaN again where a run diverged."""
    return Row(dict(record["choice"]), list(map(or_nan, record["losses"])), [str(run) for run in record["runs"]])


def is_there(row: Row, out: Path) -> bool:
    """Whether all runs of the row still have their curve."""
    return all((out / run / name).is_file() for run in row.runs for name in ("metrics.jsonl", "config.json"))


def text_of(run: Path) -> dict[str, Any]:
    """The identity of the text that a run was trained on."""
    found = read_record(run / "config.json").get("data_identity", {})
    return found if isinstance(found, dict) else {}


def together(bases: Sequence[Row], rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """One row a choice: earlier bases, `rows`, then other earlier ones; of two the later, unless it has fewer seeds."""
    found = {canonical(row.choice): row for row in bases}
    for row in rows:
        if (before := found.get(canonical(row.choice))) is None or len(before.losses) <= len(row.losses):
            found[canonical(row.choice)] = row
    for row in others:
        if (after := found.get(canonical(row.choice))) is None or len(after.losses) < len(row.losses):
            found[canonical(row.choice)] = row
    return list(found.values())


def against_base(rows: Sequence[Row]) -> list[Row]:
    """Each row with the losses of the first of its arm to be compared with."""
    first: dict[Any, Row] = {}
    for row in rows:
        first.setdefault(row.choice["arm"], row)
    return [replace(row, base=None if (base := first[row.choice["arm"]]) is row else base.losses) for row in rows]


def sweep_table(rows: Sequence[Row]) -> str:
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
