"""Learning-rate schedules as pure functions of the step: no state, so resuming needs none."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt

from spherelm.fields import check


@dataclass(frozen=True)
class ScheduleConfig:
    """The shape of the learning rate over a run, as a factor of its peak.

    Attributes:
        kind: constant, cosine, linear, wsd (warm-up, stable, decay) or log (logarithmic decay).
        warmup_steps: Updates of linear rise to the peak.
        final: Learning rate at the end, as a fraction of the peak.
        decay_fraction: Fraction of the run, after the warm-up, in which wsd decays.
        decay_shape: Decay of wsd: linear, or minus_sqrt, 1 - sqrt(r), which falls fast at first (arXiv 2405.18392).
        rho: Bend of the logarithmic decay; the smaller, the earlier the rate falls.
    """

    kind: Literal["constant", "cosine", "linear", "wsd", "log"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    decay_shape: Literal["linear", "minus_sqrt"] = "linear"
    rho: Annotated[float, Field(ge=sys.float_info.min)] = 0.1  # below it 1 / rho is infinite

    def __post_init__(self) -> None:
        check(self)


def logarithmic(r: float, rho: float) -> float:
    """`1 - ln(1 + r/rho) / ln(1 + 1/rho)`: 1 at r = 0, 0 at r = 1, area `1/ln(1 + 1/rho) - rho` (arXiv 2608.01284)."""
    return 1 - math.log1p(r / rho) / math.log1p(1 / rho)


def decay(config: ScheduleConfig, r: float) -> float:
    """The part of the way from the final rate up to the peak at the part `r` in [0, 1] of the decay: from 1 to 0."""
    if config.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * r))
    if config.kind == "linear":
        return 1 - r
    if config.kind == "wsd":
        left = min(1.0, (1 - r) / config.decay_fraction)
        return left if config.decay_shape == "linear" else 1 - math.sqrt(1 - left)
    if config.kind == "log":
        return logarithmic(r, config.rho)
    return 1.0


def float32_rate(rate: float) -> float:
    """`rate`, or infinity where no float32 is so large, which torch would refuse: the weights are to show it."""
    return rate if rate <= torch.finfo(torch.float32).max else math.inf


def factor(config: ScheduleConfig, step: int, total: int) -> float:
    """The factor of the peak learning rate for the update number `step`, counted from 0, of `total`.

    Warm-up reaches the peak at step `warmup_steps - 1`; from there the decay runs over the remaining steps and would
    reach `final` at step `total`, the first that is not taken.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    r = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    return config.final + (1 - config.final) * decay(config, r)
