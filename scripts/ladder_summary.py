"""One JSON and the tables of docs/evidence.md from what several `spherelm evidence` commands measured.

    python scripts/ladder_summary.py runs/evidence-*.json --out docs/results/ladder.json

Points on the same text stand together, whatever grid they were part of; speedups are looked for among all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pairs_summary import read_json, shortened

from spherelm.compare.evidence import table
from spherelm.compare.growth import all_speedups, growth

PLACE = ("size", "context", "budget", "contender")


def text_of(record: dict[str, Any]) -> tuple[str, str]:
    """The last parts of the data directories, training and test."""
    grid = record["grid"]
    return Path(grid["data"]).name, Path(grid["test"]).name


def cost_place(cost: dict[str, Any]) -> tuple[Any, ...]:
    """What tells two timings apart; of one place and the same contenders the last counts."""
    return cost["size"], cost["context"], cost["compiled"], tuple(cost["seconds"])


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """All measurements of `records`, which are on one text, cheapest first; and the speedups among them."""
    found = {tuple(row[name] for name in PLACE): row for record in records for row in record["measured"]}
    rows = sorted(found.values(), key=lambda row: (row["context"], row["block_parameters"] * row["tokens"]))
    costs = {cost_place(cost): cost for record in records for cost in record.get("costs", [])}
    speedups = list(all_speedups(rows, list(costs.values())))
    return {
        "text": dict(zip(("train", "test"), text_of(records[0]), strict=True)),
        "measured": rows,
        "costs": list(costs.values()),
        "speedups": speedups,
        "growth": growth(speedups),
        "commands": [shortened(record["command"]) for record in records],
        "git_commit": sorted({str(record["git_commit"]) for record in records}),
        "versions": records[0]["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    by_text: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in given.records:
        record = read_json(path)
        by_text.setdefault(text_of(record), []).append(record)
    texts = [merged(records) for _, records in sorted(by_text.items())]
    given.out.write_text(json.dumps({"texts": texts}, indent=1) + "\n", encoding="utf-8")
    for text in texts:
        print(text["text"], table(text), json.dumps(text["growth"], indent=1), sep="\n\n")


if __name__ == "__main__":
    main()
