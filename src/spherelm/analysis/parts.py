"""Which parts a layer has, whatever model it belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from spherelm.errors import UserError

PARTS = {
    "attention": "attention",
    "cross_attention": "cross-attention",
    "mixer": "mixer",
    "mlp": "MLP",
    "experts": "experts",
}
"""Names of parts, by the name of their sublayer in a block."""

ENCODERS = "encoder's "
"""Ahead of a part's name: of the layers of an encoder-decoder's encoder."""


def blocks_of(model: nn.Module) -> list[Any]:
    """The layers of a decoder; `ValueError` for what has none."""
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None:
        raise UserError(f"cannot measure a {type(model).__name__}: it has no `blocks`; pass a GPT or an NGPT")
    return list(blocks)


def parts_of(block: Any) -> dict[str, Any]:
    """The sublayers of a layer by the names of their parts, in their order; the part is `sublayer.part`."""
    return {PARTS[name]: sublayer for name, sublayer in block.sublayers.items()}


def layers_with(model: nn.Module, part: str) -> dict[int, Any]:
    """Number of the layer, from 1 -> its sublayer with that part, for the layers that have one.

    Behind `ENCODERS` the same of the model's encoder, where it has one.
    """
    tower: nn.Module | None = getattr(model, "encoder", None) if part.startswith(ENCODERS) else model
    if tower is None:
        return {}
    name = part.removeprefix(ENCODERS)
    return {
        number: parts[name] for number, block in enumerate(blocks_of(tower), 1) if name in (parts := parts_of(block))
    }
