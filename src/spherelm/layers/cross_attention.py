"""Attention of one sequence to another: queries from the decoder,
keys and values from what the encoder made of the source.

No positions are put into queries and keys: source and target count theirs apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spherelm import sphere
from spherelm.layers.attention import Attend, attend, head_norms, join_heads, split_heads
from spherelm.layers.cache import LayerCache, Pair
from spherelm.layers.linear import INNER_NORMS, Linear, Scale, UnitLinear


class Memory(NamedTuple):
    """The encoder's output for sources: states [batch, source, d_model];
    mask bool [batch, 1, 1, source], False at padding.
    """

    states: Tensor
    mask: Tensor


class CrossAttention(nn.Module):
    """The baseline's: `W_o softmax(q k^T / sqrt(d_k)) v` with q from `h`,
    k and v from the source (Vaswani et al., 3.2.3).

    Weights `q` [n_heads*d_k, d_model], `k`, `v` [n_kv_heads*d_k, d_model], `o` [d_model, n_heads*d_k]. qk_norm: as in
    `Attention`.
    """

    reads = ("memory", "cache", "attend")

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        d_k = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.softmax_scale = n_heads, n_kv_heads, 1 / math.sqrt(d_k)
        self.q = Linear(d_model, n_heads * d_k)
        self.k = Linear(d_model, n_kv_heads * d_k)
        self.v = Linear(d_model, n_kv_heads * d_k)
        self.o = Linear(n_heads * d_k, d_model, writes=True)
        self.q_norm, self.k_norm = head_norms(d_k, qk_norm)

    def read(self, states: Tensor) -> Pair:
        """Keys and values [batch, n_kv_heads, source, d_k] of the source's states."""
        return self.k_norm(split_heads(self.k(states), self.n_kv_heads)), split_heads(self.v(states), self.n_kv_heads)

    def forward(self, h: Tensor, memory: Memory, cache: LayerCache | None = None, attend: Attend = attend) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]; a cache keeps the source's keys and values."""
        q = self.q_norm(split_heads(self.q(h), self.n_heads))
        k, v = self.read(memory.states) if cache is None else cache.fixed(lambda: self.read(memory.states))
        return self.o(join_heads(attend(q, k, v, self.softmax_scale, memory.mask)))


class UnitCrossAttention(nn.Module):
    """`CrossAttention` on the sphere: queries and keys are unit vectors per head, scaled by an `s_qk` of their own.

    As nGPT has it for self-attention (eqs. 13, 15, 16), without the rotation; see `UnitAttention` for why `s_qk`
    [n_heads, d_k] enters once, squared. Unit rows of `q`, `k`, `v`; unit columns of `o`. `h` and the source's states
    are unit vectors.
    qk_norm, inner_norm: as there.
    """

    reads = CrossAttention.reads

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, s_qk: Scale, qk_norm: bool = True, inner_norm: bool = False
    ) -> None:
        super().__init__()
        d_k = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.softmax_scale = n_heads, n_kv_heads, math.sqrt(d_k)
        self.unit: Callable[[Tensor], Tensor] = sphere.norm if qk_norm else torch.positive
        self.inner = INNER_NORMS[inner_norm]
        self.q = UnitLinear(d_model, n_heads * d_k)
        self.k = UnitLinear(d_model, n_kv_heads * d_k)
        self.v = UnitLinear(d_model, n_kv_heads * d_k)
        self.o = UnitLinear(n_heads * d_k, d_model, writes=True)
        self.s_qk = s_qk

    def read(self, states: Tensor) -> Pair:
        """Keys, unit per head, and values [batch, n_kv_heads, source, d_k] of the source's states."""
        return self.unit(split_heads(self.k(states), self.n_kv_heads)), split_heads(self.v(states), self.n_kv_heads)

    def forward(self, h: Tensor, memory: Memory, cache: LayerCache | None = None, attend: Attend = attend) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized;
        a cache keeps the source's keys and values.
        """
        q = self.unit(split_heads(self.q(h), self.n_heads))
        q = q * self.s_qk().square().unsqueeze(1).to(q.dtype)
        k, v = self.read(memory.states) if cache is None else cache.fixed(lambda: self.read(memory.states))
        return self.o(self.inner(join_heads(attend(q, k, v, self.softmax_scale, memory.mask))))


def real_tokens(source: Tensor) -> Tensor:
    """Where int64 `source` [batch, seq] holds tokens, as a mask for attention: bool [batch, 1, 1, seq];
    padding is negative.
    """
    return torch.ge(source, 0)[:, None, None, :]
