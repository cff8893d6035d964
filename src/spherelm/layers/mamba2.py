"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060), plain and on the sphere ("Training nGPT", arXiv 2608.01284)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.layers.cache import StateCache
from spherelm.layers.linear import INNER_NORMS, Linear, Scale, UnitLinear
from spherelm.layers.mamba_kernel import scan
from spherelm.layers.rmsnorm import RMSNorm
from spherelm.layers.state_space import causal_convolution, recurrent

SLOWEST, FASTEST = 1e-3, 1e-1
"""Between these dt starts, evenly in its logarithm, as in Mamba-2."""


@dataclass(frozen=True)
class MambaShape:
    """The sizes of a mixer: heads of d_head channels with a state of d_state each; heads in one group share B and C.

    conv_width: positions that the convolution sees. chunk_size: positions that are computed as one product.
    """

    d_model: int
    n_heads: int
    d_head: int
    d_state: int
    n_groups: int = 1
    conv_width: int = 4
    chunk_size: int = 64

    @property
    def d_inner(self) -> int:
        """Channels of x, and of the gate z."""
        return self.n_heads * self.d_head

    @property
    def mixed(self) -> int:
        """Channels that go through the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def projected(self) -> int:
        """Rows of `in_proj`: z, then x, B and C, then one dt a head."""
        return self.d_inner + self.mixed + self.n_heads


class StateSpace(nn.Module):
    """x, B and C through a causal convolution and SiLU, then `y_t = S_t C_t + D x_t` of the state that they write.

    conv_weight [channels, width], conv_bias [channels], A_log, D, dt_bias [heads]: none of them a vector of the hidden
    state, so none lives on the sphere; they have no weight decay. Positions enter by order alone. `scan` computes the
    recurrence of a sequence; it can be replaced by another function with its arguments, such as `state_space.chunked`.
    """

    role = "gain"

    def __init__(self, shape: MambaShape) -> None:
        super().__init__()
        self.shape, self.scan = shape, scan
        self.conv_weight = nn.Parameter(torch.empty(shape.mixed, shape.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(shape.mixed))
        self.A_log = nn.Parameter(torch.empty(shape.n_heads))
        self.D = nn.Parameter(torch.empty(shape.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.n_heads))

    @torch.no_grad()
    def init_weights(self) -> None:
        """As Mamba-2 starts: A uniform in [-16, -1], softplus(dt_bias) from 0.001 to 0.1, D one,
        the convolution uniform.
        """
        bound = 1 / math.sqrt(self.shape.conv_width)
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.zeros_(self.conv_bias)
        self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        self.dt_bias.uniform_(math.log(SLOWEST), math.log(FASTEST)).exp_()
        self.dt_bias.add_(torch.log(-torch.expm1(-self.dt_bias)))  # softplus backwards

    def forward(self, xbc: Tensor, dt: Tensor, cache: StateCache | None = None, since: Tensor | None = None) -> Tensor:
        """[batch, seq, mixed] and [batch, seq, heads] -> [batch, seq, d_inner]; with a cache, only the new positions.

        since: int64 [batch, seq], how many positions ahead of each belong to its text: at 0 a text begins;
        None: one continues.
        """
        shape, wide = self.shape, torch.promote_types(xbc.dtype, torch.float32)
        before, state = self._start(xbc, wide) if cache is None or cache.empty else cache.read()
        mixed = causal_convolution(xbc, self.conv_weight.to(xbc.dtype), self.conv_bias.to(xbc.dtype), before, since)
        x, b, c = F.silu(mixed).split((shape.d_inner, *[shape.n_groups * shape.d_state] * 2), dim=-1)
        x = x.unflatten(-1, (shape.n_heads, -1))
        b, c = b.unflatten(-1, (shape.n_groups, -1)), c.unflatten(-1, (shape.n_groups, -1))
        dt, rate = F.softplus(dt.to(wide) + self.dt_bias.to(wide)), -self.A_log.to(wide).exp()
        begins = None if since is None else since == 0
        if x.shape[1] == 1:
            y, state = recurrent(x, dt, rate, b, c, state, begins)
        else:
            y, state = self.scan(x, dt, rate, b, c, state, shape.chunk_size, begins)
        if cache is not None:
            cache.write(torch.cat((before, xbc), dim=1)[:, 1 - shape.conv_width :], state, xbc.shape[1])
        # Channel by channel, as the convolution leaves x, is what compiled code must not get to read
        # (`train.precision`).
        return (y + x * self.D.to(x.dtype).unsqueeze(-1)).flatten(2).contiguous()

    def _start(self, xbc: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Nothing read: no input of the convolution, and an empty state."""
        shape, batch = self.shape, xbc.shape[0]
        before = xbc.new_zeros(batch, shape.conv_width - 1, shape.mixed)
        return before, xbc.new_zeros(batch, shape.n_heads, shape.d_head, shape.d_state, dtype=wide)


class GatedRMSNorm(nn.Module):
    """`RMSNorm(y SiLU(z)) * gain`, over each group's channels (Mamba-2's inner norm), with a learned gain [d_inner]."""

    role, start = "gain", RMSNorm.start

    def __init__(self, shape: MambaShape, eps: float = 1e-6) -> None:
        super().__init__()
        self.n_groups, self.eps = shape.n_groups, eps
        self.weight = nn.Parameter(torch.ones(shape.d_inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[..., d_inner] twice -> the same, reduced in float32."""
        gated = (y * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)
        return normed * self.weight.to(y.dtype)


class Mamba2(nn.Module):
    """The baseline's mixer: `W_out RMSNorm(SSM(x, B, C, dt) SiLU(z))` with `z, x, B, C, dt = W_in h`.

    Weights `in_proj` [projected, d_model], `out_proj` [d_model, d_inner]; the rest is `StateSpace`'s.
    """

    reads = ("cache", "since")

    def __init__(self, shape: MambaShape) -> None:
        super().__init__()
        self.sizes = (shape.d_inner, shape.mixed, shape.n_heads)
        self.in_proj = Linear(shape.d_model, shape.projected)
        self.ssm = StateSpace(shape)
        self.norm = GatedRMSNorm(shape)
        self.out_proj = Linear(shape.d_inner, shape.d_model, writes=True)

    def forward(self, h: Tensor, cache: StateCache | None = None, since: Tensor | None = None) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]; cache, since: as for `StateSpace`."""
        z, xbc, dt = self.in_proj(h).split(self.sizes, dim=-1)
        return self.out_proj(self.norm(self.ssm(xbc, dt, cache, since), z))


class UnitMamba2(nn.Module):
    """Mamba-2 on the sphere: `W_out (SSM(x, B, C, dt) SiLU(z))` with `z, x, B, C, dt = s_mamba sqrt(d_model) W_in h`.

    Unit rows of `in_proj`, unit columns of `out_proj`; no inner norm, for the step on the sphere normalizes what comes
    out. A unit row times a unit h has entries of the order of 1/sqrt(d_model): as in nGPT's MLP (eq. 21) the factor
    brings them to where SiLU and softplus bend, and `s_mamba`, one learned number, says how far. Both are folded into
    the weight. inner_norm: whether what `out_proj` reads is normalized, all heads together (FNGPT, arXiv 2605.06067).
    """

    reads = ("cache", "since")

    def __init__(self, shape: MambaShape, s_mamba: Scale, inner_norm: bool = False) -> None:
        super().__init__()
        self.sizes, self.input_gain = (shape.d_inner, shape.mixed, shape.n_heads), math.sqrt(shape.d_model)
        self.in_proj = UnitLinear(shape.d_model, shape.projected)
        self.ssm = StateSpace(shape)
        self.out_proj = UnitLinear(shape.d_inner, shape.d_model, writes=True)
        self.s_mamba, self.inner = s_mamba, INNER_NORMS[inner_norm]

    def forward(self, h: Tensor, cache: StateCache | None = None, since: Tensor | None = None) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized; cache, since: as for `StateSpace`."""
        z, xbc, dt = self.in_proj(h, self.s_mamba() * self.input_gain).split(self.sizes, dim=-1)
        return self.out_proj(self.inner(self.ssm(xbc, dt, cache, since) * F.silu(z)))
