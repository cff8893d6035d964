"""The README's picture: the first figure of a comparison's page as a file of its own, and the summary beside it.

python research/demo_picture.py runs/demo --picture docs/images/demo.svg --summary docs/results/demo.json
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from spherelm.experiments.record import read_comparison
from spherelm.report.loss_figures import loss_figures
from spherelm.report.svg import standalone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="the directory that `spherelm compare` wrote")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_text(
        standalone(loss_figures(read_comparison(arguments.comparison))[0].svg), encoding="utf-8"
    )
    shutil.copyfile(arguments.comparison / "summary.json", arguments.summary)


if __name__ == "__main__":
    main()
