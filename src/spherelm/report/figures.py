"""The report's figures: which numbers go into each, and the caption that says what is seen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spherelm.analysis.weights import MATRICES, WeightReport
from spherelm.experiments.record import Arm, Comparison
from spherelm.models import NAMES
from spherelm.report import plots
from spherelm.report.drawing import Drawing
from spherelm.report.wording import bound_on_tokens, listed, loss_text, si

Weights = Mapping[str, Sequence[WeightReport]]
Numbers = Mapping[str, Mapping[str, Sequence[Any]]]
ALPHA_NAMES = {
    "alpha_A": "|α<sub>A</sub>|",
    "alpha_C": "|α<sub>C</sub>|",
    "alpha_M": "|α<sub>M</sub>|",
    "alpha of mixers": "|α| of mixers",
    "alpha of experts": "|α| of experts",
    "alpha_A of the encoder": "|α<sub>A</sub>| of the encoder",
    "alpha_M of the encoder": "|α<sub>M</sub>| of the encoder",
}
SCALE_NAMES = {
    "s_qk": "s<sub>qk</sub>",
    "s_qk of cross-attention": "s<sub>qk</sub> of cross-attention",
    "s_u": "s<sub>u</sub>",
    "s_v": "s<sub>v</sub>",
    "s_u of experts": "s<sub>u</sub> of experts",
    "s_v of experts": "s<sub>v</sub> of experts",
    "s_moe": "s<sub>moe</sub>",
    "s_mamba": "s<sub>mamba</sub>",
}


@dataclass(frozen=True)
class Figure:
    """One figure: the drawing, a title (plain text) and a caption (HTML, already escaped)."""

    drawing: Drawing
    title: str
    caption: str

    @property
    def svg(self) -> str:
        """One `<svg>` element."""
        return self.drawing.svg


def loss_figures(comparison: Comparison) -> list[Figure]:
    """Validation loss over tokens and over seconds."""
    return [_loss_figure(comparison, "tokens"), _loss_figure(comparison, "seconds")]


def weight_figures(weights: Weights, unit_conditions: Numbers | None = None) -> list[Figure]:
    """What the trained weights look like, `{"gpt": [one report per seed], "ngpt": ...}`; an arm may be missing.

    unit_conditions: condition numbers of the same matrices with their vectors made unit, drawn dotted,
    `{"gpt": {"Q": [array [n_layers] per seed], ...}}`.
    """
    sphere = next((reports for arm, reports in weights.items() if arm == "ngpt"), ())
    figures = []
    scales = _by_name([report.scales for report in sphere])
    places = {arm: reports[0].places for arm, reports in weights.items() if reports}
    if ALPHA_NAMES.keys() & scales.keys():
        figures.append(_alpha_figure(scales, sphere[0].places))
    if SCALE_NAMES.keys() & scales.keys():
        figures.append(_scales_figure(scales, sphere[0].places))
    logit_scales = [report.s_z for report in sphere if report.s_z is not None]
    if logit_scales:
        figures.append(_logit_scale_figure(logit_scales))
    norms = {arm: _by_name([report.embedding_norms for report in reports]) for arm, reports in weights.items()}
    conditions = {arm: _by_name([report.condition_numbers for report in reports]) for arm, reports in weights.items()}
    figures.append(_norm_figure(norms))
    for part, names in MATRICES.items():
        if any(name in matrices for name in names for matrices in conditions.values()):
            figures.append(_condition_figure(conditions, part, unit_conditions, places))
    return figures


def _loss_figure(comparison: Comparison, unit: str) -> Figure:
    winner, loser = comparison.arms[comparison.winner], comparison.arms[comparison.loser]
    level = None if math.isnan(loser.final_loss) else loser.final_loss
    crossing, label = (None, "") if level is None else _crossing(comparison, unit)
    ends = [(getattr(end, unit), end.loss) for end in comparison.ends]
    curves = {
        name: [plots.Curve(getattr(run, unit), run.loss) for run in arm.runs] for name, arm in comparison.arms.items()
    }
    plot = plots.LossPlot(
        curves=curves,
        means={name: mean for name, arm in comparison.arms.items() if (mean := _mean_curve(arm, unit)) is not None},
        level=level,
        level_arm=loser.name,
        ends=[*ends, (getattr(winner, unit), winner.final_loss)] if ends else [],
        ends_arm=winner.name,
        crossing=None if crossing is None or level is None else (crossing, level),
        crossing_label=label,
        unit=unit,
    )
    title = f"Validation loss over training {'tokens' if unit == 'tokens' else 'time'}"
    finals = [f"{NAMES[name]} ends at {loss_text(arm.final_loss)}" for name, arm in comparison.arms.items()]
    description = f"{listed(finals)} nats per token after {si(winner.tokens)} tokens."
    caption = _loss_caption(comparison, unit, crossing is not None)
    return Figure(plots.loss_curves(plot, f"loss-{unit}", title, description), title, caption)


def _mean_curve(arm: Arm, unit: str) -> plots.Curve | None:
    curve = arm.mean_curve()
    if curve is None:
        return None
    tokens, seconds, loss = curve
    return plots.Curve(tokens if unit == "tokens" else seconds, loss)


def _crossing(comparison: Comparison, unit: str) -> tuple[float | None, str]:
    """Where the winner reaches the loser's final loss, in the unit of the axis, and its label."""
    reached = comparison.speedup.get("tokens_to_reach")
    if reached is None:
        return None, ""
    sign = "≤ " if bound_on_tokens(comparison) == "at most" else "≥ " if bound_on_tokens(comparison) else ""
    if unit == "tokens":
        return float(reached), f"{sign}{si(float(reached))} tokens"
    winner = comparison.arms[comparison.winner]
    seconds = winner.seconds * float(reached) / winner.tokens
    return seconds, f"{sign}{seconds:,.0f} s"


def _loss_caption(comparison: Comparison, unit: str, crossed: bool) -> str:
    winner, loser = NAMES[comparison.winner], NAMES[comparison.loser]
    diamond = f"The diamond marks where {winner} reaches {loser}&rsquo;s final loss. " if crossed else ""
    if unit == "seconds":
        full = [
            f"{arm.seconds:,.0f} s for a full {NAMES[name]} run"
            for name, arm in comparison.arms.items()
            if arm.whole_runs
        ]
        return (
            f"The same over training time as the runs recorded it, validation not counted: {listed(full)}. {diamond}"
            "Runs may have shared the machine; the factor in seconds above uses step times measured apart."
        )
    several = "Thin lines are single seeds, thick lines their mean. " if comparison.seeds > 1 else "One seed an arm. "
    ends = ""
    if comparison.ends:
        ends = (
            f"Circles are where {winner} ends when its whole schedule is shorter; only such ends are comparable with the "
            "dashed line, not the curves on their way. "
        )
    gone = [f"{run.name} diverged. " for arm in comparison.arms.values() for run in arm.runs if run.diverged]
    seen = f"{several}{''.join(gone)}{ends}{diamond}"
    return f"{seen}The steep beginning is cut off. Corresponds to figures 1 and 2 of the paper."


def _alpha_figure(scales: dict[str, list[Any]], places: Mapping[str, Any]) -> Figure:
    title = "Eigen learning rates per layer"
    spans = [f"{markup} {_span(scales[name])}" for name, markup in ALPHA_NAMES.items() if name in scales]
    caption = (
        f"How far each block moves the hidden state towards its proposal, averaged over channels: {listed(spans)}. "
        "Corresponds to figure 6 of the paper."
    )
    description = "Mean absolute alpha of the steps of the normalized model, by layer."
    return Figure(plots.eigen_learning_rates(scales, "alpha", title, description, places), title, caption)


def _scales_figure(scales: dict[str, list[Any]], places: Mapping[str, Any]) -> Figure:
    title = "Learned scales per layer"
    spans = [f"{markup} {_span(scales[name])}" for name, markup in SCALE_NAMES.items() if name in scales]
    caption = (
        f"Effective values, averaged over heads and channels: {listed(spans)}. Corresponds to figure 6 of the paper."
    )
    description = "Mean effective learned scales of the normalized model, by layer."
    return Figure(plots.layer_scales(scales, "scales", title, description, places), title, caption)


def _logit_scale_figure(values: Sequence[Any]) -> Figure:
    title = "Logit scales"
    low, median, high = np.quantile(np.concatenate(list(values)), (0.05, 0.5, 0.95))
    caption = (
        f"Distribution of the effective s<sub>z</sub> over the vocabulary: median {median:.3g}, nine in ten between {low:.3g} "
        f"and {high:.3g}. It turns cosines into logits. Corresponds to figure 6 of the paper."
    )
    description = f"Histogram of s_z, median {median:.3g}."
    return Figure(plots.logit_scales(values, "sz", title, description), title, caption)


def _norm_figure(norms: Mapping[str, dict[str, list[Any]]]) -> Figure:
    title = "Embedding norms"
    spans = {
        arm: listed([f"{_span(tables[name])} ({name})" for name in ("input", "output")])
        for arm, tables in norms.items()
    }
    unit = "are 1 by construction, so its two lines coincide"
    said = [
        f"{NAMES[arm]}&rsquo;s {unit if arm == 'ngpt' and _all_unit(tables) else f'go {spans[arm]}'}"
        for arm, tables in norms.items()
    ]
    caption = f"Lengths of the embedding vectors, sorted. {'; '.join(said)}. Corresponds to figure 4 of the paper."
    description = "Sorted norms of input and output embedding vectors of both arms."
    return Figure(plots.embedding_norms(norms, "norms", title, description), title, caption)


def _all_unit(tables: Mapping[str, Sequence[Any]]) -> bool:
    """Whether every row's length is 1, of ascending lengths by table and seed."""
    return all(abs(length - 1) < 1e-3 for table in tables.values() for seed in table for length in (seed[0], seed[-1]))


def _condition_figure(
    numbers: Mapping[str, dict[str, list[Any]]], part: str, dotted: Numbers | None, places: Mapping[str, Any]
) -> Figure:
    title, names = f"Condition numbers, {part} matrices", tuple(MATRICES[part])
    having = {arm: matrices for arm, matrices in numbers.items() if names[0] in matrices}
    medians = {
        arm: float(np.median([value for name in names for seed in matrices[name] for value in seed]))
        for arm, matrices in having.items()
    }
    heads = ", median over heads" if part.endswith("attention") else {"experts": ", median over experts"}.get(part, "")
    found = listed([f"{median:.3g} for {NAMES[arm]}" for arm, median in medians.items()])
    also = " Dotted: the same with every vector along d<sub>model</sub> made unit." if dotted else ""
    caption = (
        f"Largest over smallest singular value per layer{heads}, logarithmic. Over all panels the median is {found}.{also} "
        f"{'Corresponds to figure 5 of the' if part in ('attention', 'MLP') else 'Not in the'} paper."
    )
    description = f"Condition numbers of {', '.join(names)} by layer, both arms."
    key = f"cond-{re.sub('[^a-z]+', '-', part.lower())}"
    return Figure(plots.condition_numbers(having, names, key, title, description, dotted, places), title, caption)


def _by_name(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A list of `{name: array}`, one a seed, as `{name: [one array a seed]}`."""
    return {name: [report[name] for report in reports] for name in (reports[0] if reports else ())}


def _span(seeds: Sequence[Any]) -> str:
    """ "from 0.12 to 0.34": the range over layers (or vocabulary) of the mean over seeds."""
    mean = np.mean(np.stack(list(seeds)), axis=0)
    return f"from {mean.min():.3g} to {mean.max():.3g}"
