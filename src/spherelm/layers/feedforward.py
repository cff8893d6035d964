"""The feed-forward block, SwiGLU or squared ReLU, plain and on the sphere."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.layers.linear import INNER_NORMS, Linear, Scale, UnitLinear


class FeedForward(nn.Module):
    """The baseline's MLP: `W_o (u * SiLU(v))` with `u = W_u h`, `v = W_v h` (nGPT paper, eqs. 17-19).

    Weights `u`, `v` [d_ff, d_model], `o` [d_model, d_ff]. reading: the matrices that read the hidden state, each of
    which has a learned scale on the sphere. widening: d_ff over d_model where a config does not say it.
    """

    reads: tuple[str, ...] = ()
    reading: tuple[str, ...] = ("u", "v")
    widening = 4

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.u = Linear(d_model, d_ff)
        self.v = Linear(d_model, d_ff)
        self.o = Linear(d_ff, d_model, writes=True)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]."""
        return self.o(self.u(h) * F.silu(self.v(h)))


class SquaredReLU(nn.Module):
    """The baseline's MLP without a gate: `W_o relu(W_u h)^2` (Primer, arXiv 2109.08668).

    Weights `u` [d_ff, d_model], `o` [d_model, d_ff].
    """

    reads: tuple[str, ...] = ()
    reading: tuple[str, ...] = ("u",)
    widening = 3

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.u = Linear(d_model, d_ff)
        self.o = Linear(d_ff, d_model, writes=True)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model]."""
        return self.o(F.relu(self.u(h)).square())


class UnitFeedForward(nn.Module):
    """nGPT's MLP: `u` is scaled by `s_u`, `v` by `s_v sqrt(d_model)` before the gate (eqs. 20, 21).

    Unit rows of `u` and `v`, unit columns of `o`; `s_u`, `s_v` [d_ff]. A unit row times a unit h has entries of the
    order of 1/sqrt(d_model): the factor lets `v` reach the part of SiLU that bends. Both scales are folded
    into the weights.
    inner_norm: whether what `o` reads is normalized (FNGPT, arXiv 2605.06067).
    """

    reads: tuple[str, ...] = ()

    def __init__(self, d_model: int, d_ff: int, s_u: Scale, s_v: Scale, *, inner_norm: bool = False) -> None:
        super().__init__()
        self.gate_gain = math.sqrt(d_model)
        self.u = UnitLinear(d_model, d_ff)
        self.v = UnitLinear(d_model, d_ff)
        self.o = UnitLinear(d_ff, d_model, writes=True)
        self.s_u, self.s_v, self.inner = s_u, s_v, INNER_NORMS[inner_norm]

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized."""
        return self.o(self.inner(self.u(h, self.s_u()) * F.silu(self.v(h, self.s_v() * self.gate_gain))))


class UnitSquaredReLU(nn.Module):
    """`SquaredReLU` on the sphere: `W_o relu(s_u sqrt(d_model) W_u h)^2` (arXiv 2605.06067).

    Unit rows of `u`, unit columns of `o`; `s_u` [d_ff], folded into the weight with its factor. inner_norm: as in
    `UnitFeedForward`.
    """

    reads: tuple[str, ...] = ()

    def __init__(self, d_model: int, d_ff: int, s_u: Scale, *, inner_norm: bool = False) -> None:
        super().__init__()
        self.input_gain = math.sqrt(d_model)
        self.u = UnitLinear(d_model, d_ff)
        self.o = UnitLinear(d_ff, d_model, writes=True)
        self.s_u, self.inner = s_u, INNER_NORMS[inner_norm]

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> [batch, seq, d_model], not normalized."""
        return self.o(self.inner(F.relu(self.u(h, self.s_u() * self.input_gain)).square()))


MLPS: dict[str, type[FeedForward | SquaredReLU]] = {"swiglu": FeedForward, "relu2": SquaredReLU}
UNIT_MLPS: dict[str, type[UnitFeedForward | UnitSquaredReLU]] = {
    "swiglu": UnitFeedForward,
    "relu2": UnitSquaredReLU,
}
"""By the name of the activation, the MLP of each arm."""
