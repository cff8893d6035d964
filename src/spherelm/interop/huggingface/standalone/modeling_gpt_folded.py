"""GPT for servers."""

from __future__ import annotations

from .configuration_spherelm import FoldedConfig
from .folded import FoldedForCausalLM
from .modeling_gpt import GPTModel


class FoldedGPTModel(GPTModel):
    """GPT without its logits."""

    config_class = FoldedConfig


class FoldedGPTForCausalLM(FoldedForCausalLM):
    """GPT as a language model."""

    model_class = FoldedGPTModel
