"""GPT as an encoder-decoder."""

from __future__ import annotations

from torch import Tensor, nn

from .configuration_spherelm import SphereLMConfig
from .modeling_gpt import GPTModel, linear, rms_norm
from .seq2seq import CrossAttentionPart, Seq2SeqModel, SphereSeq2SeqLM


class CrossAttention(CrossAttentionPart):
    """`W_o softmax(q k^T / sqrt(d_k)) v`; queries and keys pass an RMSNorm where the config says so."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.head_dim**-0.5, is_causal=False)
        kv_width, normed = self.n_kv_heads * self.d_k, config.start["qk_norm"]
        self.q, self.k = linear(config.d_model, config.d_model), linear(config.d_model, kv_width)
        self.v, self.o = linear(config.d_model, kv_width), linear(config.d_model, config.d_model)
        self.q_norm, self.k_norm = (rms_norm(self.d_k) if normed else nn.Identity() for _ in range(2))

    def queries(self, q: Tensor) -> Tensor:
        return self.q_norm(q)

    def keys(self, k: Tensor) -> Tensor:
        return self.k_norm(k)


class GPTSeq2SeqModel(Seq2SeqModel, GPTModel):
    """The encoder-decoder without its logits."""

    parts = GPTModel.parts | {"C": CrossAttention}
    source_norm = staticmethod(rms_norm)


class GPTSeq2SeqLM(SphereSeq2SeqLM):
    """The encoder-decoder."""

    model_class = GPTSeq2SeqModel
