"""The choices that a recipe makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spherelm.models import Architecture, DecoderArch
from spherelm.optim import ScheduleConfig
from spherelm.recipes.presets import Preset


@dataclass(frozen=True)
class Choices:
    """The choices of a recipe for one arm at one size and length.

    lr: the peak learning rate. model: fields of the model's config, by name or by path such as "alpha.init". optim:
    fields of the optimizer's config. schedule: the shape of the rate.
    """

    lr: float
    model: Mapping[str, Any]
    optim: Mapping[str, Any]
    schedule: ScheduleConfig


Recipe = Callable[[str, Preset], Choices]
"""(arm, preset) -> choices."""


def depth(architecture: Architecture, n_layers: int) -> float:
    """The number of layers of two steps each: in a pattern every letter is one step."""
    in_letters = isinstance(architecture, DecoderArch) and architecture.pattern is not None
    return n_layers / 2 if in_letters else n_layers


def shared_embeddings(architecture: Architecture) -> dict[str, Any]:
    """Source and target share their input embedding, where there are both; only in "paper" they do not."""
    return {"share_embeddings": True} if architecture.kind == "encdec" else {}
