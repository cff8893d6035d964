"""The SwiGLU feed-forward block, plain and on the sphere."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.layers.linear import Linear, Scale, UnitLinear


class FeedForward(nn.Module):
    """The baseline's MLP: `W_o (u * SiLU(v))` with `u = W_u h`, `v = W_v h` (nGPT paper, eqs. 17-19).

    Weights `u`, `v` [d_ff, d_model], `o` [d_model, d_ff].
    """

    reads: tuple[str, ...] = ()

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.u = Linear(d_model, d_ff)
        self.v = Linear(d_model, d_ff)
        self.o = Linear(d_ff, d_model, writes=True)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]."""
        return self.o(self.u(h) * F.silu(self.v(h)))


class UnitFeedForward(nn.Module):
    """nGPT's MLP: `u` is scaled by `s_u`, `v` by `s_v sqrt(d_model)` before the gate (eqs. 20, 21).

    Unit rows of `u` and `v`, unit columns of `o`; `s_u`, `s_v` [d_ff]. A unit row times a unit h has entries of the order
    of 1/sqrt(d_model): the factor lets `v` reach the part of SiLU that bends. Both scales are folded into the weights.
    """

    reads: tuple[str, ...] = ()

    def __init__(self, d_model: int, d_ff: int, s_u: Scale, s_v: Scale) -> None:
        super().__init__()
        self.gate_gain = math.sqrt(d_model)
        self.u = UnitLinear(d_model, d_ff)
        self.v = UnitLinear(d_model, d_ff)
        self.o = UnitLinear(d_ff, d_model, writes=True)
        self.s_u, self.s_v = s_u, s_v

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized."""
        return self.o(self.u(h, self.s_u()) * F.silu(self.v(h, self.s_v() * self.gate_gain)))
