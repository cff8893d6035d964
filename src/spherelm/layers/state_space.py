"""The selective state space of Mamba-2 (Dao and Gu, arXiv 2405.21060):
pure functions, chunk by chunk and token by token.

With a state S [d_head, d_state] a head, inputs x_t [d_head], B_t, C_t [d_state], a step dt_t > 0 and a rate A < 0:

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T        y_t = S_t C_t

`chunked` computes it as the state-space dual form does: within a chunk as a masked product of positions with positions,
between chunks as a recurrence of states, so that nearly all of the work is matrix products. `recurrent` is the
definition, one token at a time. Heads share B and C in consecutive groups, as query heads share keys.

A text may begin in the middle of a row: `begins` marks its first position, at which the state before
counts for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Scanned = tuple[Tensor, Tensor]
"""y [batch, seq, heads, d_head] in the dtype of x, and the state [batch, heads, d_head, d_state] after
the last position.
"""


def chunked(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    chunk_size: int,
    begins: Tensor | None = None,
) -> Scanned:
    """The recurrence over a sequence, products in the dtype of x, decays and states in that of `dt`.

    x: [batch, seq, heads, d_head]; dt: [batch, seq, heads], float32 or wider; rate: A, [heads]; b, c: [batch, seq,
    groups, d_state]; state: [batch, heads, d_head, d_state], before the first position; begins: bool [batch, seq].
    """
    seq, heads, groups = x.shape[1], x.shape[2], b.shape[2]
    chunk = min(chunk_size, seq)
    stepped = _in_chunks((x * dt.unsqueeze(-1)).to(x.dtype), chunk).unflatten(3, (groups, -1))
    reads, writes = (
        _in_chunks(part, chunk).transpose(2, 3) for part in (c, b)
    )  # [batch, chunks, groups, chunk, d_state]
    logs = _in_chunks(dt * rate, chunk).transpose(2, 3)  # [batch, chunks, heads, chunk]
    within, entering, leaving, across = decays(logs, None if begins is None else _in_chunks(begins, chunk))
    near = (reads @ writes.transpose(-1, -2)).unsqueeze(3) * within.unflatten(2, (groups, -1))
    y = near.to(x.dtype) @ stepped.permute(0, 1, 3, 4, 2, 5)  # [batch, chunks, groups, heads of each, chunk, d_head]
    kept = stepped * leaving.transpose(2, 3).unflatten(3, (groups, -1)).unsqueeze(-1).to(x.dtype)
    added = (kept.transpose(2, 3).flatten(4).transpose(-1, -2) @ writes).to(dt.dtype)
    before, state = _passed_on(added.unflatten(3, (heads // groups, -1)).flatten(2, 3), across, state)
    far = reads @ before.unflatten(2, (groups, -1)).flatten(3, 4).transpose(-1, -2).to(x.dtype)
    far = far.unflatten(-1, (heads // groups, -1)).transpose(3, 4)
    y = y + far * entering.unflatten(2, (groups, -1)).unsqueeze(-1).to(x.dtype)
    return y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :seq], state


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[batch, seq, ...] -> [batch, chunks, chunk, ...], zeros after the end, which change no state."""
    missing = -x.shape[1] % chunk
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    return padded.unflatten(1, (-1, chunk))


def decays(logs: Tensor, begins: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decayed factor of a state, or of a position's contribution, later in its chunk or after it.

    logs: [batch, chunks, heads, chunk], of the factor at each position; begins: bool [batch, chunks, chunk]. Result:
    [..., chunk, chunk] of position j at position i, 0 where i < j; [..., chunk] of the state before the chunk at each
    position; [..., chunk] of each position at the chunk's end; [batch, chunks, heads] of the state before the
    chunk at its end.
    """
    total = logs.cumsum(-1)
    apart = torch.ones(logs.shape[-1], logs.shape[-1], dtype=torch.bool, device=logs.device).triu(1)
    within, leaving = total.unsqueeze(-1) - total.unsqueeze(-2), total[..., -1:] - total
    if begins is not None:
        text = begins.cumsum(-1).unsqueeze(
            2
        )  # which text of the chunk a position belongs to, 0 for one that began before
        apart = apart | (text.unsqueeze(-1) != text.unsqueeze(-2))
        total = total.masked_fill(text != 0, -torch.inf)
        leaving = leaving.masked_fill(text != text[..., -1:], -torch.inf)
    return within.masked_fill(apart, -torch.inf).exp(), total.exp(), leaving.exp(), total[..., -1].exp()


def _passed_on(added: Tensor, across: Tensor, state: Tensor) -> Scanned:
    """The states before each chunk [batch, chunks, heads, d_head, d_state], and the one after the last."""
    before = []
    for more, left in zip(added.unbind(1), across.unbind(1), strict=True):
        before.append(state)
        state = left[..., None, None] * state + more
    return torch.stack(before, dim=1), state


def recurrent(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor, begins: Tensor | None = None
) -> Scanned:
    """The same for a single position (seq is 1), as it is defined; arguments as for `chunked`."""
    heads, groups = x.shape[2], b.shape[2]
    logs = dt[:, 0] * rate
    left = (logs if begins is None else logs.masked_fill(begins, -torch.inf)).exp()
    writes, reads = (
        part[:, 0].repeat_interleave(heads // groups, dim=1).to(state.dtype).unsqueeze(2) for part in (b, c)
    )
    stepped = (dt[:, 0].unsqueeze(-1) * x[:, 0]).unsqueeze(-1)
    state = left[..., None, None] * state + stepped * writes
    return (state * reads).sum(-1).unsqueeze(1).to(x.dtype), state


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, since: Tensor | None = None) -> Tensor:
    """Every channel's own convolution with its past: `y_t = bias + sum_k weight_k x_(t - width + 1 + k)`.

    x: [batch, seq, channels]; weight: [channels, width]; bias: [channels]; before: [batch, width - 1,
    channels], the inputs ahead of the first. since: int64 [batch, seq], how many positions ahead of each belong to its
    text; None: all do.
    """
    width, seq = weight.shape[1], x.shape[1]
    padded = torch.cat((before, x), dim=1)
    if since is None:
        return F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    y = x * weight[:, -1] + bias
    for back in range(1, width):
        start = width - 1 - back
        seen = padded[:, start : start + seq] * (since >= back).unsqueeze(-1)
        y = y + seen * weight[:, start]
    return y
