"""Measurements of a model's weights, as the nGPT paper shows them (sec. 3.2, figs. 4 to 6): numbers in, numbers out.

Every function takes a `GPT`, an `NGPT` or anything else whose `blocks` have such parts (`analysis/parts.py`), on any
device and in any dtype, computes in float64 on the CPU, and raises `ValueError` where a weight it reads
holds NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spherelm.analysis.parts import ENCODERS, layers_with
from spherelm.errors import UserError

Array = NDArray[np.float64]

ATTENTION_MATRICES = {"Q": "part.q", "K": "part.k", "V": "part.v", "W_o": "part.o"}
MLP_MATRICES = {"W_u": "part.u", "W_v": "part.v", "W_oMLP": "part.o"}
EXPERT_MATRICES = {"E_u": "part.u", "E_v": "part.v", "E_o": "part.o"}
MIXER_MATRICES = {"W_in": "part.in_proj", "W_out": "part.out_proj"}
CROSS_MATRICES = {"C_q": "part.q", "C_k": "part.k", "C_v": "part.v", "C_o": "part.o"}
OF_ENCODER = " of the encoder"
MATRICES = {
    "attention": ATTENTION_MATRICES,
    "cross-attention": CROSS_MATRICES,
    "MLP": MLP_MATRICES,
    "experts": EXPERT_MATRICES,
    "mixer": MIXER_MATRICES,
    **{
        ENCODERS + part: {name + OF_ENCODER: path for name, path in matrices.items()}
        for part, matrices in (("attention", ATTENTION_MATRICES), ("MLP", MLP_MATRICES))
    },
}
"""By part of a layer, the names of its matrices, and where in its sublayer they are."""

SCALES = {
    "alpha_A": ("attention", "alpha"),
    "alpha_C": ("cross-attention", "alpha"),
    "alpha_M": ("MLP", "alpha"),
    "alpha of mixers": ("mixer", "alpha"),
    "alpha of experts": ("experts", "alpha"),
    "s_qk": ("attention", "part.s_qk"),
    "s_qk of cross-attention": ("cross-attention", "part.s_qk"),
    "s_u": ("MLP", "part.s_u"),
    "s_v": ("MLP", "part.s_v"),
    "s_u of experts": ("experts", "part.s_u"),
    "s_v of experts": ("experts", "part.s_v"),
    "s_moe": ("experts", "part.s_moe"),
    "s_mamba": ("mixer", "part.s_mamba"),
    "alpha_A of the encoder": (ENCODERS + "attention", "alpha"),
    "alpha_M of the encoder": (ENCODERS + "MLP", "alpha"),
    "s_qk of the encoder": (ENCODERS + "attention", "part.s_qk"),
    "s_u of the encoder": (ENCODERS + "MLP", "part.s_u"),
    "s_v of the encoder": (ENCODERS + "MLP", "part.s_v"),
}
"""Learned scales: of which part, and where in its sublayer they are."""

EMBEDDINGS = {"input": "embed", "output": "head.linear"}

GRAM_CONDITION = 1e4
"""Condition number up to which singular values are taken from a Gram matrix."""


@dataclass(frozen=True)
class WeightReport:
    """All measurements of one model; arrays are float64.

    n_layers is the number of layers that have such a scale or matrix: all of a GPT's, some of a hybrid's; `places`:
    their numbers, from 1, by the name of the scale or matrix.
    `scales`: mean per layer of each learned scale, `{"alpha_A": [n_layers], ...}`, empty for a GPT.
    `s_z`: effective logit scales in ascending order [vocab_size], or None for a GPT.
    `embedding_norms`: row norms in ascending order, `{"input": [vocab_size], "output": [vocab_size]}`.
    `condition_numbers`: per layer, `{"Q": [n_layers], ..., "W_oMLP": [n_layers]}`.
    """

    scales: dict[str, Array]
    s_z: Array | None
    embedding_norms: dict[str, Array]
    condition_numbers: dict[str, Array]
    places: dict[str, Array] = field(default_factory=dict)


def measure(model: nn.Module) -> WeightReport:
    """Everything below of one model; `ValueError` if any of its parameters holds NaN or Inf."""
    check_finite(model)
    return WeightReport(
        scales(model), logit_scales(model), embedding_norms(model), condition_numbers(model), places(model)
    )


def check_finite(model: nn.Module) -> None:
    """`ValueError`, naming the parameter, if any parameter of the model holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{name} holds NaN or Inf: this model diverged, measure an earlier checkpoint")


def scales(model: nn.Module) -> dict[str, Array]:
    """Mean of each learned scale per layer that has it, `{name: [n_layers]}` (fig. 6);
    names that no layer has are left out.

    Effective values, `value * init / scale`; of `alpha_A` and `alpha_M` the absolute value, as the forward pass uses
    it. Dimensionless. `s_v` is without its constant factor sqrt(d_model).
    """
    means = {}
    for name, (part, path) in SCALES.items():
        layers = [_effective(owner, path) for owner in layers_with(model, part).values()]
        if layers and all(layer is not None for layer in layers):
            values = [np.abs(layer) if name.startswith("alpha") else layer for layer in layers if layer is not None]
            means[name] = np.array([value.mean() for value in values])
    return means


def places(model: nn.Module) -> dict[str, Array]:
    """The numbers, from 1, of the layers that have each learned scale and each matrix, by its name."""
    parts = {name: part for name, (part, _) in SCALES.items()}
    parts |= {name: part for part, names in MATRICES.items() for name in names}
    found = {part: np.array(list(layers_with(model, part)), dtype=np.float64) for part in {*parts.values()}}
    return {name: found[part] for name, part in parts.items()}


def logit_scales(model: nn.Module) -> Array | None:
    """Effective `s_z` in ascending order [vocab_size] (fig. 6, last panel); None for a model without one."""
    values = _effective(model, "head.s_z")
    return None if values is None else np.sort(values.ravel())


def embedding_norms(model: nn.Module) -> dict[str, Array]:
    """Euclidean lengths of the rows of the input and the output embedding, ascending, each [vocab_size] (fig. 4)."""
    norms = {}
    for name, path in EMBEDDINGS.items():
        norms[name] = np.sort(np.linalg.norm(weight_at(model, path), axis=1))
    return norms


def condition_numbers(model: nn.Module) -> dict[str, Array]:
    """Largest over smallest singular value per layer, `{matrix: [n_layers]}` (fig. 5);
    inf for a matrix without full rank.

    Of the attention matrices the median over heads.
    """
    return conditions(singular_values(model))


def conditions(singular: Mapping[str, Array]) -> dict[str, Array]:
    """Condition numbers, the median over heads, of what `singular_values` found: `{matrix: [n_layers]}`."""
    with np.errstate(divide="ignore"):
        return {name: np.median(values[..., 0] / values[..., -1], axis=1) for name, values in singular.items()}


def singular_values(model: nn.Module, unit: bool = False) -> dict[str, Array]:
    """Singular values per layer and head, descending: `{matrix: [n_layers, heads, values]}`;
    an MLP matrix has one "head".

    A head's part are rows of Q, K, V and columns of W_o, d_k = d_model / n_heads at a time; of a bank of experts, an
    expert's. Matrices that no layer has are left out. unit: of the matrix whose vectors
    along d_model were first made unit, as the paper's dotted lines have it (fig. 5).
    """
    names = (name for part, paths in MATRICES.items() for name, path in paths.items() if has_matrix(model, part, path))
    return {name: _singular_values_of(model, name, unit) for name in names}


def has_matrix(model: nn.Module, part: str, path: str) -> bool:
    """Whether layers have that part, and in it something at `path`: an MLP without a gate has no W_v."""
    return any(path in dict(owner.named_modules()) for owner in layers_with(model, part).values())


def _singular_values_of(model: nn.Module, name: str, unit: bool) -> Array:
    layers = []
    for part in head_parts(model, name):
        vectors = part / np.linalg.norm(part, axis=-1, keepdims=True) if unit else part
        layers.append(_singular(vectors))
    return np.stack(layers)


def head_parts(model: nn.Module, name: str) -> Iterator[Array]:
    """Of each layer that has it the matrix `name` by heads, [heads, rows, d_model]:
    rows are vectors of the residual stream.
    """
    part = next(part for part, names in MATRICES.items() if name in names)
    for owner in layers_with(model, part).values():
        path = MATRICES[part][name]
        weight = weight_at(owner, path)
        rows = weight.swapaxes(-1, -2) if owner.get_submodule(path).writes else weight
        d_model = rows.shape[-1]
        yield rows.reshape(-1, d_model // _n_heads(model) if part.endswith("attention") else rows.shape[-2], d_model)


def _singular(matrices: Array) -> Array:
    """Singular values of the last two axes, descending, in float64: to 1e-7 of each, the smallest included.

    They are roots of the eigenvalues of the smaller Gram matrix, a fraction of a decomposition's work.
    Its rounding grows with the square of the condition number: matrices beyond `GRAM_CONDITION` are decomposed
    themselves.
    """
    tall = torch.from_numpy(matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.swapaxes(-1, -2))
    values = torch.linalg.eigvalsh(tall.mT @ tall).flip(-1).clamp_min(0).sqrt()
    poor = values[..., -1] * GRAM_CONDITION < values[..., 0]
    if poor.any():
        values[poor] = torch.linalg.svdvals(tall[poor])
    return np.asarray(values.numpy())


def _n_heads(model: nn.Module) -> int:
    return int(model.config.n_heads)  # type: ignore[union-attr, arg-type]


def _effective(module: nn.Module, path: str) -> Array | None:
    """The effective value of the scale at `path`, or None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return None if found is None else _numbers(found(), path)


def weight_at(module: nn.Module, path: str) -> Array:
    """The matrix of the submodule at `path`, in float64; `ValueError` if it is not finite."""
    return _numbers(module.get_submodule(path).weight, path)  # type: ignore[arg-type]


def _numbers(tensor: Tensor, name: str) -> Array:
    """The tensor in float64 on the CPU; `ValueError` if it is not finite."""
    values = tensor.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or Inf: this model diverged, measure an earlier checkpoint")
    return values
