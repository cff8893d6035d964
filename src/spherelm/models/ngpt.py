"""The normalized Transformer, nGPT (Loshchilov et al., arXiv 2410.01131).
Read beside `gpt.py`: the difference is the paper.

| weight | unit vectors | starts as |
|---|---|---|
| matrices that read the hidden state, all embeddings among them | each row | N(0, 1/sqrt(d_model)), then normalized |
| matrices that write to it | each column | N(0, 1/sqrt(d_model)), then normalized |
| a router's matrix | none | N(0, 1/sqrt(d_model)) |
| learned scales | none | their effective `init` |
| a mixer's convolution, `A_log`, `D`, `dt_bias` | none | as Mamba-2's (`layers.mamba2.StateSpace`) |
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from spherelm.layers.attention import UnitAttention
from spherelm.layers.cross_attention import UnitCrossAttention
from spherelm.layers.feedforward import UNIT_MLPS, UnitFeedForward, UnitSquaredReLU
from spherelm.layers.linear import UnitEmbedding, UnitLinear, retract
from spherelm.layers.mamba2 import UnitMamba2
from spherelm.layers.moe import UNIT_MIXTURES, UnitMixtureOfExperts
from spherelm.layers.readout import Readout, reading
from spherelm.layers.rope import ROPES
from spherelm.models.config import NGPTConfig
from spherelm.models.kit import Kit, Surroundings, router_of
from spherelm.models.start import share_direction, starting
from spherelm.models.variants import SIGNS, STEPS
from spherelm.sphere import norm


class Step(nn.Module):
    """`h <- Norm(h + alpha (Norm(part(h)) - h))` (eqs. 10, 11)."""

    def __init__(self, config: NGPTConfig, part: nn.Module) -> None:
        super().__init__()
        self.alpha = config.learned(config.alpha, config.d_model)
        self.step, self.sign = STEPS[config.variant.step], SIGNS[config.variant.alpha_sign]
        self.part = part

    def forward(self, h: Tensor, around: Surroundings) -> Tensor:
        """Unit vectors [batch, seq, d_model] -> the same."""
        return self.step(h, norm(self.part(h, *around.for_part(self.part))), self.sign(self.alpha()))


def attention(config: NGPTConfig) -> UnitAttention:
    """The part A."""
    s_qk, norms = config.learned(config.s_qk, config.n_heads, config.d_k), config.variant.norms
    return UnitAttention(config.d_model, config.n_heads, config.kv_heads, s_qk, ROPES[config.rope], *norms)


def cross_attention(config: NGPTConfig) -> UnitCrossAttention:
    """The part C."""
    s_qk = config.learned(config.s_qk, config.n_heads, config.d_k)
    return UnitCrossAttention(config.d_model, config.n_heads, config.kv_heads, s_qk, *config.variant.norms)


def mlp(config: NGPTConfig, width: int | None = None) -> UnitFeedForward | UnitSquaredReLU:
    """The part -."""
    d_ff = width or config.ff_width
    scales = (config.learned(s, d_ff) for s in config.mlp_scales)
    return UNIT_MLPS[config.activation](config.d_model, d_ff, *scales, inner_norm=config.variant.inner_norm)


def mixer(config: NGPTConfig) -> UnitMamba2:
    """The part M."""
    return UnitMamba2(config.mamba, config.learned(config.s_mamba, 1), config.variant.inner_norm)


def experts(config: NGPTConfig) -> UnitMixtureOfExperts:
    """The part O."""
    width, sizes = config.expert_width, config.experts
    shared = (mlp(config, width) for _ in range(sizes.n_shared_experts))
    scales = (config.learned(config.s_moe, 1), *(config.learned(s, sizes.n_experts, width) for s in config.mlp_scales))
    make, inner_norm = UNIT_MIXTURES[config.activation], config.variant.inner_norm
    return make(config.d_model, width, router_of(config), *scales, shared=shared, inner_norm=inner_norm)


def source_norm(config: NGPTConfig) -> nn.Identity:
    """An encoder's last state as it is: a unit vector."""
    return nn.Identity()


class Head(nn.Module):
    """Logits `z = s_z (h E_out^T)`: cosines, with one learned scale per vocabulary entry (eq. 3)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        self.linear = UnitLinear(config.d_model, config.vocab_size, role="output_embedding")
        self.s_z = config.learned(config.s_z, config.vocab_size)
        self.reading = reading(config.logit_preconditioning)

    def forward(self, h: Tensor) -> Readout:
        """Unit vectors [..., d_model] -> what the logits are computed from."""
        return self.reading(h, self.linear, self.s_z())


def draw(model: Any) -> None:
    """Initialize every weight of `model` again from the distributions in this module's docstring."""
    for module in starting(model):
        module.start(1 / math.sqrt(model.config.d_model))
    retract(model)
    share_direction(model, model.config.common_start)


KIT = Kit(UnitEmbedding, Step, attention, cross_attention, mlp, mixer, experts, source_norm, Head, draw)
