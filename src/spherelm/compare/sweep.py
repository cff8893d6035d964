"""Many runs that differ in a field or two, and the table of how they ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
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


LONGEST_NAME = 200
"""Bytes of a directory's name, of 255 that most file systems allow."""


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
    if isinstance(together, list):
        return field, together
    if "[" in values:
        raise ValueError(f"cannot read {text!r}: what stands in brackets is a list, such as betas=[0.9,0.95]")
    return field, [_value(value) for value in values.split(",")]


FIXED = {
    "arm": "--arm",
    "preset": "--preset",
    "recipe": "--recipe",
    "data": "--data",
    "vocab_size": "the tokenizer of --data",
    "seed": "--seeds",
}
"""What is chosen by a flag and is no field that can be varied or set, and the flag."""


def parse_axes(words: Sequence[str], flags: Mapping[str, Any], fixed: Collection[str]) -> dict[str, list[Any]]:
    """`["alpha_init=0.05,0.25", "batch_size=4,8"]` as a mapping; raises `ValueError` for a field that is chosen twice.

    flags: what the command's own flags say, `None` where they were left out; fixed: which of `FIXED` cannot stand here.
    """
    axes: dict[str, list[Any]] = {}
    for text in words:
        field, values = parse_axis(text)
        if field in fixed:
            raise ValueError(f"{text!r}: {field} is chosen by {FIXED[field]}")
        if field in axes:
            raise ValueError(f"{text!r}: {field} was given before, give it once")
        if flags.get(field) is not None:
            raise ValueError(f"{text!r}: {field} is given by --{field.replace('_', '-')} too, give it once")
        axes[field] = values
    return axes


def parse_fields(words: Sequence[str], flags: Mapping[str, Any] = {}) -> dict[str, Any]:
    """`["schedule=log", "rho=0.05"]` as a mapping; raises `ValueError` for what is no field with one value.

    flags: as for `parse_axes`.
    """
    fields = {}
    for field, values in parse_axes(words, flags, FIXED.keys() - {"seed"}).items():
        if len(values) > 1:
            raise ValueError(f"{field} has {len(values)} values, {values}: a run has one")
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
    first choice of the arm; and the data, commands, commit and versions) and the page `out/index.html`, and returns its rows,
    best mean first, diverged ones last. What earlier sweeps left in `out` stays in both, but for choices whose runs are gone.
    A run whose validation loss rises far above an untrained model's counts as diverged.

    Raises `FileExistsError` where `out` holds what no sweep wrote, and `ValueError` where that sweep was on other data.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    require_matplotlib()  # the page comes last: do not train for it in vain
    limit = {"stop_above": math.log(vocab_size) + UNTRAINED}
    earlier, commands = on_record(out, data)
    jobs = [
        Job(make_run(**{**limit, **choice}, vocab_size=vocab_size, data=data, seed=seed), out / name_of(choice, seed))
        for choice in choices
        for seed in range(seeds)
    ]
    long = [job.out.name for job in jobs if len(job.out.name.encode()) > LONGEST_NAME]
    if long:
        raise ValueError(
            f"a run's directory would be called {long[0][:60]}... , which is too long: vary fewer fields at once"
        )
    losses = iter(run_jobs(jobs, workers, "sweep"))
    rows = [
        Row(choice, [next(losses) for _ in range(seeds)], [name_of(choice, seed) for seed in range(seeds)])
        for choice in choices
    ]
    rows = against_base(together(earlier, rows))
    rows.sort(key=lambda row: (math.isnan(row.mean), row.mean))
    commands = list(dict.fromkeys([*commands, command_line()]))
    about = {"data": data, "commands": commands, "git_commit": git_commit(), "versions": versions()}
    write_json(out / "sweep.json", {"rows": [row.record() for row in rows], **about})
    write_page(rows, out, commands)
    return rows


def on_record(out: Path, data: str | None) -> tuple[list[Row], list[str]]:
    """The rows that earlier sweeps left in `out` and whose runs are still there, each arm's base first, and their commands.

    Raises `FileExistsError` where `out` is a file or holds files that a sweep would write over and did not write, and
    `ValueError` where what is there was trained on other data than `data`.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another --out")
    foreign = [name for name in ("sweep.json", "index.html") if (out / name).exists()]
    if not foreign:
        return [], []
    try:
        record = json.loads((out / "sweep.json").read_text("utf-8"))
        stored = sorted(record["rows"], key=lambda row: not row["is_base"])
        rows = [Row(dict(row["choice"]), [math.nan if x is None else x for x in row["losses"]], list(row["runs"]))
                for row in stored]  # fmt: skip
        before, commands = record["data"], [str(command) for command in record["commands"]]
        against_base(rows)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise FileExistsError(
            f"{out / foreign[0]} was not written by spherelm sweep: choose another --out, or move it away"
        ) from error
    if before != data:
        raise ValueError(f"{out} holds a sweep on data {before!r}, now it is {data!r}: choose another --out")
    return [row for row in rows if all((out / run).is_dir() for run in row.runs)], commands


def together(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Both, with one row a choice: the later one, unless the earlier has more seeds."""
    found: dict[str, Row] = {}
    for row in (*earlier, *rows):
        choice = json.dumps(dict(row.choice), sort_keys=True)
        if choice not in found or len(found[choice].losses) <= len(row.losses):
            found[choice] = row
    return list(found.values())


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
