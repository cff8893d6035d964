"""How steep a model's loss is around its weights: the rise of the loss where all matrices move a little at random.

Rounding moves the weights too, so a flat loss is a loss that few bits do not hurt ("Natively 4-Bit", arXiv 2605.06067,
which perturbs weights along random unit directions; its exact procedure is not known here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spherelm.layers.linear import block_matrices, retract_weights
from spherelm.models.decoder import Decoder

Array = NDArray[np.float64]

PERTURBATION_SIZES = (0.05, 0.1, 0.2)
"""Lengths of a perturbation over the length of what it moves. Rounding to NVFP4 is about 0.1 long."""

DIRECTIONS = 4


@dataclass(frozen=True)
class Sharpness:
    """Of each direction and size, how much the loss rises.

    `sizes` [n]: the length of the perturbation of a matrix over the matrix's own (Frobenius norms). `rise`
    [directions, n]: of the mean cross-entropy in nats per token, the mean of both ways along the direction: for small
    sizes half of the second derivative times size^2.
    """

    sizes: Array
    rise: Array


def draw_direction(weights: Sequence[Tensor], draw: torch.Generator) -> list[Tensor]:
    """For each matrix [..., rows, columns], of a bank each expert's, a random one of the same length; draw: on the CPU.

    The matrices of one size are along one random unit direction, uniform over all of them.
    """
    found = []
    for weight in weights:
        random = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        lengths = torch.linalg.matrix_norm(weight.double(), keepdim=True)
        unit = random / torch.linalg.matrix_norm(random, keepdim=True)
        found.append((unit.to(weight.device) * lengths).to(weight.dtype))
    return found


@torch.no_grad()
def measure_sharpness(
    model: Decoder,
    tokens: Tensor,
    sizes: Sequence[float] = PERTURBATION_SIZES,
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> Sharpness:
    """`Sharpness` on int64 tokens [batch, seq], which an encoder-decoder has read as its source.

    Every matrix of the blocks moves by `size` times its own length, all at once, so that a model's scale does not
    count. Vectors that are unit in nGPT are made unit again, as after each of its updates; GPT's are left as they are.
    seed: of the directions. The weights are bit for bit as before when this returns or raises.
    """
    modules = [module for _, module in block_matrices(model)]
    kept = [module.weight.detach().clone() for module in modules]
    unit = [(m.weight, axis) for m in modules if (axis := getattr(m, "unit_axis", None)) is not None]
    draw = torch.Generator().manual_seed(seed)

    def loss() -> float:
        return float(model.reader(tokens).loss(tokens[:, :-1], tokens[:, 1:]))

    def moved(direction: Sequence[Tensor], size: float) -> float:
        for module, weight, way in zip(modules, kept, direction, strict=True):
            module.weight.copy_(weight + size * way)
        retract_weights(unit)
        return loss()

    try:
        level, rises = loss(), []
        for _ in range(directions):
            way = draw_direction(kept, draw)
            rises.append([(moved(way, size) + moved(way, -size)) / 2 - level for size in sizes])
    finally:
        for module, weight in zip(modules, kept, strict=True):
            module.weight.copy_(weight)
    return Sharpness(np.array(sizes, dtype=np.float64), np.array(rises))
