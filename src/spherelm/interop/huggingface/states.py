"""Layers of a cache of transformers that hold no keys and values: states of Mamba-2 mixers, and how far the rest has read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from spherelm.errors import UserError
from spherelm.layers.cache import LayerCache, Pair, StateCache


class StateLayer(DynamicLayer):
    """A layer of a `DynamicCache` that holds a mixer's last inputs in the place of keys, its state in that of values.

    Rows are reordered, repeated and chosen as transformers does it with keys and values, along axis 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def store(self, pair: Pair, count: int) -> None:
        """Put `pair` in the place of what is there, `count` positions later."""
        self.keys, self.values = pair
        self.device, self.dtype, self.is_initialized, self.count = (
            pair[0].device,
            pair[0].dtype,
            True,
            self.count + count,
        )

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.count

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.count = False, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a state does not say what it came from."""
        raise UserError("a recurrent state cannot be cropped: leave out assisted decoding, or begin with a new cache")


class StateView(StateCache):
    """A `StateLayer`, put in the place of what was there in a cache of transformers, with the methods of our `StateCache`."""

    def __init__(self, cache: Cache, layer: int) -> None:
        super().__init__()
        if not isinstance(cache, DynamicCache):
            raise UserError(
                f"a hybrid keeps states in a DynamicCache, not in a {type(cache).__name__}: pass one, or none"
            )
        while len(cache.layers) <= layer:
            cache.layers.append(DynamicLayer())
        there = cache.layers[layer]
        self.stored = there if isinstance(there, StateLayer) else StateLayer()
        cache.layers[layer] = self.stored

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
        self.stored.store((inputs, state), count)


class CountView(StateView):
    """As `StateView`, for a layer that remembers nothing: transformers may ask any layer how much was read."""

    def passed(self, h: Tensor) -> None:
        """Note that `h` [batch, seq, d_model] has gone by."""
        nothing = torch.empty(h.shape[0], 0, device=h.device)
        self.stored.store((nothing, nothing), h.shape[1])


def views(cache: Cache, pattern: str, of_attention: type[LayerCache]) -> list[LayerCache]:
    """A view on each layer of `cache`, by the letters of `pattern`."""
    kinds: dict[str, Any] = {"A": of_attention, "M": StateView}
    return [kinds.get(letter, CountView)(cache, layer) for layer, letter in enumerate(pattern)]
