"""A random order of 0..size-1 that is computed, not stored: a keyed Feistel network with cycle walking.

A number below a*b is a pair (left below a, right below b). A round adds a hash of one half to the other, modulo that
half's size, which can be undone, so the network is a bijection of 0..a*b-1. With a*b just above `size`, applying it
again wherever it leads outside 0..size-1 makes it a bijection of those (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002: generalized Feistel and cycle walking).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from spherelm.errors import UserError

_ROUNDS = 6


class Permutation:
    """A bijection of 0..size-1 chosen by `key` (any text), in constant memory. `size` from 1 to 2^62."""

    def __init__(self, size: int, key: str) -> None:
        if not 1 <= size <= 1 << 62:
            raise UserError(f"a permutation needs a size from 1 to 2**62, not {size}")
        self.size = size
        self._left = np.uint64(math.isqrt(size - 1) + 1)
        self._right = np.uint64(-(-size // int(self._left)))
        self._keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")

    def __call__(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Where each of `indices` (int, any shape, within 0..size-1) goes."""
        out = np.array(indices, dtype=np.uint64)
        if out.size and int(out.max()) >= self.size:
            raise IndexError(f"index {out.max()} outside a permutation of {self.size}")
        flat = self._encrypt(out.reshape(-1))
        while (outside := np.flatnonzero(flat >= np.uint64(self.size))).size:
            flat[outside] = self._encrypt(flat[outside])
        return flat.astype(np.int64).reshape(out.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = np.divmod(values, self._right)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ self._keys[i]) % self._left) % self._left
            right = (right + _mix(left ^ self._keys[i + 1]) % self._right) % self._right
        return left * self._right + right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
