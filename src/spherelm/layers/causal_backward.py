"""Causal attention for a compiled training step on a CPU:
torch's own forward pass, and a backward pass of large products.

Torch's backward kernel for the CPU works on one head and a few hundred positions at a time, too little for the tile
units of a processor that multiplies bfloat16 in hardware. Here a block of keys of all heads is one product, and what
lies between the products is elementwise, which a compiler fuses into a pass or two over the block; uncompiled it is
slower than torch's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from spherelm.sphere import transformed

SMALLEST_KEY_BLOCK = 128
"""Of keys; longer sequences are cut into four blocks, of which the part above the diagonal is left out."""

LONGEST_BY_PRODUCTS = 2048
"""Beyond it the blocks no longer fit the caches and torch's kernel is as fast (docs/performance.md)."""


def products_are_faster(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend_by_products` beats torch: compiled, in training, in bfloat16 on a CPU, causal, without groups.

    Not under torch.func, whose transforms it has no rules for.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    alike = (
        mask is None and q.shape == k.shape == v.shape and 2 * SMALLEST_KEY_BLOCK <= q.shape[2] <= LONGEST_BY_PRODUCTS
    )
    here = q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.compiler.is_compiling() and not transformed()
    return alike and training and here


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of [batch, heads, seq, d_k], each query on all keys up to its own position."""
    out: Tensor = _ProductAttention.apply(q, k, v, scale)
    return out


class _ProductAttention(torch.autograd.Function):
    """Keeps its arguments, its result, and the logarithm of each row's sum, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = flash(q, k, v, 0.0, True, scale=scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grad_outputs
        q, k, v, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            logsumexp = causal_logsumexp(q, k, ctx.scale)  # to be differentiated, which what the kernel left cannot be
        return *attention_gradients(q, k, v, out, logsumexp, grad, ctx.scale), None


def causal_logsumexp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The logarithm of each row's sum in the softmax of `q k^T scale`:
    float32 [batch, heads, seq], float64 for float64.
    """
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).logsumexp(-1)


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each [batch, heads, seq, d_k]; logsumexp: float32 [batch, heads, seq].

    With p the probabilities, `dv = p^T dout`, `ds = p * (dout v^T - sum(dout * out)) scale`, `dq = ds k`, `dk = ds^T q`
    (Dao et al., arXiv 2205.14135, appendix B). Blocks hold keys as rows, [keys, queries], so that only the product for
    dq reads a block transposed. Sums are float32.
    """
    batch, heads, seq, _ = q.shape
    wide = logsumexp.dtype
    along = (grad.to(wide) * out.to(wide)).sum(-1).flatten(0, 1).unsqueeze(1) * scale
    logsumexp = logsumexp.flatten(0, 1).unsqueeze(1)
    q, k, v, grad = (x.flatten(0, 1) for x in (q, k, v, grad))
    size = max(SMALLEST_KEY_BLOCK, seq // 4)
    grad_k, grad_v = [], []
    grad_q: list[list[Tensor]] = [[] for _ in range(0, seq, size)]
    for start in range(0, seq, size):
        keys, later = slice(start, start + size), slice(start, None)
        # Copied by the compiler, once; a product would copy them itself, each time.
        queries, grads, rows = (x.contiguous() for x in (q[:, later], grad[:, later], k[:, keys]))
        products = rows @ queries.mT
        grad_p = v[:, keys] @ grads.mT
        position = torch.arange(seq - start, device=q.device)
        hidden = torch.where(position[: products.shape[1], None] > position, -torch.inf, 0.0)
        p = torch.exp(products * scale + (hidden - logsumexp[..., later]))
        grad_s = (p * (grad_p * scale - along[..., later])).to(q.dtype)
        grad_v.append(p.to(q.dtype) @ grads)
        grad_k.append(grad_s @ queries)
        for sums, part in zip(grad_q[start // size :], (grad_s.mT @ rows).split(size, dim=1), strict=True):
            sums.append(part)
    whole = torch.cat(
        [functools.reduce(torch.add, (part.to(wide) for part in parts)).to(q.dtype) for parts in grad_q], 1
    )
    shape = (batch, heads)
    return whole.unflatten(0, shape), torch.cat(grad_k, 1).unflatten(0, shape), torch.cat(grad_v, 1).unflatten(0, shape)
