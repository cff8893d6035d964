"""The page that a comparison ends with: `write_report(DIR)` turns run directories and `summary.json` into `DIR/report.html`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from spherelm.analysis.weights import WeightReport, measure
from spherelm.experiments.record import Comparison, read_comparison, read_samples
from spherelm.report.figures import Figure, loss_figures, weight_figures
from spherelm.report.inspection import trace_walks
from spherelm.report.page import page
from spherelm.report.walk import walk_page
from spherelm.runs.checkpoint import load_model


def write_report(directory: Path) -> Path:
    """Write `directory/report.html` anew from the runs, `summary.json` and `samples.json` in it; returns its path.

    One file, no network, no scripts needed; the same bytes for the same runs. Beside it walk.html, linked from it. Missing
    checkpoints, samples or seeds are said in words, as is why there is no walk, on stderr too. Raises FileNotFoundError for
    a missing summary or run, ValueError for a damaged one or a missing matplotlib.
    """
    comparison = read_comparison(directory)
    figures, missing = _weight_figures(comparison)
    samples, configs = read_samples(directory), _run_configs(comparison)
    html = page(comparison, loss_figures(comparison), figures, missing, samples, configs, _write_walk(comparison))
    target, partial = directory / "report.html", directory / "report.html.partial"
    partial.write_text(html, "utf-8")
    os.replace(partial, target)
    return target


def _weight_figures(comparison: Comparison) -> tuple[list[Figure], str]:
    """The weight figures, or none and the reason."""
    weights: dict[str, list[WeightReport]] = {}
    try:
        for arm in comparison.arms:
            weights[arm] = [measure(load_model(comparison.directory / run.name)) for run in comparison.arms[arm].runs]
    except (FileNotFoundError, ValueError) as error:
        return [], f"The weights cannot be shown: {error}."
    return weight_figures(weights), ""


def _write_walk(comparison: Comparison) -> str:
    """Write walk.html, the hidden states of each arm's first seed, beside the page; or say, and return, why there is none."""
    first = [comparison.directory / comparison.arms[arm].runs[0].name for arm in comparison.arms]
    try:
        walks, sentence = trace_walks(first)
    except (FileNotFoundError, ValueError) as error:
        missing = f"The walk on the sphere cannot be shown: {error}."
        print(f"spherelm: {missing}", file=sys.stderr)
        return missing
    (comparison.directory / "walk.html").write_text(walk_page(walks, sentence), encoding="utf-8")
    return ""


def _run_configs(comparison: Comparison) -> dict[str, Any]:
    """`config.json` of the first run of each arm, by the path it was read from."""
    paths = [Path(comparison.arms[arm].runs[0].name) / "config.json" for arm in comparison.arms]
    found = [path for path in paths if (comparison.directory / path).is_file()]
    return {
        f"Configuration of {path.as_posix()}": json.loads((comparison.directory / path).read_text("utf-8"))
        for path in found
    }
