"""Where pairs of a normalized model and its baseline ended, as one JSON:
what sweeps, benches and perplexities over length say.

    python research/pairs_summary.py --sweeps pairs/* --benches bench/*.json --lengths lengths/*.json --out hybrid.json

Sweeps are directories of `spherelm sweep`; benches what `spherelm bench --json` wrote; lengths what
`spherelm eval --perplexity --json` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The content of the file; ends the script with one line where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    return found


def shortened(command: str) -> str:
    """A command with every absolute path cut to its last two parts."""
    return re.sub(r"(?<!\S)/\S+", lambda match: "/".join(match[0].split("/")[-2:]), command)


def sweep(directory: Path) -> dict[str, Any]:
    """The varied fields, the final losses by seed, and the commands."""
    found = read_json(directory / "sweep.json")
    names = ("choice", "losses", "mean", "standard_error")
    rows = [{name: row[name] for name in names} for row in found["rows"]]
    return {"name": directory.name, "rows": rows, "commands": [shortened(command) for command in found["commands"]]}


def lengths(path: Path) -> dict[str, Any]:
    """Loss over length of one run."""
    found = read_json(path)
    kept = ("length", "loss", "perplexity")
    by_length = [{name: row[name] for name in kept} for row in found["perplexity"]["lengths"]]
    return {"name": path.stem, "lengths": by_length, "command": shortened(found["command"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", type=Path, nargs="*", default=[])
    parser.add_argument("--benches", type=Path, nargs="*", default=[])
    parser.add_argument("--lengths", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = {
        "sweeps": [sweep(directory) for directory in given.sweeps],
        "benches": [read_json(path) for path in given.benches],
        "lengths": [lengths(path) for path in given.lengths],
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
