"""Layers of a cache of transformers that hold no keys and values:
states of Mamba-2 mixers, and how far the rest has read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from spherelm.interop.huggingface.standalone.mixers import state_layer
from spherelm.layers.cache import LayerCache, Pair, StateCache


class StateView(StateCache):
    """A `StateLayer`, put in the place of what was there in a cache of transformers,
    with the methods of our `StateCache`.
    """

    def __init__(self, cache: Cache, layer: int) -> None:
        super().__init__()
        self.stored = state_layer(cache, layer)

    @property
    def length(self) -> int:
        return self.stored.count

    @property
    def empty(self) -> bool:
        return self.stored.keys is None

    def read(self) -> Pair:
        inputs, state = self.stored.keys, self.stored.values
        assert inputs is not None, "nothing was read yet"
        assert state is not None
        return inputs, state

    def write(self, inputs: Tensor, state: Tensor, count: int) -> None:
        self.stored.store(inputs, state, count)


class CountView(StateView):
    """As `StateView`, for a layer that remembers nothing: transformers may ask any layer how much was read."""

    def passed(self, h: Tensor) -> None:
        """Note that `h` [batch, seq, d_model] has gone by."""
        nothing = torch.empty(h.shape[0], 0, device=h.device)
        self.stored.store(nothing, nothing, h.shape[1])


def views(cache: Cache, pattern: str, of_attention: type[LayerCache]) -> list[LayerCache]:
    """A view on each layer of `cache`, by the letters of `pattern`."""
    kinds: dict[str, Any] = {"A": of_attention, "M": StateView}
    return [kinds.get(letter, CountView)(cache, layer) for layer, letter in enumerate(pattern)]
