"""The baseline of the nGPT paper (arXiv 2410.01131): a pre-norm GPT with RMSNorm, rotary embedding and SwiGLU.

Numbers of equations are the paper's. Written by spherelm for people to read; it needs torch and transformers.
Copyright the spherelm authors. Licensed under the Apache License, Version 2.0:
http://www.apache.org/licenses/LICENSE-2.0
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_spherelm import SphereLMConfig
from .modeling_spherelm import (
    ROTATIONS,
    AttentionPart,
    SphereLMForCausalLM,
    SphereLMModel,
    eager_attention,
    split_heads,
)


def rms_norm(width: int, gain: bool = True) -> nn.RMSNorm:
    """`x / rms(x)`, times a learned gain that a folded model has in its matrices."""
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=gain)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A product without bias."""
    return nn.Linear(in_features, out_features, bias=False)


class Residual(nn.Module):
    """A sublayer: `h + part(RMSNorm(h))` (eqs. 4, 5)."""

    def __init__(self, config: SphereLMConfig, part: nn.Module) -> None:
        super().__init__()
        self.norm, self.part = rms_norm(config.d_model, gain=not config.folded), part

    def forward(self, h: Tensor, **around: Any) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        made, _ = self.part(self.norm(h), **around)
        return h + made


class Attention(AttentionPart):
    """`W_o softmax(q k^T / sqrt(d_k)) v`; queries and keys pass an RMSNorm
    where the config says so, and are rotated.
    """

    def __init__(self, config: SphereLMConfig, layer_idx: int, is_causal: bool = True) -> None:
        super().__init__(config, layer_idx, config.head_dim**-0.5, is_causal)
        kv_width, normed = self.n_kv_heads * self.d_k, config.start["qk_norm"]
        self.rotate = ROTATIONS[config.rope]
        self.q, self.k = linear(config.d_model, config.d_model), linear(config.d_model, kv_width)
        self.v, self.o = linear(config.d_model, kv_width), linear(config.d_model, config.d_model)
        self.q_norm, self.k_norm = (rms_norm(self.d_k) if normed else nn.Identity() for _ in range(2))

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, heads, seq, d_k] of each -> the same."""
        return self.q_norm(q), self.k_norm(k)

    def forward(
        self,
        h: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, seq, d_model] -> the same, and the attention weights where the attention function has them."""
        q, k, v = self.q(h), self.k(h), self.v(h)
        q, k, v = (split_heads(x, self.d_k) for x in (q, k, v))
        q, k = (self.rotate(x, table) for x in self.normed(q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        made, weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o(made.reshape(*h.shape[:-1], -1)), weights


class FeedForward(nn.Module):
    """SwiGLU: `W_o (u * SiLU(v))` with `u = W_u h`, `v = W_v h` (eqs. 17 to 19)."""

    def __init__(self, config: SphereLMConfig, layer_idx: int | None = None, width: int | None = None) -> None:
        super().__init__()
        d_ff = width or config.d_ff
        self.u, self.v, self.o = (
            linear(config.d_model, d_ff),
            linear(config.d_model, d_ff),
            linear(d_ff, config.d_model),
        )

    def forward(self, h: Tensor, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        return self.o(self.u(h) * F.silu(self.v(h))), None


class SquaredReLU(nn.Module):
    """An MLP without a gate: `W_o relu(W_u h)^2`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int | None = None, width: int | None = None) -> None:
        super().__init__()
        d_ff = width or config.d_ff
        self.u, self.o = linear(config.d_model, d_ff), linear(d_ff, config.d_model)

    def forward(self, h: Tensor, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        return self.o(self.u(h).relu().square()), None


MLPS: dict[str, Any] = {"swiglu": FeedForward, "relu2": SquaredReLU}


class Head(nn.Module):
    """Logits `RMSNorm(h) E_out^T` (eq. 3); the model itself ends with the norm."""

    def __init__(self, config: SphereLMConfig) -> None:
        super().__init__()
        self.norm = rms_norm(config.d_model, gain=not config.folded)
        if not config.folded:
            self.linear = linear(config.d_model, config.vocab_size)

    def forward(self, h: Tensor) -> Tensor:
        """Normalized states [..., d_model] -> logits [..., vocab]."""
        return self.linear(h)


def tensor_parallel(config: SphereLMConfig) -> dict[str, str]:
    """How matrices are cut among processes, for transformers and vLLM."""
    inner = "uv" if config.activation == "swiglu" else "u"
    columns = [*(f"attention.part.{name}" for name in "qkv"), *(f"mlp.part.{name}" for name in inner)]
    rows = ("attention.part.o", "mlp.part.o")
    return {f"blocks.*.{name}": "rowwise" if name in rows else "colwise" for name in (*columns, *rows)}


class GPTModel(SphereLMModel):
    """GPT without its logits."""

    parts = {"A": Attention, "-": lambda config, *rest: MLPS[config.activation](config, *rest)}
    sublayer, embedding, head_class = Residual, nn.Embedding, Head

    def __init__(self, config: SphereLMConfig) -> None:
        config.base_model_tp_plan = tensor_parallel(config)
        super().__init__(config)


class GPTForCausalLM(SphereLMForCausalLM):
    """GPT as a language model."""

    model_class = GPTModel
