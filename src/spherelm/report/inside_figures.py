"""The figures of `spherelm inspect`: which numbers of an `Inside` go into each, and the caption that says what is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spherelm.analysis.inside import Inside
from spherelm.analysis.weights import MATRICES
from spherelm.models import NAMES
from spherelm.report import depth_plots, plots
from spherelm.report.depth_plots import Axis, Dots, Line
from spherelm.report.figures import Figure, weight_figures
from spherelm.report.wording import listed

Array = NDArray[np.float64]
Found = Mapping[str, Sequence[Inside]]
"""By arm, one an inspected run."""

LOOKS = ("attention", "MLP", "mixer", "experts", "cross-attention")
"""Parts of layers, in the order of their looks."""

Distances = Mapping[str, Sequence[tuple[Array, Array]]]
"""By arm, one a run: updates of its checkpoints, and how far from the sphere its worst vector was at each."""


def weight_section(found: Found) -> list[Figure]:
    """What lies in the weights: the comparison's own figures, spectra of embeddings, and queries and keys of one layer."""
    reports = {arm: [inside.weights for inside in models] for arm, models in found.items()}
    dotted = {arm: _by_name([inside.unit_conditions for inside in models]) for arm, models in found.items()}
    return [
        *weight_figures(reports, dotted),
        _eigenvalues(found),
        _products(found),
        _cosines(found),
        *_query_key(found),
        _ranks(found),
    ]


def motion_section(found: Found) -> list[Figure]:
    """What the models do with the text, block by block."""
    return [
        _angles(found),
        _paths(found),
        _alignment(found, "to_prediction"),
        _alignment(found, "to_state"),
        _state_lengths(found),
        _state_ranks(found),
        _state_anisotropy(found),
        *_entropies(found),
    ]


def lens_section(found: Found) -> list[Figure]:
    """What each stop would predict."""
    return [_lens_loss(found), _lens_agreement(found), _lens_divergence(found)]


def training_section(distances: Distances) -> list[Figure]:
    """How far the weights were from the sphere at each checkpoint."""
    title = "Distance from the sphere over training"
    lines = [Line(arm, updates, [values]) for arm, runs in distances.items() for updates, values in runs]
    last = {arm: float(np.mean([values[-1] for _, values in runs])) for arm, runs in distances.items()}
    counts = sorted({len(updates) for runs in distances.values() for updates, _ in runs})
    several = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = (
        "The largest departure of any vector along d<sub>model</sub> from length 1, at each checkpoint that the runs kept "
        f"({several} a run): in the end {each(last, '.2g')}."
    )
    if "gpt" in distances:
        caption += " GPT&rsquo;s vectors need not be unit; its line says how far they are from where nGPT&rsquo;s live."
    axis = Axis("updates", "largest | ||w|| − 1 |")
    return [Figure(depth_plots.over_training(lines, axis, "off-sphere", title, caption_text(caption)), title, caption)]


def _eigenvalues(found: Found) -> Figure:
    title = "Eigenvalues of the embeddings"
    values = _tables(found, lambda inside: inside.eigenvalues)

    def scale(ax: Any) -> None:
        ax.set_xlabel("eigenvalues, sorted (%)")
        ax.set_ylabel("eigenvalue over the median")
        ax.set_yscale("log")

    largest = {arm: float(np.mean([table[-1] for table in tables["input"]])) for arm, tables in values.items()}
    output = {arm: float(np.mean([table[-1] for table in tables["output"]])) for arm, tables in values.items()}
    caption = (
        "Eigenvalues of the covariance of the embedding vectors, over their median, logarithmic. The largest is, of the input "
        f"embeddings, {each(largest)}; of the output embeddings, {each(output)}. Corresponds to figure 4 of the paper."
    )
    return Figure(plots.sorted_tables(values, scale, "eigen", title, caption_text(caption)), title, caption)


def _products(found: Found) -> Figure:
    title = "Pairwise dot products of the embeddings"
    return _pairs(found, title, "products", "dot product", lambda inside: inside.products, "as they are")


def _cosines(found: Found) -> Figure:
    title = "Pairwise cosines of the embeddings"
    return _pairs(found, title, "cosines", "cosine", lambda inside: inside.cosines, "made unit")


def _pairs(
    found: Found, title: str, key: str, y_label: str, read: Callable[[Inside], Mapping[str, Array]], how: str
) -> Figure:
    values = _tables(found, read)

    def scale(ax: Any) -> None:
        ax.set_xlabel("pairs of vocabulary entries, sorted (%)")
        ax.set_ylabel(y_label)

    spread = {arm: float(np.mean([_width(table) for table in tables["input"]])) for arm, tables in values.items()}
    mean = {arm: float(np.mean([inside.crowding["input"] for inside in models])) for arm, models in found.items()}
    rows = next(iter(found.values()))[0].pair_rows
    everyone = all(
        len(inside.weights.embedding_norms["input"]) == rows for models in found.values() for inside in models
    )
    sample = f"all {rows:,} vectors" if everyone else f"a sample of {rows:,} vectors"
    also = f" The mean cosine of all pairs of input vectors is {each(mean, '.2g')}." if key == "cosines" else ""
    caption = (
        f"Products between different embedding vectors, {how}, among {sample}, sorted. Nine in ten of the input embeddings lie "
        f"within a width of {each(spread)}.{also} Corresponds to figure 4 of the paper."
    )
    return Figure(plots.sorted_tables(values, scale, key, title, caption_text(caption)), title, caption)


def _width(quantiles: Array) -> float:
    """From the 5 % to the 95 % quantile."""
    last = len(quantiles) - 1
    return float(quantiles[round(0.95 * last)] - quantiles[round(0.05 * last)])


def _query_key(found: Found) -> list[Figure]:
    title = "Queries and keys of one layer"
    found = {arm: models for arm, models in found.items() if models[0].vector_lengths}
    if not found:
        return []
    lengths = {arm: _by_name([inside.vector_lengths for inside in models]) for arm, models in found.items()}
    singular = {
        arm: {name: [inside.singular[name][inside.layer] for inside in models] for name in ("Q", "K")}
        for arm, models in found.items()
    }
    shown = {inside.weights.places["Q"][inside.layer] for models in found.values() for inside in models}
    layers = listed([f"{number:g}" for number in sorted(shown)])
    ratio = {
        arm: float(np.mean([np.median(heads[:, -1] / heads[:, 0]) for heads in matrices["Q"]]))
        for arm, matrices in singular.items()
    }
    caption = (
        f"Of layer {layers}: above, lengths of the vectors of W<sub>q</sub> and W<sub>k</sub>; below, singular values of each "
        f"head&rsquo;s part over its largest (thin) and their median (thick). The smallest of Q is, in the median over heads, "
        f"{each(ratio)} of the largest. Corresponds to figures 11 and 12 of the paper."
    )
    drawing = depth_plots.query_key_spectra(lengths, singular, "query-key", title, caption_text(caption))
    return [Figure(drawing, title, caption)]


def _ranks(found: Found) -> Figure:
    title = "Effective rank of the matrices"
    ranks = {arm: _by_name([inside.ranks for inside in models]) for arm, models in found.items()}
    names = [
        name for part in MATRICES.values() for name in part if any(name in matrices for matrices in ranks.values())
    ]
    places = {arm: models[0].weights.places for arm, models in found.items()}
    of_experts = ", of experts that over experts" if "E_u" in names else ""
    medians = {
        arm: float(np.median(np.concatenate([seed for seeds in values.values() for seed in seeds])))
        for arm, values in ranks.items()
    }
    caption = (
        "exp of the entropy of the singular values, as a part of the largest that the matrix could have; of attention matrices "
        f"the median over heads{of_experts}. Over all panels the median is {each(medians)}. Not in the paper."
    )
    label = "effective rank over the largest"
    drawing = plots.matrix_panels(ranks, names, label, "ranks", title, caption_text(caption), places=places)
    return Figure(drawing, title, caption)


def _angles(found: Found) -> Figure:
    title = "Angle moved by each block"
    lines = []
    for arm, models in found.items():
        for look, name, layers, steps in _steps(models):
            angles = [inside.motion.angles[steps] for inside in models]
            low, high = np.quantile(np.concatenate(angles, axis=1), (0.25, 0.75), axis=1)
            lines.append(Line(arm, layers, [found.mean(axis=1) for found in angles], name, look, (low, high)))
    total = {
        arm: _mean(models, lambda motion: float(motion.angles.sum(axis=0).mean())) for arm, models in found.items()
    }
    caption = (
        f"By how many degrees {_parts(found)} turn the hidden state, mean over positions; bands hold half of the positions. "
        f"All steps of a position together, in degrees: {each(total, '.0f')}. "
        f"{'Of GPT&rsquo;s states the direction counts. ' if 'gpt' in found else ''}Not in the paper."
    )
    axis = Axis("layer", "angle moved (degrees)", zero=True)
    return Figure(depth_plots.over_depth(lines, axis, "angles", title, caption_text(caption)), title, caption)


def _paths(found: Found) -> Figure:
    title = "Length of each position's path"
    paths = {
        arm: np.concatenate([inside.motion.angles.sum(axis=0) for inside in models]) for arm, models in found.items()
    }
    direct = {arm: _mean(models, lambda motion: float(motion.chords.mean())) for arm, models in found.items()}
    caption = (
        "Degrees that a position&rsquo;s state travels over all steps, of all positions. The straight way from its first "
        f"to its last place is in the mean, in degrees: {each(direct, '.0f')}. Not in the paper."
    )
    drawing = depth_plots.distributions(
        paths, "degrees travelled", "positions (%)", "paths", title, caption_text(caption)
    )
    return Figure(drawing, title, caption)


def _alignment(found: Found, field: str) -> Figure:
    """Cosines of proposals with the last state, or with the output vector of the final prediction."""
    what = {"to_state": "the final state", "to_prediction": "the final prediction"}[field]
    detail = {
        "to_state": "the state that the model ends in",
        "to_prediction": "the output vector of the token that the model ends up finding most probable",
    }[field]
    title = f"Proposals and {what}"
    lines = [
        Line(arm, layers, [getattr(inside.motion, field)[steps] for inside in models], name, look)
        for arm, models in found.items()
        for look, name, layers, steps in _steps(models)
    ]
    caption = f"Mean cosine of what each block proposes with {detail}. Not in the paper."
    axis = Axis("layer", "mean cosine")
    return Figure(
        depth_plots.over_depth(lines, axis, field.replace("_", "-"), title, caption_text(caption)), title, caption
    )


def _state_lengths(found: Found) -> Figure:
    title = "Length of the hidden state"
    lines = _stop_lines(found, lambda motion: motion.lengths)
    ends = {arm: _mean(models, lambda motion: float(motion.lengths[-1])) for arm, models in found.items()}
    caption = f"Mean over positions, logarithmic. At the end it is {each(ends)}. Not in the paper."
    axis = Axis("layers behind it", "mean length", log=True)
    return Figure(depth_plots.over_depth(lines, axis, "state-length", title, caption_text(caption)), title, caption)


def _state_ranks(found: Found) -> Figure:
    title = "Effective rank of the hidden states"
    lines = _stop_lines(found, lambda motion: motion.rank)
    count = next(iter(found.values()))[0].motion.angles.shape[1]
    ends = {arm: _mean(models, lambda motion: float(motion.rank[-1])) for arm, models in found.items()}
    caption = (
        f"exp of the entropy of the singular values of the {count:,} states, each made unit, not centred. At the end it is "
        f"{each(ends)}. Not in the paper."
    )
    axis = Axis("layers behind it", "effective rank", zero=True)
    return Figure(depth_plots.over_depth(lines, axis, "state-rank", title, caption_text(caption)), title, caption)


def _state_anisotropy(found: Found) -> Figure:
    title = "Anisotropy of the hidden states"
    lines = _stop_lines(found, lambda motion: motion.anisotropy)
    ends = {arm: _mean(models, lambda motion: float(motion.anisotropy[-1])) for arm, models in found.items()}
    caption = (
        "Mean cosine between the states of different positions: 0 where they point everywhere, 1 where all point one way. At "
        f"the end it is {each(ends)}. Not in the paper."
    )
    axis = Axis("layers behind it", "mean cosine")
    return Figure(depth_plots.over_depth(lines, axis, "anisotropy", title, caption_text(caption)), title, caption)


def _entropies(found: Found) -> list[Figure]:
    title = "Attention entropy of each head"
    dots = [
        Dots(arm, models[0].motion.of_part("attention")[0], [inside.motion.spread for inside in models])
        for arm, models in found.items()
        if models[0].motion.spread.size
    ]
    if not dots:
        return []
    medians = {of_arm.arm: float(np.median(np.concatenate(of_arm.values))) for of_arm in dots}
    caption = (
        "Entropy of each head&rsquo;s attention as a part of the largest that its query could have (1: it looks at all tokens "
        f"alike; 0: at one), mean over positions; one dot a head. The median is {each(medians, '.2f')}. Not in the paper."
    )
    label, limits = "attention entropy over its largest", (0.0, 1.02)
    drawing = depth_plots.dots_over_depth(dots, label, "entropy", title, caption_text(caption), limits)
    return [Figure(drawing, title, caption)]


def _lens_loss(found: Found) -> Figure:
    title = "Loss if the model stopped here"
    lines = _stop_lines(found, lambda motion: motion.lens.loss)
    ends = {arm: _mean(models, lambda motion: float(motion.lens.loss[-1])) for arm, models in found.items()}
    caption = (
        "Cross-entropy of the next token if the output matrix read the state at this depth"
        f"{', in GPT behind its final norm' if 'gpt' in found else ''}. On this text the models end, in nats per token, "
        f"at {each(ends, '.2f')}. Not in the paper."
    )
    axis = Axis("layers behind it", "loss (nats per token)")
    return Figure(depth_plots.over_depth(lines, axis, "lens-loss", title, caption_text(caption)), title, caption)


def _lens_agreement(found: Found) -> Figure:
    title = "Predictions that are final already"
    lines = _stop_lines(found, lambda motion: 100 * motion.lens.agreement)
    before = {arm: 100 * _mean(models, _agreement_without_last) for arm, models in found.items()}
    caption = (
        "Positions whose most probable token at this depth is that of the whole model, in percent. Without the last layer "
        f"it is {each(before, '.0f')}. Not in the paper."
    )
    axis = Axis("layers behind it", "positions (%)", zero=True)
    return Figure(depth_plots.over_depth(lines, axis, "lens-agreement", title, caption_text(caption)), title, caption)


def _agreement_without_last(motion: Any) -> float:
    """Of the stop before the last layer."""
    last = motion.steps[-1][0]
    return float(motion.lens.agreement[[number for number, _ in motion.steps].index(last)])


def _lens_divergence(found: Found) -> Figure:
    title = "Divergence from the final prediction"
    lines = _stop_lines(found, lambda motion: motion.lens.divergence)
    caption = (
        "Kullback-Leibler divergence from the whole model&rsquo;s distribution to that at this depth, mean over positions, in "
        "nats. Not in the paper."
    )
    axis = Axis("layers behind it", "divergence (nats)", zero=True)
    return Figure(depth_plots.over_depth(lines, axis, "lens-divergence", title, caption_text(caption)), title, caption)


def _stop_lines(found: Found, read: Callable[[Any], Array]) -> list[Line]:
    """One line an arm over all stops: whole numbers are behind a layer, halves between its two parts."""
    return [
        Line(arm, models[0].motion.depths, [read(inside.motion) for inside in models]) for arm, models in found.items()
    ]


def _steps(models: Sequence[Inside]) -> Iterator[tuple[int, str, Array, list[int]]]:
    """(how it looks, its name, numbers of its layers, its steps) of every part that the layers of one arm have."""
    motion = models[0].motion
    for look, name in enumerate(LOOKS):
        layers, steps = motion.of_part(name)
        if steps:
            yield look, name, layers, steps


def _parts(found: Found) -> str:
    """ "attention and MLP"."""
    return listed([name for name in LOOKS if any(models[0].motion.of_part(name)[1] for models in found.values())])


def _tables(found: Found, read: Callable[[Inside], Mapping[str, Array]]) -> dict[str, dict[str, list[Array]]]:
    return {arm: _by_name([read(inside) for inside in models]) for arm, models in found.items()}


def _by_name(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [report[name] for report in reports] for name in reports[0]}


def _mean(models: Sequence[Inside], read: Callable[[Any], float]) -> float:
    return float(np.mean([read(inside.motion) for inside in models]))


def each(values: Mapping[str, float], form: str = ".3g") -> str:
    """ "3.2 for GPT and 1.1 for nGPT"."""
    return listed([f"{format(value, form)} for {NAMES[arm]}" for arm, value in values.items()])


def caption_text(caption: str) -> str:
    """A caption without its markup, as the description of a drawing."""
    for markup, plain in (("<sub>", ""), ("</sub>", ""), ("&rsquo;", "’")):
        caption = caption.replace(markup, plain)
    return caption
