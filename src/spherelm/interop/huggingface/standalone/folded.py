"""A language model for servers, such as vLLM: learned scales and gains are inside its matrices, as far as they can be.

The rest is plain products, norms and attention, and a head that is one matrix, `lm_head`. It is not trained.
"""

from __future__ import annotations

from torch import Tensor, nn

from .configuration_spherelm import FoldedConfig
from .modeling_spherelm import SphereLMForCausalLM


class FoldedForCausalLM(SphereLMForCausalLM):
    """As `SphereLMForCausalLM`, its logits by `lm_head`."""

    config_class = FoldedConfig
    _tied_weights_keys = None

    def __init__(self, config: FoldedConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def read(self, h: Tensor) -> Tensor:
        return self.lm_head(h)
