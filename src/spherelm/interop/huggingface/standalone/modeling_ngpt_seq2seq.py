"""nGPT as an encoder-decoder, which its paper calls a straightforward extension."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .configuration_spherelm import SphereLMConfig
from .modeling_ngpt import NGPTModel, Scale, UnitLinear, inner_norm, norm
from .seq2seq import CrossAttentionPart, Seq2SeqModel, SphereSeq2SeqLM


class UnitCrossAttention(CrossAttentionPart):
    """Queries and keys are unit vectors per head, scaled by an `s_qk` of their own, as in `UnitAttention`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, math.sqrt(config.head_dim), is_causal=False)
        kv_width = self.n_kv_heads * self.d_k
        self.unit = norm if config.start["variant"]["qk_norm"] else torch.positive
        self.q, self.k = UnitLinear(config.d_model, config.d_model), UnitLinear(config.d_model, kv_width)
        self.v = UnitLinear(config.d_model, kv_width)
        self.o = UnitLinear(config.d_model, config.d_model, writes=True)
        self.s_qk, self.inner = Scale(config, "s_qk", config.n_heads, self.d_k), inner_norm(config)

    def queries(self, q: Tensor) -> Tensor:
        return self.unit(q) * self.s_qk.effective().square().unsqueeze(1).to(q.dtype)

    def keys(self, k: Tensor) -> Tensor:
        return self.unit(k)


class NGPTSeq2SeqModel(Seq2SeqModel, NGPTModel):
    """The encoder-decoder without its logits."""

    parts = NGPTModel.parts | {"C": UnitCrossAttention}
    source_norm = nn.Identity


class NGPTSeq2SeqLM(SphereSeq2SeqLM):
    """The encoder-decoder."""

    model_class = NGPTSeq2SeqModel
