"""Cross-entropy of a read-out over the vocabulary, a piece of the tokens at a time.

The logits of a batch, [batch*seq, vocab] in float32, are the largest tensor of a training step by far. Here they exist
only for a chunk of tokens, whose gradients are computed while they do: the same three matrix products as the plain
loss, nothing computed twice. (`torch.nn.functional.linear_cross_entropy` does the same but took 1.3 to 1.9 times as
long as this where both were timed, see docs/performance.md, and torch.compile leaves it out.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherelm.layers.readout import Readout, read_logits
from spherelm.sphere import transformed

IGNORED = -100
"""A target that counts for nothing."""

CHUNK_LOGITS = 2**24
"""How many logits may exist at once: 64 MiB in float32.
Each chunk adds to all of the matrix's gradient: fewer are faster.
"""


def chunk_rows(rows: int, vocab_size: int) -> int:
    """How many tokens to read out at once: `rows` in equal parts, two or more,
    of `CHUNK_LOGITS` logits if 128 tokens allow.
    """
    most = max(1, min((rows + 1) // 2, max(128, CHUNK_LOGITS // vocab_size)))
    return max(1, -(-rows // -(-rows // most)))


def score(logits: Tensor, targets: Tensor, count: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of logits [tokens, vocab], and their gradients over `count`, in the logits' dtype.

    targets: int64 [tokens]. The logits may be overwritten by their gradients: (softmax - smoothed one-hot) / count.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    dtype, vocab_size = logits.dtype, logits.shape[1]
    valid = targets != IGNORED
    safe = targets.masked_fill(~valid, 0).unsqueeze(-1)
    logits, share = logits.to(wide), (valid.to(wide) / count).unsqueeze(-1)
    chosen, largest = logits.gather(-1, safe), logits.amax(-1, keepdim=True)
    wanted = (1 - smoothing) * chosen + smoothing * logits.mean(-1, keepdim=True) if smoothing else chosen
    exponentials = logits.sub_(largest).exp_()
    partition = exponentials.sum(-1, keepdim=True)
    total = ((partition.log() + largest - wanted).squeeze(-1) * valid).sum()
    gradients = exponentials.mul_(share / partition)
    at_target = ((chosen - largest).exp() / partition - (1 - smoothing)) * share
    if smoothing:
        spread = smoothing / vocab_size * share
        gradients, at_target = gradients.sub_(spread), at_target - spread
    # The target's own entry is set after the rounding, of which a difference near 0 keeps nothing.
    return total, gradients.to(dtype).scatter_(-1, safe, at_target.to(dtype))


Score = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""`score`, or what a compiler makes of it."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy whose backward pass only multiplies gradients that the forward pass computed.

    Where it is to be differentiated itself, they are computed again by plain operations.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, pullback: Tensor | None, smoothing: float, score: Score
    ) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        product_weight = weight.to(h.dtype)
        back_weight = product_weight if pullback is None else pullback.to(h.dtype)
        count = (targets != IGNORED).sum().clamp_min(1)
        total = torch.zeros((), dtype=wide, device=h.device)
        grad_h, grad_weight = torch.empty_like(h), torch.zeros(weight.shape, dtype=wide, device=h.device)
        size = chunk_rows(h.shape[0], weight.shape[0])
        for start in range(0, h.shape[0], size):
            rows = slice(start, start + size)
            part, grad_logits = score(F.linear(h[rows], product_weight), targets[rows], count, smoothing)
            total += part
            grad_h[rows] = grad_logits @ back_weight
            grad_weight += grad_logits.T @ h[rows]
        ctx.smoothing = smoothing
        ctx.save_for_backward(grad_h, grad_weight.to(weight.dtype), h, weight, targets, pullback)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_h, grad_weight, h, weight, targets, pullback = ctx.saved_tensors
        (grad,) = grad_outputs
        if torch.is_grad_enabled():
            wanted = [x for x, needed in zip((h, weight), ctx.needs_input_grad, strict=False) if needed]
            loss = plain_cross_entropy(h, weight, targets, pullback, ctx.smoothing)
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
            of_h, of_weight = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
            return of_h, of_weight, None, None, None, None
        return grad_h * grad.to(grad_h.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None, None


def with_gradients_of(loss: Tensor, others: Iterable[Tensor]) -> Tensor:
    """A scalar with the value of `loss` and the gradient of `loss` and the `others` together."""
    for other in others:
        loss = loss + (other - other.detach()).to(loss.dtype)
    return loss


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    pullback: Tensor | None = None,
    smoothing: float = 0.0,
    score: Score = score,
) -> Tensor:
    """Mean cross-entropy in nats of the logits `h weight^T` against `targets`, never held whole.

    h: [tokens, d] in the dtype of the products; weight: [vocab, d]; targets: int64 [tokens], `IGNORED`
    (-100) counts for nothing. pullback: [vocab, d], what carries the logits' gradient back to h instead of the weight,
    itself a constant.
    score: `score`, or that compiled.
    smoothing: the part of each target's probability, in [0, 1), that is spread over the whole vocabulary (label
    smoothing, Szegedy et al., arXiv 1512.00567, section 7).
    Result: a float32 scalar (float64 for float64 inputs), 0 if every target is ignored. A second derivative, and one of
    torch.func, holds the logits.
    """
    if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad) and not transformed():
        return _ChunkedCrossEntropy.apply(h, weight, targets, pullback, smoothing, score)
    return plain_cross_entropy(h, weight, targets, pullback, smoothing)


def plain_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, pullback: Tensor | None, smoothing: float
) -> Tensor:
    """`linear_cross_entropy` by torch's own operations, a chunk at a time; autograd keeps the logits of all."""
    wide = torch.promote_types(h.dtype, torch.float32)
    size = chunk_rows(h.shape[0], weight.shape[0])
    weight, pullback = weight.to(h.dtype), None if pullback is None else pullback.to(h.dtype)
    losses = [
        F.cross_entropy(
            read_logits(Readout(part, weight, pullback)).to(wide),
            wanted,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=smoothing,
        )
        for part, wanted in zip(h.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(losses).sum() / (targets != IGNORED).sum().clamp_min(1)
