"""Causal self-attention, plain and on the sphere, over torch's `scaled_dot_product_attention`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.layers.cache import LayerCache
from spherelm.layers.causal_backward import attend_by_products, products_are_faster
from spherelm.layers.linear import INNER_NORMS, Linear, Scale, UnitLinear
from spherelm.layers.rmsnorm import RMSNorm
from spherelm.layers.rope import ROPES, Rope, RotaryTable, Rotation, rotate


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[batch, seq, n_heads * d_k] -> [batch, n_heads, seq, d_k]."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, n_heads, seq, d_k] -> [batch, seq, n_heads * d_k]."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax attention of [batch, n_heads, q_len, d_k] queries on [batch, n_kv_heads, kv_len, d_k] keys and values.

    Without a mask the attention is causal, a single query being the last position; a mask is boolean, True where a
    query may look, broadcastable to [batch, n_heads, q_len, kv_len]. Query heads share key heads in consecutive groups
    (grouped-query attention).
    """
    if products_are_faster(q, k, v, mask):
        return attend_by_products(q, k, v, scale)
    groups = q.shape[1] != k.shape[1]
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups)


def separate_documents(tokens: Tensor, end_token: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Mask and positions that make of each document in int64 tokens [batch, seq] what it is alone;
    no end token, neither.

    mask: bool [batch, 1, seq, seq], True where a query may look, in its own document up to itself.
    positions: [batch, seq], from 0 in each document: in nGPT `s_qk` acts after the rotation, channel by channel, so
    that scores depend on more than differences of positions. `end_token` is the last token of the document that it
    ends.
    """
    if end_token is None:
        return None, None
    ends = tokens == end_token
    document = ends.cumsum(-1) - ends.long()
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    index = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    first = (index * ends.roll(1, -1)).cummax(-1).values
    return same.tril().unsqueeze(1), index - first


Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""A function that computes attention: `attend`, or another with its arguments and result."""


def head_norms(d_k: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """The norms of a head's queries and of its keys [..., d_k], which do nothing without qk_norm."""
    return (RMSNorm(d_k), RMSNorm(d_k)) if qk_norm else (nn.Identity(), nn.Identity())


class Attention(nn.Module):
    """The baseline's attention: `W_o softmax(RoPE(q) RoPE(k)^T / sqrt(d_k)) v` (nGPT paper, eq. 4 and section 2.3.1).

    Weights `q` [n_heads*d_k, d_model], `k`, `v` [n_kv_heads*d_k, d_model], `o` [d_model, n_heads*d_k]. qk_norm: whether
    each head of q and k passes an RMSNorm before the rotation (Henry et al., arXiv 2010.04245; gains
    [d_k], as in Qwen 3).
    """

    reads = ("table", "mask", "cache", "attend")

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, rotation: Rotation = rotate, qk_norm: bool = False
    ) -> None:
        super().__init__()
        d_k = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.softmax_scale = n_heads, n_kv_heads, 1 / math.sqrt(d_k)
        self.rotation = rotation
        self.q = Linear(d_model, n_heads * d_k)
        self.k = Linear(d_model, n_kv_heads * d_k)
        self.v = Linear(d_model, n_kv_heads * d_k)
        self.o = Linear(n_heads * d_k, d_model, writes=True)
        self.q_norm, self.k_norm = head_norms(d_k, qk_norm)

    def forward(
        self,
        h: Tensor,
        table: RotaryTable,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        attend: Attend = attend,
    ) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]; with a cache, `h` holds only the new positions."""
        q = self.rotation(self.q_norm(split_heads(self.q(h), self.n_heads)), table)
        k = self.rotation(self.k_norm(split_heads(self.k(h), self.n_kv_heads)), table)
        v = split_heads(self.v(h), self.n_kv_heads)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.o(join_heads(attend(q, k, v, self.softmax_scale, mask)))


class UnitAttention(nn.Module):
    """nGPT's attention: queries and keys are unit vectors per head, scaled by `s_qk` (eqs. 12, 13, 15, 16).

    Shapes as in `Attention`. Unit rows of `q`, `k`, `v`; unit columns of `o`. The softmax scale is sqrt(d_k). Both q
    and k carry `s_qk` [n_heads, d_k] in the paper; only the product counts, so it enters here once, squared, on q,
    which spares a pass over k and gives each query head its own scale where heads share keys. Without
    qk_norm queries and keys are not normalized. inner_norm: whether the joined heads are, before `o` (FNGPT, arXiv
    2605.06067).
    """

    reads = Attention.reads

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        s_qk: Scale,
        rope: Rope = ROPES["standard"],
        qk_norm: bool = True,
        inner_norm: bool = False,
    ) -> None:
        super().__init__()
        d_k = d_model // n_heads
        self.n_heads, self.n_kv_heads, self.softmax_scale = n_heads, n_kv_heads, math.sqrt(d_k)
        self.rope, self.qk_norm, self.inner = rope, qk_norm, INNER_NORMS[inner_norm]
        self.rotation = rope.unit_rotation if qk_norm else rope.rotation
        self.q = UnitLinear(d_model, n_heads * d_k)
        self.k = UnitLinear(d_model, n_kv_heads * d_k)
        self.v = UnitLinear(d_model, n_kv_heads * d_k)
        self.o = UnitLinear(n_heads * d_k, d_model, writes=True)
        self.s_qk = s_qk

    def forward(
        self,
        h: Tensor,
        table: RotaryTable,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        attend: Attend = attend,
    ) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized;
        with a cache, `h` holds only the new positions.
        """
        q = self.rotation(split_heads(self.q(h), self.n_heads), table)
        k = self.rotation(split_heads(self.k(h), self.n_kv_heads), table)
        v = split_heads(self.v(h), self.n_kv_heads)
        q = q * self.s_qk().square().unsqueeze(1).to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.o(self.inner(join_heads(attend(q, k, v, self.softmax_scale, mask))))
