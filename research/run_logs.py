"""The validations of every run below directories of `spherelm evidence`, `compare` and `sweep`,
as one file of JSON lines, xz.

    python research/run_logs.py runs/* --out docs/results/run-logs.jsonl.xz

A line a run: its name and directory, what it was made with, the text's hashes, and every validation as [step, tokens,
seconds, nats]. The runs' own logs, which also have every update, are 200 times as large.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

from pairs_summary import read_json, shortened

from spherelm.runs.metrics import read_metrics


def log_of(run: Path) -> dict[str, Any]:
    """The files kept of one run directory."""
    config = read_json(run / "config.json")
    found = {"directory": run.parent.name, "run": run.name, "command": shortened(config["command"])}
    found |= {
        name: config[name] for name in ("git_commit", "data_identity", "arm", "recipe", "model", "optim", "schedule")
    }
    curve = [row for row in read_metrics(run / "metrics.jsonl") if row.get("kind") == "val"]
    columns = ("step", "tokens", "seconds", "loss")
    return {**found, "train": config["train"], "val": [[row[name] for name in columns] for row in curve]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = sorted(path.parent for directory in given.directories for path in directory.glob("*/metrics.jsonl"))
    with lzma.open(given.out, "wt", encoding="utf-8") as file:
        for run in runs:
            file.write(json.dumps(log_of(run)) + "\n")
    print(f"{len(runs)} runs, {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
