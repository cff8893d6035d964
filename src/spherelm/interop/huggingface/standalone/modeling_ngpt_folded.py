"""nGPT for servers."""

from __future__ import annotations

from .configuration_spherelm import FoldedConfig
from .folded import FoldedForCausalLM
from .modeling_ngpt import NGPTModel


class FoldedNGPTModel(NGPTModel):
    """nGPT without its logits."""

    config_class = FoldedConfig


class FoldedNGPTForCausalLM(FoldedForCausalLM):
    """nGPT as a language model."""

    model_class = FoldedNGPTModel
