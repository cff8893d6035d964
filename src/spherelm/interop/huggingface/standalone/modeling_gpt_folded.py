"""GPT for servers."""

from __future__ import annotations

from torch import Tensor

from .configuration_spherelm import FoldedConfig
from .folded import FoldedForCausalLM
from .modeling_gpt import Attention, GPTModel


class FoldedAttention(Attention):
    """Names of norms do not begin as those of matrices: where vLLM merges `q`, it takes `q_norm` for a part of it."""

    def __init__(self, config: FoldedConfig, layer_idx: int, is_causal: bool = True) -> None:
        super().__init__(config, layer_idx, is_causal)
        self.norm_q, self.norm_k = self.q_norm, self.k_norm
        del self.q_norm, self.k_norm

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_q(q), self.norm_k(k)


class FoldedGPTModel(GPTModel):
    """GPT without its logits."""

    config_class = FoldedConfig
    parts = {**GPTModel.parts, "A": FoldedAttention}


class FoldedGPTForCausalLM(FoldedForCausalLM):
    """GPT as a language model."""

    model_class = FoldedGPTModel
