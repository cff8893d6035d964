"""Everything that is measured inside of one model: its weights as they lie there, and what it does with real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spherelm.analysis import geometry, weights
from spherelm.analysis.experts import Experts, look_at_experts
from spherelm.analysis.motion import Motion, measure_motion
from spherelm.analysis.parts import layers_with
from spherelm.analysis.recording import record
from spherelm.analysis.rounding import Rounding, measure_rounding
from spherelm.analysis.sharpness import Sharpness, measure_sharpness
from spherelm.analysis.weights import EMBEDDINGS, WeightReport
from spherelm.errors import UserError
from spherelm.models.decoder import Decoder

Array = NDArray[np.float64]


UNIT = 1e-5
"""Vectors whose lengths are nearer to 1 than this are unit already: their condition numbers would change as little."""


@dataclass(frozen=True)
class Inside:
    """One model in numbers; dictionaries are by "input" and "output" for embeddings,
    by matrix (Q, ..., W_oMLP) for blocks.

    Of a matrix that only some layers have, n_layers is the number of these; `weights.places` are theirs.
    `weights`: what `spherelm compare` shows. `unit_conditions`: condition numbers of the matrices with their vectors
    made unit, [n_layers]. `singular`: [n_layers, heads, values], descending. `ranks`: effective rank over the largest
    possible, median over heads, [n_layers]. `eigenvalues`: of the embedding's covariance over their median,
    [d_model], ascending.
    `products`, `cosines`: quantiles at `geometry.LEVELS` of the pairwise products of embedding vectors, taken among
    `pair_rows` of them. `crowding`: mean cosine of all pairs of embedding vectors. `vector_lengths`: of Q and K in
    `layer`, ascending; `layer` is counted from 0 among the layers that have attention; without any, there are no
    lengths. `motion`: what
    the model does with the text. `rounding`: what four bits would leave of that. `sharpness`: how the loss rises where
    the weights move a little. `experts`: of mixtures, `None` for a model without them.
    """

    weights: WeightReport
    unit_conditions: dict[str, Array]
    singular: dict[str, Array]
    ranks: dict[str, Array]
    eigenvalues: dict[str, Array]
    products: dict[str, Array]
    cosines: dict[str, Array]
    pair_rows: int
    crowding: dict[str, float]
    layer: int
    vector_lengths: dict[str, Array]
    motion: Motion
    rounding: Rounding
    sharpness: Sharpness
    experts: Experts | None


def look_inside(model: Decoder, tokens: Tensor, layer: int | None = None) -> Inside:
    """Measure the model and one pass over int64 tokens [batch, seq].

    layer: of figs. 11 and 12, counted from 0, by default the middle one of those with attention. Raises `ValueError`
    for a layer without attention, and if a weight or a state holds NaN or Inf: nothing is drawn from such a model.
    """
    weights.check_finite(model)
    singular = weights.singular_values(model)
    conditions = weights.conditions(singular)
    report = WeightReport(
        weights.scales(model),
        weights.logit_scales(model),
        weights.embedding_norms(model),
        conditions,
        weights.places(model),
    )
    unit = conditions if max(geometry.off_sphere(model).values()) < UNIT else None  # half of the time of a large model
    shown = attention_layer(list(layers_with(model, "attention")), layer)
    tables = {table: geometry.embedding_rows(model, table) for table in EMBEDDINGS}
    products = {table: geometry.pair_products(rows) for table, rows in tables.items()}
    return Inside(
        weights=report,
        unit_conditions=unit or weights.conditions(weights.singular_values(model, unit=True)),
        singular=singular,
        ranks=geometry.ranks_of_heads(singular),
        eigenvalues={table: geometry.eigenvalues_over_median(rows) for table, rows in tables.items()},
        products={table: found for table, (found, _) in products.items()},
        cosines={table: geometry.pair_products(rows, unit=True)[0] for table, rows in tables.items()},
        pair_rows=products["input"][1],
        crowding={table: geometry.anisotropy(rows) for table, rows in tables.items()},
        layer=shown,
        vector_lengths={name: geometry.vector_lengths(model, name, shown) for name in ("Q", "K") if name in singular},
        motion=measure_motion(model, record(model, tokens)),
        rounding=measure_rounding(model, tokens),
        sharpness=measure_sharpness(model, tokens),
        experts=look_at_experts(model, tokens),
    )


def attention_layer(numbers: Sequence[int], layer: int | None) -> int:
    """Which of the layers with attention, whose numbers count from 1, the layer is; the middle one for `None`.

    Raises `ValueError` where it is none of them.
    """
    if layer is None:
        return len(numbers) // 2
    if layer + 1 not in numbers:
        raise UserError(f"layer {layer + 1} has no attention: choose among {', '.join(map(str, numbers))}")
    return numbers.index(layer + 1)
