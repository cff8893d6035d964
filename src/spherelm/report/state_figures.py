"""The figures of a model at work on a text: how states move, predictions at each depth, experts, and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spherelm.analysis.experts import POSITIONS, Experts
from spherelm.analysis.inside import Inside
from spherelm.analysis.motion import Motion
from spherelm.models import ARM_NAMES
from spherelm.report.charts import Bars, Line, Panel, chart, line_of, squares
from spherelm.report.drawing import COLOURS, Array, Figure
from spherelm.report.weight_figures import Found
from spherelm.report.wording import each, listed

DRAWN_PARTS = ("attention", "MLP", "mixer", "experts", "cross-attention")
"""Parts of layers, in the order of their looks."""

Distances = Mapping[str, Sequence[tuple[Array, Array]]]
"""By arm, one a run: updates of its checkpoints, and how far from the sphere its worst vector was at each."""


@dataclass(frozen=True)
class OverDepth:
    """A figure of one number at each stop. The caption's {} says it at the end of the model, in the format `form`."""

    key: str
    title: str
    y: str
    caption: str
    read: Callable[[Motion], Array]
    form: str = ".3g"
    log: bool = False
    low: float | None = 0

    def figure(self, found: Found, at: Callable[[Motion], int] = lambda _: -1) -> Figure:
        """Whole numbers are after a layer, fractions between its parts; at: the stop that the caption speaks of."""
        lines = [line_of(arm, ms[0].motion.depths, [self.read(i.motion) for i in ms]) for arm, ms in found.items()]
        ends = _mean(found, lambda motion: float(self.read(motion)[at(motion)]))
        panel = Panel(lines, "layers passed", self.y, scale="layers", log=self.log, low=None if self.log else self.low)
        return chart(self.key, self.title, f"{self.caption.format(each(ends, self.form))} Not in the paper.", [panel])


STATES = (
    OverDepth("state-length", "Length of the hidden state", "mean length",
              "Mean over positions, logarithmic. At the end it is {}.", lambda m: m.lengths, log=True),
    OverDepth("state-rank", "Effective rank of the hidden states", "effective rank",
              "exp of the entropy of the singular values of the states, each made unit, not centred. At the end it is {}.",
              lambda m: m.rank),
    OverDepth("anisotropy", "Anisotropy of the hidden states", "mean cosine",
              "Mean cosine between the states of different positions: 0 where they point everywhere, 1 where all point one "
              "way. At the end it is {}.", lambda m: m.anisotropy, low=None),
)  # fmt: skip
LENS_LOSS = OverDepth(
    "lens-loss", "Loss if the model stopped here", "loss (nats per token)",
    "Cross-entropy of the next token if the output matrix (after the last norm, where there is one) read the state at this "
    "depth. On this text the models end, in nats per token, at {}.", lambda m: m.lens.loss, ".2f", low=None,
)  # fmt: skip
LENS_AGREEMENT = OverDepth(
    "lens-agreement", "Predictions that are final already", "positions (%)",
    "Positions whose most probable token at this depth is that of the whole model, in percent. Without the last layer it "
    "is {}.", lambda m: 100 * m.lens.agreement, ".0f",
)  # fmt: skip
LENS_DIVERGENCE = OverDepth(
    "lens-divergence", "Divergence from the final prediction", "divergence (nats)",
    "Kullback-Leibler divergence from the whole model’s distribution to that at this depth, mean over positions, in nats.",
    lambda m: m.lens.divergence,
)  # fmt: skip


def motion_section(found: Found) -> list[Figure]:
    """How states move with the text, block by block."""
    alignments = [
        _alignment(found, "to-prediction", "final prediction", "the output vector of the token that the model ends up finding "
                   "most probable", lambda motion: motion.to_prediction),
        _alignment(found, "to-state", "final state", "the state that the model ends in", lambda motion: motion.to_state),
    ]  # fmt: skip
    return [
        _angles(found),
        _paths(found),
        *alignments,
        *(kind.figure(found) for kind in STATES),
        *_entropies(found),
        _rounding(found),
        _sharpness(found),
    ]


def lens_section(found: Found) -> list[Figure]:
    """The predictions that the output matrix would make at each stop."""
    return [
        LENS_LOSS.figure(found),
        LENS_AGREEMENT.figure(found, _before_last_layer),
        LENS_DIVERGENCE.figure(found),
    ]


def training_section(distances: Distances) -> list[Figure]:
    """How far the weights were from the sphere at each checkpoint."""
    lines = [line_of(arm, updates, [values]) for arm, runs in distances.items() for updates, values in runs]
    last = {arm: float(np.mean([values[-1] for _, values in runs])) for arm, runs in distances.items()}
    counts = sorted({len(updates) for runs in distances.values() for updates, _ in runs})
    several = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    of_gpt = " GPT’s vectors need not be unit; its line says how far they are from where nGPT’s live."
    caption = (
        "The largest departure of any vector along d<sub>model</sub> from length 1, at each checkpoint that the runs kept "
        f"({several} a run): in the end {each(last, '.2g')}.{of_gpt if 'gpt' in distances else ''}"
    )
    panel = Panel(lines, "updates", "largest | ||w|| − 1 |", scale="whole", log=True)
    return [chart("off-sphere", "Distance from the sphere over training", caption, [panel])]


def expert_section(found: Found) -> list[Figure]:
    """Who is picked on the text, and how different the experts are; nothing for models without experts."""
    experts = {arm: seen for arm, models in found.items() if (seen := [i.experts for i in models if i.experts])}
    return [_load(experts), _expert_angles(experts), _expert_map(experts)] if experts else []


def _mean(found: Found, read: Callable[[Motion], float]) -> dict[str, float]:
    """By arm, the mean over its runs."""
    return {arm: float(np.mean([read(inside.motion) for inside in models])) for arm, models in found.items()}


def _before_last_layer(motion: Motion) -> int:
    """The stop before the last layer."""
    return [number for number, _ in motion.steps].index(motion.steps[-1][0])


def _steps(models: Sequence[Inside]) -> Iterator[tuple[int, str, Array, list[int]]]:
    """(how it looks, its name, numbers of its layers, its steps) of every part that the layers of one arm have."""
    for look, name in enumerate(DRAWN_PARTS):
        layers, steps = models[0].motion.of_part(name)
        if steps:
            yield look, name, layers, steps


def _angles(found: Found) -> Figure:
    lines = []
    for arm, models in found.items():
        for look, name, layers, steps in _steps(models):
            angles = [inside.motion.angles[steps] for inside in models]
            low, high = np.quantile(np.concatenate(angles, axis=1), (0.25, 0.75), axis=1)
            lines.append(line_of(arm, layers, [seed.mean(axis=1) for seed in angles], name, look, band=(low, high)))
    total = _mean(found, lambda motion: float(motion.angles.sum(axis=0).mean()))
    parts = listed(
        [name for name in DRAWN_PARTS if any(models[0].motion.of_part(name)[1] for models in found.values())]
    )
    caption = (
        f"By how many degrees {parts} turn the hidden state, mean over positions; bands hold half of the positions. All steps "
        f"of a position together, in degrees: {each(total, '.0f')}. "
        f"{'Of GPT’s states the direction counts. ' if 'gpt' in found else ''}Not in the paper."
    )
    panel = Panel(lines, "layer", "angle moved (degrees)", scale="layers", low=0)
    return chart("angles", "Angle moved by each block", caption, [panel])


def _paths(found: Found) -> Figure:
    direct = _mean(found, lambda motion: float(motion.chords.mean()))
    bars = [
        Bars(np.concatenate([i.motion.angles.sum(axis=0) for i in models]), COLOURS[arm], ARM_NAMES[arm])
        for arm, models in found.items()
    ]
    caption = (
        "Degrees that a position’s state travels over all steps, of all positions. The straight way from its first to its "
        f"last place is in the mean, in degrees: {each(direct, '.0f')}. Not in the paper."
    )
    panel = Panel((), "degrees travelled", "positions (%)", bars=bars, low=0)
    return chart("paths", "Length of each position's path", caption, [panel])


def _alignment(found: Found, key: str, what: str, detail: str, read: Callable[[Motion], Array]) -> Figure:
    """Cosines of what the blocks propose with one direction."""
    lines = [
        line_of(arm, layers, [read(inside.motion)[steps] for inside in models], name, look)
        for arm, models in found.items()
        for look, name, layers, steps in _steps(models)
    ]
    caption = f"Mean cosine of what each block proposes with {detail}. Not in the paper."
    return chart(key, f"Proposals and the {what}", caption, [Panel(lines, "layer", "mean cosine", scale="layers")])


def _dots(values: Mapping[str, tuple[Array, Sequence[Array]]]) -> list[Line]:
    """By arm the numbers of layers, and [layers, things] a seed:
    a dot a thing, a little apart, and a line through medians.
    """
    lines = []
    for i, (arm, (layers, seeds)) in enumerate(values.items()):
        pooled = np.concatenate(list(seeds), axis=1)
        x = layers + 0.12 * (2 * i - 1) * (len(values) > 1)
        dots = (np.repeat(x, pooled.shape[1]), pooled.ravel())
        lines.append(line_of(arm, x, [np.median(pooled, axis=1)], "median", marker="", width=1.3, dots=dots))
    return lines


def _entropies(found: Found) -> list[Figure]:
    having = {arm: models for arm, models in found.items() if models[0].motion.spread.size}
    if not having:
        return []
    spread = {
        arm: (models[0].motion.of_part("attention")[0], [inside.motion.spread for inside in models])
        for arm, models in having.items()
    }
    medians = {arm: float(np.median(np.concatenate(seeds))) for arm, (_, seeds) in spread.items()}
    caption = (
        "Entropy of each head’s attention as a fraction of its query's maximum (1: equal weight on all tokens;  "
        f"0: at one), mean over positions; one dot a head. The median is {each(medians, '.2f')}. Not in the paper."
    )
    panel = Panel(_dots(spread), "layer", "attention entropy over its largest", scale="layers", low=0, high=1.02)
    return [chart("entropy", "Attention entropy of each head", caption, [panel])]


def _rounding(found: Found) -> Figure:
    """Two numbers of `analysis.rounding.Rounding` over the layers, each the mean over a layer's matrices."""

    def over_layers(inside: Inside, by_matrix: Mapping[str, Array]) -> tuple[Array, Array]:
        points = [
            point for name, own in by_matrix.items() for point in zip(inside.weights.places[name], own, strict=True)
        ]
        layers = np.unique([layer for layer, _ in points])
        return layers, np.array([np.mean([value for at, value in points if at == layer]) for layer in layers])

    panels: list[Panel] = []
    means: dict[str, dict[str, float]] = {}
    for field, label in (("decibels", "signal to noise (dB)"), ("correlation", "correlation of the products")):
        lines = []
        for arm, models in found.items():
            layers, seeds = zip(
                *(over_layers(inside, getattr(inside.rounding, field)) for inside in models), strict=True
            )
            lines.append(line_of(arm, layers[0], seeds))
            means.setdefault(field, {})[arm] = float(np.mean(seeds))
        panels.append(Panel(lines, "layer", label, scale="layers"))
    caption = (
        "Dot products of states and matrices if both had four bits (NVFP4): their mean square over that of their errors, in "
        f"the mean {each(means['decibels'], '.1f')} dB; and how the element-wise products of a dot product go together, "
        f"{each(means['correlation'], '.4f')}: 0 where they are independent. Not in the paper."
    )
    return chart("four-bits", "What four bits leave of dot products", caption, panels)


def _sharpness(found: Found) -> Figure:
    """The rise of the loss over the size of a perturbation: a run thin, the spread of all directions a band."""
    lines, largest = [], {}
    for arm, models in found.items():
        rises = np.concatenate([inside.sharpness.rise for inside in models])
        seeds = [inside.sharpness.rise.mean(axis=0) for inside in models]
        spread = (rises.min(axis=0), rises.max(axis=0))
        lines.append(line_of(arm, models[0].sharpness.sizes, seeds, band=spread))
        largest[arm] = float(rises[:, -1].mean())
    first = next(iter(found.values()))[0].sharpness
    again = " nGPT’s vectors are made unit again." if "ngpt" in found else ""
    caption = (
        "How much the loss rises if every matrix of the blocks moves along a random direction, by a part of its own length; "
        f"the mean of both ways along {len(first.rise)} directions, which a band spans. At {first.sizes[-1]:g} of the length "
        f"it rises by {each(largest, '.2g')} nats per token.{again} Not in the paper."
    )
    panel = Panel(lines, "size of the perturbation over the weights' length", "rise of the loss (nats per token)")
    return chart("sharpness", "Loss around the weights", caption, [panel])


Seen = Mapping[str, Sequence[Experts]]


def _of_experts(found: Seen, read: Callable[[Experts], Array]) -> dict[str, tuple[Array, list[Array]]]:
    return {arm: (seeds[0].layers.astype(np.float64), [read(seen) for seen in seeds]) for arm, seeds in found.items()}


def _load(found: Seen) -> Figure:
    loads = _of_experts(found, lambda seen: seen.load * seen.load.shape[1])
    worst = {arm: float(np.mean([values.max() for values in seeds])) for arm, (_, seeds) in loads.items()}
    idle = {arm: 100 * float(np.mean([(seen.load == 0).mean() for seen in seeds])) for arm, seeds in found.items()}
    caption = (
        "How often each expert of a layer is picked on the text, over the mean of its layer; one dot an expert. 1 is even. The "
        f"busiest of all is at {each(worst, '.2f')}; never picked are, in percent of the experts, {each(idle, '.0f')}. "
        "Not in the paper."
    )
    panel = Panel(_dots(loads), "layer", "choices over the layer's mean", scale="layers", low=0)
    return chart("expert-load", "Load of the experts", caption, [panel])


def _expert_angles(found: Seen) -> Figure:
    angles = _of_experts(found, lambda seen: np.stack([_pairs(square) for square in seen.proposals]))
    means = {arm: float(np.mean([values.mean() for values in seeds])) for arm, (_, seeds) in angles.items()}
    rows = {arm: float(np.mean([_pairs(r).mean() for s in seeds for r in s.router])) for arm, seeds in found.items()}
    caption = (
        f"Mean angle between what two experts of a layer make of the same state, of {POSITIONS} positions at most; one dot a "
        f"pair. Unrelated directions are at 90 degrees. The mean is {each(means, '.1f')}; between rows of the router’s matrix "
        f"it is {each(rows, '.1f')}. Not in the paper."
    )
    panel = Panel(_dots(angles), "layer", "angle (degrees)", scale="layers", low=0)
    return chart("expert-angles", "Angles between experts", caption, [panel])


def _pairs(square: Array) -> Array:
    """The entries above the diagonal; of a single expert, its own."""
    above = square[np.triu_indices(len(square), 1)]
    return np.asarray(above if above.size else square.ravel())


def _expert_map(found: Seen) -> Figure:
    """Of the middle mixture of the first run of each arm."""
    panels, layers = [], []
    for arm, (first, *_) in found.items():
        middle = len(first.layers) // 2
        square = first.proposals[middle].copy()
        np.fill_diagonal(square, np.nan)
        panels.append((f"{ARM_NAMES[arm]}, layer {first.layers[middle]}", square))
        layers.append(f"{first.layers[middle]}")
    caption = (
        f"Mean angle between what two experts of layer {listed(list(dict.fromkeys(layers)))} make of the same state, in "
        "degrees, of the first run of an arm. Not in the paper."
    )
    return squares("expert-map", "Experts of one layer, pair by pair", caption, panels, "degrees", "expert")
