"""The figures of `spherelm inspect` that only models with experts have, and the captions that say what is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spherelm.analysis.experts import POSITIONS, Experts
from spherelm.models import NAMES
from spherelm.report import depth_plots
from spherelm.report.depth_plots import Dots
from spherelm.report.figures import Figure
from spherelm.report.inside_figures import Found, caption_text, each
from spherelm.report.wording import listed

Array = NDArray[np.float64]


def expert_section(found: Found) -> list[Figure]:
    """Who is picked on the text, and how different the experts are; nothing for models without experts."""
    experts = {
        arm: seeds for arm, models in found.items() if (seeds := [i.experts for i in models if i.experts is not None])
    }
    return [_load(experts), _angles(experts), _map(experts)] if experts else []


def _load(found: dict[str, list[Experts]]) -> Figure:
    title = "Load of the experts"
    dots = _dots(found, lambda seen: seen.load * seen.load.shape[1])
    worst = {of_arm.arm: float(np.mean([values.max() for values in of_arm.values])) for of_arm in dots}
    idle = {arm: float(np.mean([(seen.load == 0).mean() * 100 for seen in seeds])) for arm, seeds in found.items()}
    caption = (
        "How often each expert of a layer is picked on the text, over the mean of its layer; one dot an expert. 1 is even. The "
        f"busiest of all is at {each(worst, '.2f')}; never picked are, in percent of the experts, {each(idle, '.0f')}. "
        "Not in the paper."
    )
    label = "choices over the layer's mean"
    return Figure(depth_plots.dots_over_depth(dots, label, "expert-load", title, caption_text(caption)), title, caption)


def _angles(found: dict[str, list[Experts]]) -> Figure:
    title = "Angles between experts"
    dots = _dots(found, lambda seen: np.stack([_pairs(square) for square in seen.proposals]))
    means = {of_arm.arm: float(np.mean([values.mean() for values in of_arm.values])) for of_arm in dots}
    rows = {
        arm: float(np.mean([_pairs(r).mean() for seen in seeds for r in seen.router])) for arm, seeds in found.items()
    }
    caption = (
        f"Mean angle between what two experts of a layer make of the same state, of {POSITIONS} positions at most; one dot a "
        f"pair. Unrelated directions are at 90 degrees. The mean is {each(means, '.1f')}; between rows of the router&rsquo;s "
        f"matrix it is {each(rows, '.1f')}. Not in the paper."
    )
    drawing = depth_plots.dots_over_depth(
        dots, "angle (degrees)", "expert-angles", title, caption_text(caption), (0.0, None)
    )
    return Figure(drawing, title, caption)


def _map(found: dict[str, list[Experts]]) -> Figure:
    """Of the middle mixture of the first run of each arm."""
    title = "Experts of one layer, pair by pair"
    panels, layers = [], []
    for arm, (first, *_) in found.items():
        middle = len(first.layers) // 2
        square = first.proposals[middle].copy()
        np.fill_diagonal(square, np.nan)
        panels.append((f"{NAMES[arm]}, layer {first.layers[middle]}", square))
        layers.append(f"{first.layers[middle]}")
    caption = (
        f"Mean angle between what two experts of layer {listed(list(dict.fromkeys(layers)))} make of the same state, in "
        "degrees, of the first run of an arm. Not in the paper."
    )
    drawing = depth_plots.square_panels(panels, "degrees", "expert-map", title, caption_text(caption))
    return Figure(drawing, title, caption)


def _dots(found: dict[str, list[Experts]], read: Callable[[Experts], Array]) -> list[Dots]:
    return [
        Dots(arm, seeds[0].layers.astype(np.float64), [read(seen) for seen in seeds]) for arm, seeds in found.items()
    ]


def _pairs(square: Array) -> Array:
    """The entries above the diagonal; of a single expert, its own."""
    above: Sequence[int] | Array = square[np.triu_indices(len(square), 1)]
    return np.asarray(above if len(above) else square.ravel())
