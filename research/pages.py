"""Write the results in docs/results/ into the pages that state them: what stands between marks is made, never typed.

    python research/pages.py            # rewrites what changed and names it
    python research/pages.py --check    # only names it, and ends with code 1

A page holds `<!-- results:NAME -->` and `<!-- end:NAME -->`; what stands between them is `PARTS[NAME]()`. New results
come from the commands that the pages give; the scripts beside this one draw the pictures.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import cost_tables as costs
import inside_summary
import law
import law_costs
import length_picture
import precision
import predict_scale
import result_tables as tables
import serving_tables

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 118
PART = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)


def inside() -> str:
    """The results of `spherelm inspect` on the demo's models."""
    return inside_summary.text(tables.read("inside"))


def lengths() -> str:
    """The change of the loss over the length of the window."""
    found = tables.read("length")["results"]
    return length_picture.table(found, [row["length"] for row in next(iter(found.values()))["lengths"]])


PARTS: dict[str, Callable[[], str]] = {
    "headline": tables.headline,
    "comparisons": tables.comparisons,
    "translation": tables.translation,
    "ladder": tables.ladder_muon,
    "ladder-adamw": tables.ladder_adamw,
    "ladder-findings": tables.ladder_findings,
    "robustness": tables.robustness,
    "tasks": tables.tasks,
    "lengths": lengths,
    "lengths-findings": tables.lengths_findings,
    "lengths-hybrid": tables.lengths_hybrid,
    "inside": inside,
    "loss-times": costs.loss_times,
    "generation-times": costs.generation_times,
    "memory": costs.memory,
    "numerics": costs.numerics,
    "fast-path": costs.fast_path,
    "data-memory": costs.data_memory,
    "scaling": costs.scaling,
    "saving": costs.saving,
    "step-times": costs.step_times,
    "peer-times": costs.peer_times,
    "profile": costs.profile,
    "grouped": costs.grouped,
    "predicted-scale": predict_scale.table,
    "law-constants": law.constants,
    "law-points": law.points,
    "law-spots": law.spots,
    "law-architectures": law.architectures,
    "law-costs": law_costs.table,
    "precision": precision.table,
    "precision-weights": precision.rounded_weights,
    "precision-sharpness": precision.sharpness,
    "serving-texts": serving_tables.texts,
    "serving-speed": serving_tables.speed,
}
"""Every part of a page that is made from results."""


def pages() -> list[Path]:
    """The pages that may hold parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """A page's text with every generated part made again."""
    return PART.sub(lambda found: f"{found[1]}\n{wrapped(PARTS[found[2]]())}\n\n{found[3]}", text)


def wrapped(part: str) -> str:
    """Prose in lines of the width of a page; tables as they are."""
    return "\n".join(line if line.startswith("|") else filled(line) for line in part.splitlines())


def filled(line: str) -> str:
    """A paragraph or an item of a list, in lines."""
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 if a page is stale")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if check else 'renewed'}")
    sys.exit(bool(stale) and check)


if __name__ == "__main__":
    main()
