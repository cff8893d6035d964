"""At home in Hugging Face transformers: `to_hf`, and the Auto classes once this is imported (see docs/huggingface.md)."""

from __future__ import annotations

import torch

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError("spherelm.interop.huggingface needs transformers: pip install 'spherelm[hf]'") from error

from spherelm.interop.huggingface.configuration import SphereLMConfig
from spherelm.interop.huggingface.modeling import SphereLMForCausalLM
from spherelm.models import Config, Decoder

__all__ = ["SphereLMConfig", "SphereLMForCausalLM", "to_hf"]

AutoConfig.register(SphereLMConfig.model_type, SphereLMConfig, exist_ok=True)
AutoModelForCausalLM.register(SphereLMConfig, SphereLMForCausalLM, exist_ok=True)
AutoTokenizer.register(SphereLMConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)


def to_hf(model: Decoder) -> SphereLMForCausalLM:
    """`model` as a `PreTrainedModel`: `save_pretrained`, `generate`, `Trainer`.

    The two share their parameters: training one trains the other. To keep them apart, pass `copy.deepcopy(model)`.
    """
    config = model.config
    assert isinstance(config, Config)
    with torch.device("meta"):
        wrapped = SphereLMForCausalLM(SphereLMConfig.of(config))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(wrapped.model.get_submodule(owner), leaf, parameter)
    wrapped.config.dtype = model.embed.weight.dtype
    wrapped.model.set_compute_dtype(model.embed.compute_dtype)
    return wrapped.train(model.training)
