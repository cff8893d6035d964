"""What four bits leave of the dot products of a model: their signal-to-noise ratio, and why it is what it is.

With uncorrelated entries a sum of n products and its noise both grow as sqrt(n), and the ratio does not depend on the
width. If products are correlated and their noise is not, the ratio grows with it ("Natively 4-Bit", arXiv 2605.06067).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from spherelm.analysis.parts import layers_with
from spherelm.analysis.weights import MATRICES
from spherelm.layers.linear import Linear
from spherelm.layers.low_precision import BLOCKS, to_nvfp4
from spherelm.models.decoder import Decoder

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rounding:
    """The products of a text's states with the matrices of the blocks,
    in NVFP4 (largest entries measured, to the nearest).

    By matrix [n_layers that have it]; banks of experts are left out. `decibels`: the mean square of dot
    products over that of
    their errors. `correlation`: of the element-wise products in a dot product with each other, mean over pairs: 1 where
    all are equal, 0 where they are independent. `noise_correlation`: of their errors.
    """

    decibels: dict[str, Array]
    correlation: dict[str, Array]
    noise_correlation: dict[str, Array]


def measure_product(x: Tensor, weight: Tensor) -> tuple[float, float, float]:
    """The three numbers of `Rounding` for inputs [tokens, n] and a matrix [rows, n],
    over all pairs of a token and a row.
    """
    x, weight = (F.pad(t.float(), (0, -t.shape[-1] % BLOCKS["nvfp4"])) for t in (x, weight))
    rough_x, rough_weight = to_nvfp4(x), to_nvfp4(weight)
    exact = x @ weight.T
    noise = rough_x @ rough_weight.T - exact

    def paired(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """The sum over n of the mean of `a b c d`: a pair of a token and a row is as likely as any other."""
        return ((a * b).double().mean(0) * (c * d).double().mean(0)).sum()

    squares = paired(x, x, weight, weight)
    cross = paired(rough_x, x, rough_weight, weight)
    noise_squares = paired(rough_x, rough_x, rough_weight, rough_weight) - 2 * cross + squares
    signal, error = exact.double().square().mean(), noise.double().square().mean()
    pairs = int((x.abs().amax(0) > 0).sum()) - 1
    return (
        float(10 * torch.log10(signal / error)),
        float((signal / squares - 1) / pairs),
        float((error / noise_squares - 1) / pairs),
    )


@torch.no_grad()
def measure_rounding(model: Decoder, tokens: Tensor) -> Rounding:
    """`Rounding` of a pass over int64 tokens [batch, seq], which an encoder-decoder has read as its source."""
    found: dict[str, list[tuple[float, float, float]]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Linear)
        found.setdefault(name, []).append(measure_product(inputs[0].flatten(0, -2), module.weight))

    with ExitStack() as hooks:
        for part, names in MATRICES.items():
            for owner in layers_with(model, part).values():
                for name, path in names.items():
                    module = dict(owner.named_modules()).get(path)
                    if isinstance(module, Linear):
                        hooks.callback(module.register_forward_pre_hook(partial(note, name)).remove)
        reader = model.reader(tokens)
        reader.trunk(reader.embedded(tokens))
    columns = {name: np.array(rows).T for name, rows in found.items()}
    return Rounding(*({name: c[i] for name, c in columns.items()} for i in range(len(fields(Rounding)))))
