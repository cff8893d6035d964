"""The baseline of the nGPT paper: a pre-norm GPT with RMSNorm, rotary embedding and SwiGLU. Read beside `ngpt.py`.

| weight | starts as |
|---|---|
| every matrix, both embeddings | N(0, 0.02) |
| output matrices (attention `o`, MLP `o`) | N(0, 0.02 / sqrt(2 n_layers)) |
| RMSNorm gains | 1 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.layers.attention import Attention
from spherelm.layers.cache import LayerCache
from spherelm.layers.feedforward import FeedForward
from spherelm.layers.linear import Embedding, Linear
from spherelm.layers.readout import Readout
from spherelm.layers.rope import ROPES, RotaryTable
from spherelm.models.decoder import LanguageModel, check_shape


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a `GPT`. `None` for `n_kv_heads` means n_heads, for `d_ff` 4 d_model.

    rope: "standard", "nvidia" for the formula that NVIDIA/ngpt's checkpoints were trained with, or "none" for no positions.
    """

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_seq_len: int = 1024
    rope_base: float = 10000.0
    rope: str = "standard"
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_shape(self)
        if not self.init_std > 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * gain` over the last axis, with a learned gain [d_model], reduced in float32."""

    role = "gain"

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> the same."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def draw_plain(model: nn.Module, std: float, added: int) -> None:
    """Draw every matrix of `model` anew, N(0, std), and with std / sqrt(added) those whose results go into the residual."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std / math.sqrt(added) if name.endswith(".o.weight") else std)


class GPTBlock(nn.Module):
    """`h <- h + ATTN(RMSNorm(h))`, then `h <- h + MLP(RMSNorm(h))` (eqs. 4, 5)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.norm_a, self.norm_m = RMSNorm(d, eps=1e-6), RMSNorm(d, eps=1e-6)
        n_kv_heads, rotation = config.n_kv_heads or config.n_heads, ROPES[config.rope].rotation
        self.attention = Attention(d, config.n_heads, n_kv_heads, rotation)
        self.mlp = FeedForward(d, config.d_ff or 4 * d)

    def forward(
        self, h: Tensor, table: RotaryTable, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        h = h + self.attention(self.norm_a(h), table, mask, cache)
        h = h + self.mlp(self.norm_m(h))
        return h


class GPT(LanguageModel):
    """The baseline: logits `z = RMSNorm(h) E_out^T` (eq. 3)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=1e-6)
        self.head = Linear(config.d_model, config.vocab_size, role="output_embedding")
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_std = config.init_std
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every weight anew from the distributions in this module's docstring."""
        draw_plain(self, self.init_std, 2 * len(self.blocks))

    def readout(self, h: Tensor) -> Readout:
        return Readout(self.norm(h), self.head.scaled_weight().to(h.dtype))
