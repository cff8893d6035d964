"""How vectors lie in their space: spectrum, pairwise products, effective rank, anisotropy.
Arrays in, numbers out, float64.

Rows are vectors. What is sampled says of how many rows; everything else is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spherelm.analysis.parts import layers_with
from spherelm.analysis.weights import (
    EMBEDDINGS,
    MATRICES,
    has_matrix,
    head_parts,
    weight_at,
)

Array = NDArray[np.float64]

PAIR_ROWS = 8192
"""Pairwise products are taken among at most this many rows (33.5 million pairs);
of more rows, among a sample of them.
"""

LEVELS = np.linspace(0.0, 1.0, 401)
"""The quantiles that stand for a distribution of many values."""


def eigenvalues_over_median(rows: Array) -> Array:
    """Eigenvalues of the rows' covariance, over their median, ascending: [rows, d] -> [d] (nGPT, fig. 4).

    All rows are used, the eigenvalue problem is d x d. A median of zero, where there are fewer rows than half of d,
    leaves the eigenvalues as they are.
    """
    centred = torch.from_numpy(rows - rows.mean(axis=0))
    values = torch.linalg.eigvalsh(centred.T @ centred / len(rows)).clamp_min(0).numpy()
    median = float(np.median(values))
    return values / median if median > 1e-12 * values[-1] else values


def pair_products(rows: Array, unit: bool = False) -> tuple[Array, int]:
    """Quantiles, at `LEVELS`, of the dot products between different rows, and how many rows they were taken among.

    unit: cosines, each row first made unit. More than `PAIR_ROWS` rows are sampled without replacement,
    always the same.
    Products are computed in float32.
    """
    if len(rows) > PAIR_ROWS:
        rows = rows[np.random.default_rng(0).choice(len(rows), PAIR_ROWS, replace=False)]
    vectors = torch.from_numpy(unit_rows(rows) if unit else rows).to(torch.float32)
    products = (vectors @ vectors.T).numpy()
    ordered = np.sort(products[np.triu(np.ones(products.shape, dtype=bool), 1)])
    places = LEVELS * (ordered.size - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, ordered.size - 1)
    return ordered[below] + (places - below) * (ordered[above] - ordered[below]), len(rows)


def unit_rows(rows: Array) -> Array:
    """Every row divided by its length; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))


def effective_rank(singular: Array) -> Array:
    """`exp(H(p))` with `p` the singular values over their sum: [..., values] -> [...] (Roy and Vetterli, 2007).

    Between 1, all in one direction, and the number of values, alike in all.
    """
    total = singular.sum(axis=-1, keepdims=True)
    p = singular / np.where(total > 0, total, 1.0)
    return np.asarray(np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)))


def rank_of_rows(rows: Array) -> float:
    """Effective rank of [rows, d], whose singular values come from the smaller Gram matrix; not centred."""
    matrix = torch.from_numpy(rows)
    gram = matrix.T @ matrix if rows.shape[0] >= rows.shape[1] else matrix @ matrix.T
    return float(effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().numpy()))


def anisotropy(rows: Array) -> float:
    """Mean cosine between different rows, of all pairs: 0 for directions spread evenly, 1 for one direction."""
    unit = unit_rows(rows)
    n = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (n * (n - 1))) if n > 1 else 1.0


def embedding_rows(model: nn.Module, table: str) -> Array:
    """The rows of the "input" or the "output" embedding, [vocab_size, d_model]."""
    return weight_at(model, EMBEDDINGS[table])


def ranks_of_heads(singular: Mapping[str, Array]) -> dict[str, Array]:
    """Effective rank as a part of the largest possible, median over heads: `{matrix: [n_layers]}` in (0, 1].

    singular: as `spherelm.analysis.weights.singular_values` gives them.
    """
    return {name: np.median(effective_rank(values) / values.shape[-1], axis=1) for name, values in singular.items()}


def vector_lengths(model: nn.Module, name: str, layer: int) -> Array:
    """Lengths of the vectors along d_model of the matrix `name`, ascending (figs. 11, 12).

    layer: counted from 0, among those that have it.
    """
    parts = list(head_parts(model, name))[layer]
    return np.sort(np.linalg.norm(parts, axis=-1).ravel())


@torch.no_grad()
def off_sphere(model: nn.Module) -> dict[str, float]:
    """The largest `| ||w|| - 1 |` over the vectors along d_model of each kind of matrix.

    `{"input": ..., "output": ..., "Q": ..., ...}`. For nGPT it is what `spherelm.departure` says, matrix by matrix; for
    GPT, of which no vector need be unit, it is how far its vectors are from the sphere that nGPT's live on.
    """
    found = {table: _worst(weight_at(model, path), axis=1) for table, path in EMBEDDINGS.items()}
    for part, matrices in MATRICES.items():
        owners = layers_with(model, part).values()
        for name, path in ((name, path) for name, path in matrices.items() if has_matrix(model, part, path)):
            found[name] = max(
                _worst(weight_at(owner, path), axis=-2 if owner.get_submodule(path).writes else -1) for owner in owners
            )
    return found


def _worst(weight: Array, axis: int) -> float:
    return float(np.abs(np.linalg.norm(weight, axis=axis) - 1).max())
