"""The state space of Mamba-2 (Dao and Gu, arXiv 2405.21060), in torch alone, and its place in a cache of transformers.

With a state S [d_head, d_state] a head, inputs x_t [d_head], B_t, C_t [d_state], a step dt_t > 0 and a rate A < 0:

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T        y_t = S_t C_t

`scan` computes it chunk by chunk: within a chunk as products of positions with positions, between
chunks as a recurrence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer

from .configuration_spherelm import SphereLMConfig


class StateLayer(DynamicLayer):
    """A layer of a `DynamicCache` that holds a mixer's last inputs in the place of keys, its state in that of values.

    Rows are reordered, repeated and chosen as transformers does it with keys and values, along axis 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def store(self, inputs: Tensor, state: Tensor, count: int) -> None:
        """Put these in the place of what is there, `count` positions later."""
        self.keys, self.values = inputs, state
        self.device, self.dtype, self.is_initialized = inputs.device, inputs.dtype, True
        self.count += count

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """How many positions have been read."""
        return self.count

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized, self.count = False, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a state does not say what it came from."""
        raise ValueError("a recurrent state cannot be cropped: leave out assisted decoding, or begin with a new cache")


def state_layer(cache: Cache, layer: int) -> StateLayer:
    """The `StateLayer` at a place of `cache`, put there if there is none; `ValueError` for a cache of another kind."""
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"a hybrid keeps states in a DynamicCache, not in a {type(cache).__name__}: pass one, or none")
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[layer], StateLayer):
        cache.layers[layer] = StateLayer()
    found: StateLayer = cache.layers[layer]
    return found


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[batch, seq, ...] -> [batch, chunks, chunk, ...], zeros after the end, which change no state."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))


def scan(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor, begins: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence; heads share b and c in consecutive groups.

    x: [batch, seq, heads, d_head]; dt: [batch, seq, heads]; rate: A, [heads]; b, c: [batch, seq, groups, d_state];
    state: [batch, heads, d_head, d_state], before the first position; begins: bool [batch, seq], where a text begins.
    Result: y like x, and the state after the last position.
    """
    heads, chunk = x.shape[2], min(chunk, x.shape[1])
    b, c = (part.to(dt.dtype).repeat_interleave(heads // b.shape[2], dim=2) for part in (b, c))
    stepped, writes, reads = (in_chunks(part, chunk).transpose(2, 3) for part in (x * dt.unsqueeze(-1), b, c))
    total = in_chunks(dt * rate, chunk).transpose(2, 3).cumsum(-1)  # [batch, chunks, heads, chunk], logarithms
    text = in_chunks(begins.long(), chunk).cumsum(-1).unsqueeze(2)  # which text of the chunk, 0 for one from before
    apart = text.unsqueeze(-1) != text.unsqueeze(-2)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    within = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(apart | future, -torch.inf).exp()
    leaving = (total[..., -1:] - total).masked_fill(text != text[..., -1:], -torch.inf).exp()
    entering = total.masked_fill(text != 0, -torch.inf).exp()
    y = ((reads @ writes.transpose(-1, -2)) * within) @ stepped
    added = (stepped * leaving.unsqueeze(-1)).transpose(-1, -2) @ writes
    before = []
    for more, left in zip(added.unbind(1), entering[..., -1].unbind(1), strict=True):
        before.append(state)
        state = left[..., None, None] * state + more
    y = y + (reads @ torch.stack(before, 1).transpose(-1, -2)) * entering.unsqueeze(-1)
    return y.transpose(2, 3).flatten(1, 2)[:, : x.shape[1]].to(x.dtype), state


class StateSpace(nn.Module):
    """x, B and C through a causal convolution and SiLU, then `y_t = S_t C_t + D x_t` of the state that they write."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__()
        sizes = config.architecture["mixer"]
        self.layer_idx, self.chunk = layer_idx, sizes["mamba_chunk"]
        self.n_groups, self.d_state, self.d_head = sizes["mamba_groups"], sizes["mamba_d_state"], sizes["mamba_d_head"]
        self.d_inner, self.width = sizes["mamba_expand"] * config.d_model, sizes["mamba_conv"]
        self.n_heads = self.d_inner // self.d_head
        self.mixed = self.d_inner + 2 * self.n_groups * self.d_state
        self.conv_weight = nn.Parameter(torch.empty(self.mixed, self.width))
        self.conv_bias = nn.Parameter(torch.empty(self.mixed))
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(self.n_heads)) for _ in range(3))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of what a mixer projects `h` to: the gate z; x, B and C; one dt a head."""
        return self.d_inner, self.mixed, self.n_heads

    def draw(self) -> None:
        """As Mamba-2 starts: A from -16 to -1, softplus(dt_bias) from 0.001 to 0.1, D one, the convolution uniform."""
        init.uniform_(self.conv_weight, -(self.width**-0.5), self.width**-0.5)
        init.zeros_(self.conv_bias)
        init.ones_(self.D)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))

    def forward(self, xbc: Tensor, dt: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """[batch, seq, mixed] and [batch, seq, heads] -> [batch, seq, d_inner]. positions: 0 where a text begins."""
        wide, since = torch.promote_types(xbc.dtype, torch.float32), positions.expand(xbc.shape[:2])
        stored = None if cache is None else state_layer(cache, self.layer_idx)
        if stored is None or stored.keys is None:
            before = xbc.new_zeros(xbc.shape[0], self.width - 1, self.mixed)
            state = xbc.new_zeros(xbc.shape[0], self.n_heads, self.d_head, self.d_state, dtype=wide)
        else:
            before, state = stored.keys, stored.values
        x, b, c = F.silu(self.convolved(xbc, before, since)).split(
            (self.d_inner, *[self.n_groups * self.d_state] * 2), dim=-1
        )
        x, b, c = (
            part.unflatten(-1, (n, -1)) for part, n in ((x, self.n_heads), (b, self.n_groups), (c, self.n_groups))
        )
        dt, rate = F.softplus(dt.to(wide) + self.dt_bias.to(wide)), -self.A_log.to(wide).exp()
        y, state = scan(x, dt, rate, b, c, state, since == 0, self.chunk)
        if stored is not None:
            stored.store(torch.cat((before, xbc), dim=1)[:, 1 - self.width :], state, xbc.shape[1])
        return (y + x * self.D.to(x.dtype).unsqueeze(-1)).flatten(2)

    def convolved(self, xbc: Tensor, before: Tensor, since: Tensor) -> Tensor:
        """Every channel's own convolution with its past: `before` [batch, width - 1, mixed] stands
        ahead of the first.
        """
        padded, weight, seq = torch.cat((before, xbc), dim=1), self.conv_weight.to(xbc.dtype), xbc.shape[1]
        y = xbc * weight[:, -1] + self.conv_bias.to(xbc.dtype)
        for back in range(1, self.width):
            start = self.width - 1 - back
            y = y + padded[:, start : start + seq] * (since >= back).unsqueeze(-1) * weight[:, start]
        return y


class Hybrid:
    """For a `SphereLMModel` with a pattern of layers: states in its cache, which counts positions in every layer."""

    def run(self, h: Tensor, cache: Cache | None, **around: Any) -> Tensor:
        """As that of `SphereLMModel`."""
        model: Any = self
        h = super().run(h, cache, **around)
        for layer, word in enumerate(model.words(model.config)) if cache is not None else ():
            if word in "-O":
                nothing = h.new_empty(h.shape[0], 0)
                state_layer(cache, layer).store(nothing, nothing, h.shape[1])
        return h
