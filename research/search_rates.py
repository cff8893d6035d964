"""Search an arm's rates, role by role, and its other numbers: one coordinate at a time, both arms equally far.

    python research/search_rates.py --arm gpt --data data/tuning --out runs/search --fixed lr=2e-3 --start gain_rate=8

Each field in turn is multiplied and divided by its factor as long as that is better; `--turns` times around, or until
`--evaluations` runs are done. What is done already is taken as it is. Writes `OUT/ARM-NAME.json` with every run in the
order it was tried. The validation text of `--data` chooses, so something else has to decide.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spherelm.data.sources import parse_data
from spherelm.experiments.jobs import Job, do_job
from spherelm.experiments.sweep import UNTRAINED, name_of
from spherelm.recipes import make_run
from spherelm.recipes.written import FIXED, parse_fields
from spherelm.runs.record import command_line, git_commit, versions, write_json


def fixed_fields(words: Sequence[str]) -> dict[str, Any]:
    """The fields of `--fixed`, including a recipe; `ValueError` for a field that another flag sets
    and for several values.
    """
    return parse_fields(words, fixed=FIXED.keys() - {"recipe", "lr"})


class Search:
    """Runs of one arm and what they ended at, by the values of the fields that are searched."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.fixed = asked, fixed_fields(asked.fixed)
        self.vocab_size = parse_data(str(asked.data)).vocab_size
        self.losses: dict[tuple[float, ...], float] = {}

    def loss(self, values: Mapping[str, float]) -> float:
        """The final loss at `values`, trained if it has not been;
        infinite where it diverged or the runs are used up.
        """
        key = tuple(values.values())
        if key not in self.losses:
            if len(self.losses) >= self.asked.evaluations:
                return math.inf
            choice = {"arm": self.asked.arm, "preset": self.asked.preset, **self.fixed, **values}
            run = make_run(
                **{"eval_every": 0, "eval_windows": 96, "compile": True, **choice}, vocab_size=self.vocab_size,
                data=str(self.asked.data), seed=self.asked.seed, stop_above=math.log(self.vocab_size) + UNTRAINED,
            )  # fmt: skip
            loss = do_job(Job(run, self.asked.out / name_of(choice, self.asked.seed)))
            self.losses[key] = math.inf if math.isnan(loss) else loss
            print(f"{self.asked.name} {self.losses[key]:.4f} {dict(values)}", flush=True)
            self.write(list(values))
        return self.losses[key]

    def along(self, values: dict[str, float], field: str, factor: float) -> dict[str, float]:
        """The best of `values` with `field` multiplied by powers of `factor`,
        as far as each is better than the last.
        """
        best = values
        for step in (factor, 1 / factor):
            while self.loss(moved := {**best, field: float(f"{best[field] * step:.3g}")}) < self.loss(best):
                best = moved
            if best is not values:
                break
        return best

    def write(self, names: list[str]) -> None:
        """All of it so far."""
        runs = [dict(zip(names, key, strict=True)) | {"loss": loss} for key, loss in self.losses.items()]
        best = min(runs, key=lambda run: run["loss"])
        about = {"command": command_line(), "git_commit": git_commit(), "versions": versions()}
        record = {"arm": self.asked.arm, "fixed": self.fixed, "best": best, "runs": runs, **about}
        write_json(self.asked.out / f"{self.asked.arm}-{self.asked.name}.json", record)


def fields_of(words: list[str]) -> Iterator[tuple[str, float, float]]:
    """Name, start and factor of each `name=start:factor`."""
    for word in words:
        name, _, numbers = word.partition("=")
        start, _, factor = numbers.partition(":")
        yield name, float(start), float(factor or 2)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--name", default="adamw", help="what this search is called")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--start", nargs="+", required=True, metavar="FIELD=START[:FACTOR]")
    parser.add_argument("--fixed", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    asked = parser().parse_args()
    try:
        search(asked)
    except (ValueError, OSError) as error:
        print(f"search_rates: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def search(asked: argparse.Namespace) -> None:
    """Search as asked, one coordinate after another."""
    torch.set_num_threads(1)
    fields = list(fields_of(asked.start))
    runs = Search(asked)
    values = {name: start for name, start, _ in fields}
    for _ in range(asked.turns):
        before = values
        for name, _, factor in fields:
            values = runs.along(values, name, factor)
        if values == before:
            break


if __name__ == "__main__":
    main()
