"""One JSON and the tables of docs/evidence.md from what several `spherelm evidence` commands measured.

    python research/ladder_summary.py docs/results/ladder-older.json runs/evidence-*.json --out docs/results/ladder.json

Points on the same text stand together, whatever grid they were part of; speedups are looked for among all of them. A
summary that was written before is taken too; of what was measured twice the last counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pairs_summary import read_json, shortened

from spherelm.experiments.evidence_record import evidence_table, restored, with_row
from spherelm.experiments.growth import all_speedups, growth

Text = tuple[str, str]
"""The last parts of the data directories, training and test."""


def records_of(found: dict[str, Any]) -> Iterator[tuple[Text, dict[str, Any]]]:
    """The content of one file, by text: the record of a command, or a summary of several."""
    if "texts" in found:
        for text in found["texts"]:
            yield (text["text"]["train"], text["text"]["test"]), text
    else:
        grid = found["grid"]
        about = {"commands": [shortened(found["command"])], "git_commit": [str(found["git_commit"])]}
        yield (Path(grid["data"]).name, Path(grid["test"]).name), {**found, **about}


def cost_place(cost: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a timing; of several with the same key the last counts."""
    return cost["size"], cost["context"], cost["compiled"], tuple(cost["seconds"])


def merged(text: Text, records: list[dict[str, Any]]) -> dict[str, Any]:
    """All measurements of `records`, which are on `text`, cheapest first; and the speedups among them."""
    found: list[dict[str, Any]] = []
    for record in records:
        for row in record["measured"]:
            found = with_row(found, restored(row))
    rows = sorted(found, key=lambda row: (row["context"], row["block_parameters"] * row["tokens"]))
    costs = {cost_place(cost): cost for record in records for cost in record.get("costs", [])}
    speedups = list(all_speedups(rows, list(costs.values())))
    return {
        "text": dict(zip(("train", "test"), text, strict=True)),
        "measured": rows,
        "costs": list(costs.values()),
        "speedups": speedups,
        "growth": growth(speedups),
        "commands": list(dict.fromkeys(command for record in records for command in record["commands"])),
        "git_commit": sorted({commit for record in records for commit in record["git_commit"]}),
        "versions": records[-1]["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    by_text: dict[Text, list[dict[str, Any]]] = {}
    for path in given.records:
        for text, record in records_of(read_json(path)):
            by_text.setdefault(text, []).append(record)
    texts = [merged(text, records) for text, records in sorted(by_text.items())]
    given.out.write_text(json.dumps({"texts": texts}, indent=1) + "\n", encoding="utf-8")
    for summary in texts:
        print(summary["text"], evidence_table(summary), json.dumps(summary["growth"], indent=1), sep="\n\n")


if __name__ == "__main__":
    main()
