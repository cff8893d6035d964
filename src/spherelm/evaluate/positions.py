"""Other positions for a trained model: another RoPE base, interpolated positions, YaRN.
To compare, at evaluation time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor

from spherelm.errors import UserError
from spherelm.fields import check
from spherelm.layers.attention import Attend
from spherelm.layers.rope import interpolated, yarn, yarn_temperature
from spherelm.models import Decoder

SCALINGS = ("linear", "yarn")


@dataclass(frozen=True)
class Positions:
    """Differences from training: the frequencies of the rotation, and positions stretched by `factor`.

    Attributes:
        rope_base: Base of the rotary embedding, if not the one trained with.
        scaling: linear (position interpolation, arXiv 2306.15595), yarn (arXiv 2309.00071) or none.
        factor: By which positions are stretched.
    """

    rope_base: Annotated[float, Field(gt=1)] | None = None
    scaling: str = "none"
    factor: float = 1.0

    def __post_init__(self) -> None:
        check(self)

    def __str__(self) -> str:
        parts = [] if self.rope_base is None else [f"base {self.rope_base:g}"]
        parts += [] if self.scaling == "none" else [f"{self.scaling}:{self.factor:g}"]
        return ", ".join(parts) or "as trained"


def parse_positions(base: float | None, scaling: str | None) -> Positions:
    """`Positions` from what the command line takes: scaling "linear:4", "yarn:4", "none" or `None`."""
    if scaling is None or scaling == "none":
        return Positions(base)
    name, _, number = scaling.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if name not in SCALINGS or not 1 <= factor < float("inf"):
        raise UserError(
            f"{scaling!r} is not a way to scale positions: write linear:FACTOR or yarn:FACTOR with a factor of at least 1"
        )
    return Positions(base, name, factor)


def place(model: Decoder, positions: Positions, trained_length: int) -> None:
    """Give `model`, in place and once, the positions asked for. trained_length: tokens a sequence in its training.

    Raises `ValueError` for YaRN on a model whose rotary embedding is NVIDIA's, which has no frequencies in YaRN's
    sense, and for anything on a model without a rotary embedding.
    """
    if model.config.rope == "none" and positions != Positions():
        raise UserError(f"{positions} changes the rotary embedding, and this model has none: leave it out")
    if positions.rope_base is not None:
        model.runtime.rope_base = positions.rope_base
    if positions.scaling == "linear":
        model.runtime.table = interpolated(model.runtime.table, positions.factor)
    elif positions.scaling == "yarn":
        if model.config.rope != "standard":
            raise UserError(f"yarn needs a model with rope='standard', this one has {model.config.rope!r}: use linear")
        model.runtime.table = yarn(positions.factor, trained_length)
        model.runtime.attend = partial(warmer, model.runtime.attend, yarn_temperature(positions.factor))


def warmer(
    attend: Attend, temperature: float, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """`attend` with every score times `temperature`."""
    return attend(q, k, v, scale * temperature, mask)
