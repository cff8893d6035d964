"""The baseline of hybrids: pre-norm layers of several kinds, in the order that a pattern gives. Read beside `nhybrid.py`.

`Hybrid` with the pattern "A-A-" is `GPT` with two layers.

| weight | starts as |
|---|---|
| every matrix, a router's and both embeddings among them | N(0, 0.02) |
| output matrices (`o` of attention, MLP and experts, mixer `out_proj`) | N(0, 0.02 / sqrt(n_layers)) |
| RMSNorm gains | 1 |
| a mixer's convolution, `A_log`, `D`, `dt_bias` | as Mamba-2's (`layers.mamba2.StateSpace`) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from spherelm.layers.attention import Attention
from spherelm.layers.cache import LayerCache
from spherelm.layers.feedforward import FeedForward
from spherelm.layers.linear import Embedding, Linear
from spherelm.layers.mamba2 import Mamba2, StateSpace
from spherelm.layers.moe import MixtureOfExperts, Router
from spherelm.layers.readout import Readout
from spherelm.layers.rope import ROPES, RotaryTable
from spherelm.models.gpt import GPTConfig, RMSNorm
from spherelm.models.pattern import (
    NAMES,
    READS,
    PatternFields,
    PatternModel,
    Surroundings,
    check_pattern,
    expert_width,
    mamba_shape,
    router_of,
)


@dataclass(frozen=True)
class HybridConfig(PatternFields, GPTConfig):
    """The shape of a `Hybrid`: `GPTConfig` and `PatternFields`; n_layers counts letters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self)


def attention_layer(config: HybridConfig) -> nn.Module:
    """The layer A."""
    n_kv_heads, rotation = config.n_kv_heads or config.n_heads, ROPES[config.rope].rotation
    return Attention(config.d_model, config.n_heads, n_kv_heads, rotation)


def experts_layer(config: HybridConfig) -> nn.Module:
    """The layer O."""
    width = expert_width(config)
    shared = (FeedForward(config.d_model, width) for _ in range(config.n_shared_experts))
    return MixtureOfExperts(config.d_model, width, router_of(config), shared)


LAYERS = {
    "M": lambda config: Mamba2(mamba_shape(config)),
    "A": attention_layer,
    "-": lambda config: FeedForward(config.d_model, config.d_ff or 4 * config.d_model),
    "O": experts_layer,
}
"""What makes the layer of each letter."""


class HybridBlock(nn.Module):
    """`h <- h + LAYER(RMSNorm(h))` for the layer of one letter."""

    def __init__(self, config: HybridConfig, letter: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=1e-6)
        self.add_module(NAMES[letter], LAYERS[letter](config))
        self.read = READS[letter]

    def forward(
        self,
        h: Tensor,
        table: RotaryTable,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        since: Tensor | None = None,
    ) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        return h + self.read(self, self.norm(h), Surroundings(table, mask, cache, since))


class Hybrid(PatternModel):
    """The baseline: logits `z = RMSNorm(h) E_out^T` (nGPT, eq. 3)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        self.pattern = config.pattern
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(HybridBlock(config, letter) for letter in config.pattern)
        self.norm = RMSNorm(config.d_model, eps=1e-6)
        self.head = Linear(config.d_model, config.vocab_size, role="output_embedding")
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_std = config.init_std
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every weight anew from the distributions in this module's docstring."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                shrink = math.sqrt(len(self.blocks)) if name.endswith((".o.weight", ".out_proj.weight")) else 1
                nn.init.normal_(parameter, std=self.init_std / shrink)
        for module in self.modules():
            if isinstance(module, StateSpace):
                module.init_weights()
            elif isinstance(module, Router):
                module.reset_balance()

    def readout(self, h: Tensor) -> Readout:
        return Readout(self.norm(h), self.head.scaled_weight())
