"""The memory of tokens already read, so that decoding a token costs one token:
keys and values, or a recurrent state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spherelm.errors import UserError

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class LayerCache:
    """The keys and values of one attention layer, each [batch, n_kv_heads, seq, d_k], ready for the product.

    Keys are stored as attention uses them: rotated and, in nGPT, normalized. They lie in buffers that double when they
    are full, so that a new position is written once instead of all of them being copied.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._length = 0
        self._fixed: Pair | None = None

    @property
    def length(self) -> int:
        """How many positions are stored."""
        return self._length

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new positions along the sequence and return all of them."""
        start, self._length = self._length, self._length + keys.shape[2]
        self._keys = _appended(self._keys, keys, start)
        self._values = _appended(self._values, values, start)
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]

    def fixed(self, make: Callable[[], Pair]) -> Pair:
        """The keys and values that `make` computed at the first call, of what does not grow:
        the source of a translation.
        """
        if self._fixed is None:
            self._fixed = make()
        return self._fixed

    def select(self, rows: Tensor) -> None:
        """Make row i of the batch what row `rows[i]` was: int64 [batch]. What is fixed stays where it is."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys[:, :, : self._length].index_select(0, rows)
            self._values = self._values[:, :, : self._length].index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget what is stored beyond the first `length` positions."""
        self._length = min(self._length, length)


def _appended(stored: Tensor | None, new: Tensor, start: int) -> Tensor:
    """A buffer that holds the first `start` positions of `stored`, then `new`, and has room for more.

    Where gradients are wanted nothing may be written over, and the buffer is what was asked for and no more.
    """
    if stored is None:
        return new
    if new.requires_grad or stored.requires_grad:
        return torch.cat((stored[:, :, :start], new), dim=2)
    end = start + new.shape[2]
    if end > stored.shape[2]:
        grown = new.new_empty(*new.shape[:2], 2 * end, new.shape[3])
        grown[:, :, :start] = stored[:, :, :start]
        stored = grown
    stored[:, :, start:end] = new
    return stored


class StateCache(LayerCache):
    """The state of a recurrent layer, of the same size after a million tokens as after one.

    Stored are the last inputs of its convolution [batch, width - 1, channels] and its state [batch, heads,
    d_head, d_state], now and before the last update: `crop` can undo one pass, and no more, for a state does not say
    what it came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now: Pair | None = None
        self._earlier: tuple[Pair | None, int] = (None, 0)

    @property
    def empty(self) -> bool:
        """Whether nothing was read."""
        return self._now is None

    def read(self) -> Pair:
        """The last inputs of the convolution, and the state."""
        assert self._now is not None, "nothing was read yet"
        return self._now

    def write(self, inputs: Tensor, state: Tensor, count: int) -> None:
        """Remember the state after `count` more positions."""
        self._earlier = (self._now, self._length)
        self._now, self._length = (inputs, state), self._length + count

    def select(self, rows: Tensor) -> None:
        earlier, length = self._earlier
        self._now, self._earlier = _selected(self._now, rows), (_selected(earlier, rows), length)

    def crop(self, length: int) -> None:
        """Undo the last pass, or forget everything. Raises `ValueError` for any other length below the present one."""
        if length >= self._length:
            return
        if length not in (0, self._earlier[1]):
            raise UserError(
                f"a recurrent state of {self._length} positions cannot be taken back to {length}, only to "
                f"{self._earlier[1]} or 0: begin with a new cache and read the first {length} again"
            )
        self._now, self._length = (None, 0) if length == 0 else self._earlier
        self._earlier = (None, 0)


def _selected(pair: Pair | None, rows: Tensor) -> Pair | None:
    return None if pair is None else (pair[0].index_select(0, rows), pair[1].index_select(0, rows))


class KVCache:
    """A `LayerCache` for each of the model's layers: of so many attention layers, or those that are given.

    A layer that remembers nothing, such as an MLP, has one that stays empty.
    """

    def __init__(self, layers: int | Iterable[LayerCache]) -> None:
        self.layers = [LayerCache() for _ in range(layers)] if isinstance(layers, int) else list(layers)

    @property
    def length(self) -> int:
        """How many positions have been read."""
        return max(layer.length for layer in self.layers)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on, also what a pass that was broken off left in some of the layers."""
        for layer in self.layers:
            layer.crop(length)

    def select(self, rows: Tensor) -> None:
        """As `LayerCache.select`, in every layer: how hypotheses of one source change places in a beam search."""
        for layer in self.layers:
            layer.select(rows)
