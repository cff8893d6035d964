"""The results of several `search_rates.py` searches as one JSON: the runs of each, best first, and its command.

python research/search_summary.py runs/search/*.json --about "preset demo, one seed" --out docs/results/tuning.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def summary(path: Path) -> dict[str, Any]:
    """One search: runs by their loss, infinite where one diverged."""
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: found[name] for name in ("arm", "fixed", "command", "git_commit", "versions")}
    return {"name": path.stem, **kept, "runs": sorted(found["runs"], key=lambda run: run["loss"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", type=Path, nargs="+")
    parser.add_argument("--about", required=True, help="what was searched, on what, in a sentence")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = {"about": given.about, "searches": [summary(path) for path in given.searches]}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
