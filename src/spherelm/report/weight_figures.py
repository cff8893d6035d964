"""The figures of trained weights: learned scales, embeddings, and the spectra of matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spherelm.analysis.inside import Inside
from spherelm.analysis.weights import MATRICES, OF_ENCODER, WeightReport
from spherelm.models import ARM_NAMES
from spherelm.report.charts import DOTTED, Bars, GuideLine, Line, Panel, chart, line_of, ranked
from spherelm.report.drawing import COLOURS, FG, GPT, NGPT, SECOND, SIZE, THIRD, Array, Figure
from spherelm.report.wording import each, listed

Weights = Mapping[str, Sequence[WeightReport]]
Found = Mapping[str, Sequence[Inside]]
"""By arm, one an inspected run."""

ByMatrix = Mapping[str, Mapping[str, Sequence[Array]]]
"""By arm and matrix, an array [layers that have it] a seed."""

Look = tuple[str, str, str, str, str]
"""How a scale is written in TeX, where it is, and its line's colour, marker and dashes."""

RATES: dict[str, Look] = {
    "alpha_A": (r"|\alpha_A|", "attention", NGPT, "o", "-"),
    "alpha_C": (r"|\alpha_C|", "cross-attention", THIRD, "^", ":"),
    "alpha_M": (r"|\alpha_M|", "MLP", SECOND, "s", "--"),
    "alpha_A of the encoder": (r"|\alpha_A|", "encoder", NGPT, "x", "-."),
    "alpha_M of the encoder": (r"|\alpha_M|", "encoder", SECOND, "+", "-."),
    "alpha of mixers": (r"|\alpha|", "mixers", THIRD, "v", "-."),
    "alpha of experts": (r"|\alpha|", "experts", FG, "D", ":"),
}
SCALES: dict[str, Look] = {
    "s_qk": ("s_{qk}", "", NGPT, "o", "-"),
    "s_qk of cross-attention": ("s_{qk}", "cross-attention", NGPT, "x", "-."),
    "s_u": ("s_u", "", SECOND, "s", "--"),
    "s_v": ("s_v", "", THIRD, "^", ":"),
    "s_u of experts": ("s_u", "experts", SECOND, "x", "--"),
    "s_v of experts": ("s_v", "experts", THIRD, "+", ":"),
    "s_moe": ("s_{moe}", "", FG, "D", "-."),
    "s_mamba": ("s_{mamba}", "", GPT, "v", "-."),
}

_DENSE = {"Q": "Q", "K": "K", "V": "V", "W_o": "W_o", "W_u": "W_u", "W_v": "W_v", "W_oMLP": "W_{oMLP}"}
_TITLES = {
    **{name: f"${tex}$" for name, tex in _DENSE.items()},
    **{name + OF_ENCODER: f"${tex}$, encoder" for name, tex in _DENSE.items()},
    **{"C_q": "$Q$, cross", "C_k": "$K$, cross", "C_v": "$V$, cross", "C_o": "$W_o$, cross"},
    **{"E_u": "$W_u$ of experts", "E_v": "$W_v$ of experts", "E_o": "$W_o$ of experts"},
    **{"W_in": "$W_{in}$", "W_out": "$W_{out}$"},
}
"""Of the panel of each matrix."""

IN_PAPER = ("attention", "MLP")
"""The parts whose matrices the paper's figure 5 shows."""


def weight_figures(weights: Weights, unit_conditions: ByMatrix | None = None) -> list[Figure]:
    """Figures of both arms' trained weights; an arm may be missing.

    weights: `{"gpt": [one report a seed], "ngpt": ...}`. unit_conditions: condition numbers of the same matrices with
    their vectors made unit, drawn dotted.
    """
    sphere = weights.get("ngpt", ())
    scales = by_name([report.scales for report in sphere])
    places = {arm: reports[0].places for arm, reports in weights.items()}
    conditions = {arm: by_name([report.condition_numbers for report in reports]) for arm, reports in weights.items()}
    of_layers = [
        _scale_figure("alpha", "Eigen learning rates per layer", "mean eigen learning rate", RATES, scales, places,
                      "How far each block moves the hidden state towards its proposal, averaged over channels"),
        _scale_figure("scales", "Learned scales per layer", "mean scale", SCALES, scales, places,
                      "Effective values, averaged over heads and channels"),
        _logit_scales([report.s_z for report in sphere if report.s_z is not None]),
    ]  # fmt: skip
    conditioned = [_conditions(conditions, part, unit_conditions, places) for part in MATRICES]
    return [figure for figure in (*of_layers, _norms(weights), *conditioned) if figure is not None]


def weight_section(found: Found) -> list[Figure]:
    """All of `weight_figures`, spectra of embeddings, and queries and keys of one layer."""
    reports = {arm: [inside.weights for inside in models] for arm, models in found.items()}
    dotted = {arm: by_name([inside.unit_conditions for inside in models]) for arm, models in found.items()}
    return [*weight_figures(reports, dotted), _eigenvalues(found), *_pairs(found), *_query_key(found), _ranks(found)]


def by_name(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A list of `{name: array}`, one a seed, as `{name: [one array a seed]}`."""
    return {name: [report[name] for report in reports] for name in (reports[0] if reports else ())}


def _span(seeds: Sequence[Any]) -> str:
    """ "from 0.12 to 0.34": the range over layers (or vocabulary) of the mean over seeds."""
    mean = np.mean(np.stack(list(seeds)), axis=0)
    return f"from {mean.min():.3g} to {mean.max():.3g}"


def _html(tex: str) -> str:
    """A scale's name as HTML."""
    return re.sub(r"_\{?(\w+)\}?", r"<sub>\1</sub>", tex.replace(r"\alpha", "α"))


def _scale_figure(
    key: str, title: str, y: str, looks: Mapping[str, Look], scales: Mapping[str, Any], places: Any, what: str
) -> Figure | None:
    lines, spans = [], []
    for name, (tex, place, colour, marker, dashes) in looks.items():
        if name in scales:
            label = f"${tex}$" + (f", {place}" if place else "")
            lines.append(Line(places["ngpt"][name], scales[name], colour, label, dashes, marker))
            spans.append(f"{_html(tex)}{f' ({place})' if place else ''} {_span(scales[name])}")
    if not lines:
        return None
    low = min(0.0, *(float(np.min(np.stack(scales[name]))) for name in looks if name in scales))
    caption = f"{what}: {listed(spans)}. Corresponds to figure 6 of the paper."
    panel = Panel(lines, "layer", y, scale="layers", low=1.05 * low)
    return chart(key, title, caption, [panel], legend=min(len(lines), 3))


def _logit_scales(values: Sequence[Array]) -> Figure | None:
    if not values:
        return None
    pooled = np.concatenate(list(values))
    low, median, high = np.quantile(pooled, (0.05, 0.5, 0.95))
    caption = (
        f"Distribution of the effective s<sub>z</sub> over the vocabulary: median {median:.3g}, nine in ten between {low:.3g} "
        f"and {high:.3g}. It turns cosines into logits. Corresponds to figure 6 of the paper."
    )
    rule = GuideLine(float(median), upright=True, note=f"median {median:.3g}")
    panel = Panel((), "effective $s_z$", "vocabulary entries (%)", "", [Bars(pooled, NGPT)], [rule], low=0)
    return chart("sz", "Logit scales", caption, [panel], legend=0)


def _norms(weights: Weights) -> Figure:
    norms = {arm: by_name([report.embedding_norms for report in reports]) for arm, reports in weights.items()}
    said = []
    for arm, tables in norms.items():
        ends = [end for seeds in tables.values() for seed in seeds for end in (seed[0], seed[-1])]
        spans = listed([f"{_span(tables[name])} ({name})" for name in ("input", "output")])
        unit = arm == "ngpt" and np.allclose(ends, 1, atol=1e-3)
        said.append(
            f"{ARM_NAMES[arm]}’s {'are 1 by construction, so its two lines coincide' if unit else f'go {spans}'}"
        )
    caption = f"Lengths of the embedding vectors, sorted. {'; '.join(said)}. Corresponds to figure 4 of the paper."
    x = "vocabulary entries, sorted by norm (%)"
    return _embeddings("norms", "Embedding norms", caption, norms, Panel((), x, "norm of the embedding vector", low=0))


def _embeddings(key: str, title: str, caption: str, tables: ByMatrix, panel: Panel) -> Figure:
    """Sorted values of input embeddings solid, of output embeddings dashed, on axes like those of `panel`."""
    lines = [
        ranked(arm, values[table], table, dashes=dashes)
        for arm, values in tables.items()
        for table, dashes in (("input", "-"), ("output", "--"))
    ]
    return chart(key, title, caption, [Panel(lines, panel.x, panel.y, scale="percent", log=panel.log, low=panel.low)])


def _conditions(numbers: ByMatrix, part: str, dotted: ByMatrix | None, places: Any) -> Figure | None:
    names = [name for name in MATRICES[part] if any(name in matrices for matrices in numbers.values())]
    if not names:
        return None
    having = {arm: matrices for arm, matrices in numbers.items() if names[0] in matrices}
    medians = {
        arm: float(np.median([value for name in names for seed in matrices.get(name, ()) for value in seed]))
        for arm, matrices in having.items()
    }
    heads = ", median over heads" if part.endswith("attention") else {"experts": ", median over experts"}.get(part, "")
    also = " Dotted: the same with every vector along d<sub>model</sub> made unit." if dotted else ""
    caption = (
        f"Largest over smallest singular value per layer{heads}, logarithmic. Over all panels the median is {each(medians)}."
        f"{also} {'Corresponds to figure 5 of the' if part in IN_PAPER else 'Not in the'} paper."
    )
    key = f"cond-{re.sub('[^a-z]+', '-', part.lower())}"
    return _matrices(
        key, f"Condition numbers, {part} matrices", caption, having, names, places, "condition number", dotted
    )


def _matrices(
    key: str, title: str, caption: str, numbers: ByMatrix, names: Sequence[str], places: Any, y: str, dotted: ByMatrix | None
) -> Figure:  # fmt: skip
    """A panel for each matrix: its number in every layer that has it."""
    panels = []
    for name in names:
        lines = [
            line_of(arm, places[arm][name], matrices[name], marker="o" if arm == "ngpt" else "s")
            for arm, matrices in numbers.items()
            if name in matrices
        ]
        lines += [
            Line(places[arm][name], [np.mean(np.stack(matrices[name]), axis=0)], COLOURS[arm], dashes=DOTTED, width=1.3)
            for arm, matrices in (dotted or {}).items()
            if name in matrices
        ]
        panels.append(Panel(lines, title=_TITLES[name], scale="layers", log=key.startswith("cond")))
    return chart(key, title, caption, panels, columns=2, x="layer", y=y)


def _tables(found: Found, read: Callable[[Inside], Mapping[str, Array]]) -> ByMatrix:
    return {arm: by_name([read(inside) for inside in models]) for arm, models in found.items()}


def _eigenvalues(found: Found) -> Figure:
    values = _tables(found, lambda inside: inside.eigenvalues)
    largest, output = (
        each({arm: float(np.mean([seed[-1] for seed in tables[table]])) for arm, tables in values.items()})
        for table in ("input", "output")
    )
    caption = (
        "Eigenvalues of the covariance of the embedding vectors, over their median, logarithmic. The largest is, of the input "
        f"embeddings, {largest}; of the output embeddings, {output}. Corresponds to figure 4 of the paper."
    )
    panel = Panel((), "eigenvalues, sorted (%)", "eigenvalue over the median", log=True)
    return _embeddings("eigen", "Eigenvalues of the embeddings", caption, values, panel)


def _pairs(found: Found) -> list[Figure]:
    """Dot products and cosines of pairs of embedding vectors."""
    models = [inside for models in found.values() for inside in models]
    rows = models[0].pair_rows
    everyone = all(len(inside.weights.embedding_norms["input"]) == rows for inside in models)
    sample = f"all {rows:,} vectors" if everyone else f"a sample of {rows:,} vectors"
    crowding = {arm: float(np.mean([i.crowding["input"] for i in models])) for arm, models in found.items()}
    figures = []
    for key, word, how, also in (
        ("products", "dot product", "as they are", ""),
        (
            "cosines",
            "cosine",
            "made unit",
            f" The mean cosine of all pairs of input vectors is {each(crowding, '.2g')}.",
        ),
    ):
        values = _tables(found, lambda inside, key=key: getattr(inside, key))  # type: ignore[misc]
        spread = {arm: float(np.mean([_width(seed) for seed in tables["input"]])) for arm, tables in values.items()}
        caption = (
            f"Products between different embedding vectors, {how}, among {sample}, sorted. Nine in ten of the input embeddings "
            f"lie within a width of {each(spread)}.{also} Corresponds to figure 4 of the paper."
        )
        panel = Panel((), "pairs of vocabulary entries, sorted (%)", word)
        figures.append(_embeddings(key, f"Pairwise {word}s of the embeddings", caption, values, panel))
    return figures


def _width(quantiles: Array) -> float:
    """From the 5 % to the 95 % quantile."""
    last = len(quantiles) - 1
    return float(quantiles[round(0.95 * last)] - quantiles[round(0.05 * last)])


def _query_key(found: Found) -> list[Figure]:
    """Above, lengths of the vectors of Q and K, sorted;
    below, singular values over the largest, every head and the median.
    """
    having = {arm: models for arm, models in found.items() if models[0].vector_lengths}
    if not having:
        return []
    top, bottom, ratio = [], [], {}
    for name in ("Q", "K"):
        lengths = [ranked(arm, [i.vector_lengths[name] for i in models]) for arm, models in having.items()]
        heads = {arm: np.concatenate([i.singular[name][i.layer] for i in models]) for arm, models in having.items()}
        heads = {arm: values / values[:, :1] for arm, values in heads.items()}
        ratio[name] = {arm: float(np.median(values[:, -1])) for arm, values in heads.items()}
        spectra = [
            line_of(arm, np.arange(1, values.shape[1] + 1), list(values), marker="", middle=np.median)
            for arm, values in heads.items()
        ]
        first = name == "Q"
        top.append(
            Panel(lengths, "vectors, sorted (%)", "length" * first, f"${name}$, one layer", scale="percent", low=0)
        )
        bottom.append(Panel(spectra, "singular value", "over the largest" * first, low=0, high=1.03))
    shown = {inside.weights.places["Q"][inside.layer] for models in having.values() for inside in models}
    caption = (
        f"Of layer {listed([f'{number:g}' for number in sorted(shown)])}: above, lengths of the vectors of W<sub>q</sub> and "
        "W<sub>k</sub>; below, singular values of each head’s part over its largest (thin) and their median (thick). The "
        f"smallest of Q is, in the median over heads, {each(ratio['Q'])} of the largest. Corresponds to figures 11 and 12 of "
        "the paper."
    )
    title = "Queries and keys of one layer"
    return [chart("query-key", title, caption, [*top, *bottom], columns=2, share="row", size=(SIZE[0], 4.3))]


def _ranks(found: Found) -> Figure:
    ranks = _tables(found, lambda inside: inside.ranks)
    names = [name for part in MATRICES.values() for name in part if any(name in ranks[arm] for arm in ranks)]
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
    title, y = "Effective rank of the matrices", "effective rank over the largest"
    return _matrices("ranks", title, caption, ranks, names, places, y, None)
