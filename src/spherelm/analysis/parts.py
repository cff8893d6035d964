"""Which parts a layer has, whatever model it belongs to."""

from __future__ import annotations

from torch import nn

from spherelm.layers.attention import Attention, UnitAttention
from spherelm.layers.cross_attention import CrossAttention, UnitCrossAttention
from spherelm.layers.feedforward import FeedForward, UnitFeedForward
from spherelm.layers.mamba2 import Mamba2, UnitMamba2
from spherelm.layers.moe import MixtureOfExperts, UnitMixtureOfExperts

PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "attention": (Attention, UnitAttention),
    "cross-attention": (CrossAttention, UnitCrossAttention),
    "mixer": (Mamba2, UnitMamba2),
    "MLP": (FeedForward, UnitFeedForward),
    "experts": (MixtureOfExperts, UnitMixtureOfExperts),
}
"""What a part is called, by its class, in the order of the steps that parts of one layer propose."""

ENCODERS = "encoder's "
"""Ahead of a part's name: of the layers of an encoder-decoder's encoder."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder; `ValueError` for what has none."""
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise ValueError(f"cannot measure a {type(model).__name__}: it has no `blocks`; pass a GPT or an NGPT")
    return list(blocks)


def parts_of(block: nn.Module) -> dict[str, nn.Module]:
    """The parts of a layer by name, in the order of the steps that they propose; each of them once."""
    return {name: part for name, classes in PARTS.items() for part in block.children() if isinstance(part, classes)}


def layers_with(model: nn.Module, part: str) -> dict[int, nn.Module]:
    """Number of the layer, from 1 -> its part of that name, for the layers that have one; for the part "", the layers.

    Behind `ENCODERS` the same of the model's encoder, where it has one.
    """
    tower: nn.Module | None = getattr(model, "encoder", None) if part.startswith(ENCODERS) else model
    if tower is None:
        return {}
    part, blocks = part.removeprefix(ENCODERS), enumerate(blocks_of(tower), 1)
    if not part:
        return dict(blocks)
    return {number: parts[part] for number, block in blocks if part in (parts := parts_of(block))}
