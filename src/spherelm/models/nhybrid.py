"""Hybrids on the sphere ("Training nGPT", arXiv 2608.01284): a layer of any kind is one step. Read beside `hybrid.py`.

`NHybrid` with the pattern "A-A-" is `NGPT` with two layers.

| weight | shape | unit axis |
|---|---|---|
| `embed`, `head` | [vocab, d_model] | 1, each row |
| attention `q`, `k`, `v` | [heads*d_k, d_model] | 1, each row |
| attention `o` | [d_model, heads*d_k] | 0, each column |
| mixer `in_proj` (z, x, B, C and dt read the hidden state) | [projected, d_model] | 1, each row |
| mixer `out_proj` | [d_model, d_inner] | 0, each column |
| MLP `u`, `v` | [d_ff, d_model] | 1, each row |
| MLP `o` | [d_model, d_ff] | 0, each column |
| experts' `u`, `v` | [n_experts, d_ff, d_model] | 2, each row of each expert |
| experts' `o` | [n_experts, d_model, d_ff] | 1, each column of each expert |

Not normalized: `alpha` [d_model] of each layer, `s_qk`, `s_u`, `s_v`, `s_z`; of a mixer the convolution, `A_log`, `D`,
`dt_bias` and the learned number `s_mamba`; of a mixture the router's matrix and the learned number `s_moe`. Every matrix starts
as N(0, 1/sqrt(d_model)), and all but the routers' are normalized; learned scales start at their effective `init`, a mixer's
other parameters as Mamba-2's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from spherelm.layers.attention import UnitAttention
from spherelm.layers.cache import LayerCache
from spherelm.layers.feedforward import UnitFeedForward
from spherelm.layers.linear import Scale, UnitEmbedding, UnitLinear
from spherelm.layers.mamba2 import StateSpace, UnitMamba2
from spherelm.layers.moe import UnitMixtureOfExperts
from spherelm.layers.readout import Readout
from spherelm.layers.rope import ROPES, RotaryTable
from spherelm.models.ngpt import SIGNS, STEPS, NGPTConfig, draw_on_sphere, learned_scale, reading_of
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
from spherelm.sphere import norm


@dataclass(frozen=True)
class NHybridConfig(PatternFields, NGPTConfig):
    """The shape of an `NHybrid` and where its learned scales start: `NGPTConfig` and `PatternFields`; n_layers counts letters.

    s_mamba_init, s_mamba_scale, s_moe_init, s_moe_scale: of each mixer's and each router's number, as for the other scales.
    """

    s_mamba_init: float = 1.0
    s_mamba_scale: float = 1.0
    s_moe_init: float = 1.0
    s_moe_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self)
        for name in ("s_mamba_init", "s_mamba_scale", "s_moe_init", "s_moe_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def unit_attention_layer(config: NHybridConfig) -> nn.Module:
    """The layer A."""
    d, n_heads = config.d_model, config.n_heads
    s_qk = learned_scale(config, "s_qk", (n_heads, d // n_heads))
    return UnitAttention(d, n_heads, config.n_kv_heads or n_heads, s_qk, ROPES[config.rope], config.qk_norm)


def unit_mamba_layer(config: NHybridConfig) -> nn.Module:
    """The layer M."""
    return UnitMamba2(mamba_shape(config), Scale(1, config.s_mamba_init, config.s_mamba_scale))


def unit_mlp_layer(config: NHybridConfig) -> nn.Module:
    """The layer -."""
    d, d_ff = config.d_model, config.d_ff or 4 * config.d_model
    return UnitFeedForward(d, d_ff, learned_scale(config, "s_u", d_ff), learned_scale(config, "s_v", d_ff))


def unit_experts_layer(config: NHybridConfig) -> nn.Module:
    """The layer O."""
    d, width, bank = config.d_model, expert_width(config), (config.n_experts, expert_width(config))
    shared = (
        UnitFeedForward(d, width, learned_scale(config, "s_u", width), learned_scale(config, "s_v", width))
        for _ in range(config.n_shared_experts)
    )
    s_moe = Scale(1, config.s_moe_init, config.s_moe_scale)
    s_u, s_v = learned_scale(config, "s_u", bank), learned_scale(config, "s_v", bank)
    return UnitMixtureOfExperts(d, width, router_of(config), s_moe, s_u, s_v, shared)


UNIT_LAYERS = {"M": unit_mamba_layer, "A": unit_attention_layer, "-": unit_mlp_layer, "O": unit_experts_layer}
"""What makes the layer of each letter."""


class NHybridBlock(nn.Module):
    """`h <- Norm(h + alpha (Norm(LAYER(h)) - h))` for the layer of one letter (nGPT, eqs. 10, 11)."""

    def __init__(self, config: NHybridConfig, letter: str) -> None:
        super().__init__()
        self.step, self.sign = STEPS[config.step], SIGNS[config.alpha_sign]
        self.alpha = learned_scale(config, "alpha", config.d_model)
        self.add_module(NAMES[letter], UNIT_LAYERS[letter](config))
        self.read = READS[letter]

    def forward(
        self,
        h: Tensor,
        table: RotaryTable,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        since: Tensor | None = None,
    ) -> Tensor:
        """Unit vectors [batch, seq, d_model] -> the same."""
        proposal = self.read(self, h, Surroundings(table, mask, cache, since))
        return self.step(h, norm(proposal), self.sign(self.alpha()))


class NHybrid(PatternModel):
    """The normalized hybrid: logits `z = s_z (h E_out^T)` (nGPT, eq. 3)."""

    def __init__(self, config: NHybridConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        self.pattern = config.pattern
        self.embed = UnitEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(NHybridBlock(config, letter) for letter in config.pattern)
        self.head = UnitLinear(config.d_model, config.vocab_size, unit_axis=1, role="output_embedding")
        self.s_z = learned_scale(config, "s_z", config.vocab_size)
        self.reading, self.common_start = reading_of(config), config.common_start
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix anew and put it on the sphere; set the learned scales and the mixers to their start."""
        draw_on_sphere(self, self.config.d_model, self.common_start)
        for module in self.modules():
            if isinstance(module, StateSpace):
                module.init_weights()

    def readout(self, h: Tensor) -> Readout:
        return self.reading(h, self.head, self.s_z())
