"""nuGPT: how rates, starts and constants change with width, depth and length (arXiv 2604.27077).

Tune the peak learning rate at a small base shape; these rules carry it to any other. d_k and the batch size stay fixed
while the width grows. Which constants a run of the base shape has is the recipe's business; here are only the ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveInt

from spherelm.fields import check
from spherelm.optim.groups import RateMultipliers

SCALE = 0.03
"""The stored value of alpha, s_qk and s_z at every width (instead of 1/sqrt(d_model))."""


@dataclass(frozen=True)
class BaseShape:
    """The shape and the length that the peak learning rate was tuned at; the paper's has 10 layers of 1020 channels.

    Attributes:
        d_model: Channels of the base model.
        n_layers: Layers of the base model.
        steps: Updates of the base run.
    """

    d_model: PositiveInt
    n_layers: PositiveInt
    steps: PositiveInt

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Transfer:
    """The factors between a shape and its base: `rate` for the peak learning rate, `multipliers` for it by role, and
    `alpha_init`, `s_z_init` for the initial values.
    """

    rate: float
    multipliers: RateMultipliers
    alpha_init: float
    s_z_init: float


def transfer(base: BaseShape, d_model: int, n_layers: int, steps: int) -> Transfer:
    """The rules of nuGPT (its Table 1) from `base` to a model of `n_layers` layers of `d_model` trained
    for `steps` updates.

    With m_data, m_width and m_depth the ratios to the base: every rate goes with m_data^(-1/3); that of the input
    embedding with m_width^(-1/2), those of block matrices and output embedding with m_width^(-3/4), half of it for the
    latter; alpha starts at its base value over m_depth, s_z at its base value times m_width^(1/2). No rule
    for depth on rates.
    """
    m_data, m_width, m_depth = steps / base.steps, d_model / base.d_model, n_layers / base.n_layers
    matrix: float = m_width**-0.75
    multipliers = RateMultipliers(input_embedding=m_width**-0.5, matrix=matrix, output_embedding=matrix / 2)
    return Transfer(rate=m_data ** (-1 / 3), multipliers=multipliers, alpha_init=1 / m_depth, s_z_init=m_width**0.5)
