"""The baseline: a pre-norm GPT with RMSNorm, rotary embedding and SwiGLU.
Read beside `ngpt.py`: the difference is the paper.

| weight | starts as |
|---|---|
| matrices that read the hidden state, a router's and all embeddings among them | N(0, init_std), 0.02 in the paper |
| matrices that write to it, in a stack of so many sublayers | N(0, init_std / sqrt(sublayers)) |
| RMSNorm gains | 1 |
| a mixer's convolution, `A_log`, `D`, `dt_bias` | as Mamba-2's (`layers.mamba2.StateSpace`) |
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from spherelm.layers.attention import Attention
from spherelm.layers.cross_attention import CrossAttention
from spherelm.layers.feedforward import MLPS, FeedForward, SquaredReLU
from spherelm.layers.linear import Embedding, Linear
from spherelm.layers.mamba2 import Mamba2
from spherelm.layers.moe import MIXTURES, MixtureOfExperts
from spherelm.layers.readout import Readout
from spherelm.layers.rmsnorm import RMSNorm
from spherelm.layers.rope import ROPES
from spherelm.models.config import GPTConfig
from spherelm.models.kit import Kit, Surroundings, router_of
from spherelm.models.start import depths_of, starting


class Residual(nn.Module):
    """`h <- h + part(RMSNorm(h))` (eqs. 4, 5)."""

    def __init__(self, config: GPTConfig, part: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.part = part

    def forward(self, h: Tensor, around: Surroundings) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        return h + self.part(self.norm(h), *around.for_part(self.part))


def attention(config: GPTConfig) -> Attention:
    """The part A."""
    return Attention(config.d_model, config.n_heads, config.kv_heads, ROPES[config.rope].rotation, config.qk_norm)


def cross_attention(config: GPTConfig) -> CrossAttention:
    """The part C."""
    return CrossAttention(config.d_model, config.n_heads, config.kv_heads, config.qk_norm)


def mlp(config: GPTConfig, width: int | None = None) -> FeedForward | SquaredReLU:
    """The part -."""
    return MLPS[config.activation](config.d_model, width or config.ff_width)


def mixer(config: GPTConfig) -> Mamba2:
    """The part M."""
    return Mamba2(config.mamba)


def experts(config: GPTConfig) -> MixtureOfExperts:
    """The part O."""
    width, sizes = config.expert_width, config.experts
    shared = (mlp(config, width) for _ in range(sizes.n_shared_experts))
    return MIXTURES[config.activation](config.d_model, width, router_of(config), shared)


def source_norm(config: GPTConfig) -> RMSNorm:
    """`RMSNorm(h)` of an encoder's last state."""
    return RMSNorm(config.d_model)


class Head(nn.Module):
    """Logits `z = RMSNorm(h) E_out^T` (eq. 3)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.d_model, config.vocab_size, role="output_embedding")
        self.norm = RMSNorm(config.d_model)

    def forward(self, h: Tensor) -> Readout:
        """[..., d_model] -> what the logits are computed from."""
        return Readout(self.norm(h), self.linear.scaled_weight().to(h.dtype))


def draw(model: Any) -> None:
    """Initialize every weight of `model` again from the distributions in this module's docstring."""
    depths, drawn = depths_of(model), set()
    for module in starting(model):
        if id(module.weight) not in drawn:
            drawn.add(id(module.weight))
            module.start(model.config.init_std / math.sqrt(depths.get(id(module), 1)))


KIT = Kit(Embedding, Residual, attention, cross_attention, mlp, mixer, experts, source_norm, Head, draw)
