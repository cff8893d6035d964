"""Keys and values of the tokens already read, so that decoding a token costs one token."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """The keys and values of one attention layer, each [batch, n_kv_heads, seq, d_k], ready for the product.

    Keys are stored as attention uses them: rotated and, in nGPT, normalized.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """How many positions are stored."""
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions along the sequence and return all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


class KVCache:
    """One `LayerCache` for each of the model's `n_layers` attention layers."""

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """How many positions have been read."""
        return self.layers[0].length
