"""Commands that look at what was trained: `inspect`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spherelm.cli.flags import Flag, Runs
from spherelm.cli.given import Sets

Looks = Sets("spherelm.report.inspection.Request")


def inspect(
    runs: Runs,
    out: Path,
    text: Annotated[Path | None, Looks] = None,
    sentence: Annotated[str | None, Looks] = None,
    tokens: Annotated[int, Looks] = 2048,
    layer: Annotated[int | None, Looks] = None,
    no_images: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Look inside trained models, one or several side by side: figures, tables, and the walk on the sphere.

    Args:
        runs: Run directories, checkpoints, or directories of compare; runs of one arm count as seeds of one model.
        out: Directory to make: index.html, walk.html, figures (SVG, PNG), tables (CSV).
        no_images: Write no PNG files.
        overwrite: Write over what an earlier inspect wrote to `out`.
    """
    from spherelm.report.inspection import Request
    from spherelm.report.inspection import inspect as run_inspection

    request = Request(text, sentence, tokens, layer, not no_images)
    figures = run_inspection(runs, out, request, overwrite)
    print(f"{len(figures)} figures, their numbers and the walk on the sphere: {(out / 'index.html').resolve()}")


def report(directories: Runs, out: Path, overwrite: Flag = False) -> None:
    """Draw where many runs ended: loss over token budget and peak learning rate, tasks over budget, perplexity over length.

    Args:
        directories: Directories of compare and sweep, or runs; results of eval --json in a run directory are read too.
        out: Directory to make: index.html, figures (SVG, PNG), ends.json.
        overwrite: Write over what an earlier report wrote to `out`.
    """
    from spherelm.counting import counted
    from spherelm.report.ends_page import NOTHING_DRAWN, write_ends

    figures = write_ends(directories, out, overwrite)
    drawn = counted(len(figures), "figure") if figures else f"no figure, since {NOTHING_DRAWN}"
    print(f"{drawn}: {(out / 'index.html').resolve()}")
