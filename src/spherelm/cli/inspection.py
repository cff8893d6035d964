"""Commands that show trained models: `inspect`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spherelm.cli.flags import Given, Runs
from spherelm.cli.parser import POSITIONAL, Fields

Looks = Annotated[Given, Fields("spherelm.report.inspection.Request", "text", "sentence", "tokens", "layer")]


def inspect(*, runs: Runs, out: Path, request: Looks, no_images: bool = False, overwrite: bool = False) -> None:
    """Draw what trained models look like inside: figures, tables, and a sentence's walk on the sphere.

    Example: spherelm inspect runs/first --out inside

    Args:
        runs: Run directories, checkpoints, or directories of compare; runs of one arm count as seeds of one model.
        out: Directory to create: index.html, walk.html, figures (SVG, PNG), tables (CSV).
        no_images: Write no PNG files.
        overwrite: Overwrite the files of an earlier inspect in `out`.
    """
    from spherelm.report.inspection import Request
    from spherelm.report.inspection import inspect as run_inspection

    figures = run_inspection(runs, out, Request(**request, images=not no_images), overwrite)
    print(f"{len(figures)} figures, their numbers and the walk on the sphere: {(out / 'index.html').resolve()}")


def report(*, directories: Annotated[tuple[Path, ...], POSITIONAL], out: Path, overwrite: bool = False) -> None:
    """Draw where many runs ended: loss over budget and learning rate, tasks over budget, perplexity over length.

    Example: spherelm report runs/ladder --out ends

    Args:
        directories: Directories of compare and sweep, or runs; results of eval --json in a run directory are read too.
        out: Directory to create: index.html, figures (SVG, PNG), ends.json.
        overwrite: Overwrite the files of an earlier report in `out`.
    """
    from spherelm.counting import counted
    from spherelm.report.ends_page import NOTHING_DRAWN, write_ends

    figures = write_ends(directories, out, overwrite)
    drawn = counted(len(figures), "figure") if figures else f"no figure, since {NOTHING_DRAWN}"
    print(f"{drawn}: {(out / 'index.html').resolve()}")
