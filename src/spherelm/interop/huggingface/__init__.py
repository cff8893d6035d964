"""At home in Hugging Face transformers: `to_hf`, and the Auto classes once this is imported (see
docs/huggingface.md).
"""

from __future__ import annotations

import torch

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )
except ImportError as error:
    raise ImportError(
        "spherelm.interop.huggingface needs transformers: pip install '.[hf]' in a clone of spherelm"
    ) from error

from spherelm.errors import UserError
from spherelm.interop.huggingface.configuration import SphereLMConfig, SphereSeq2SeqConfig
from spherelm.interop.huggingface.modeling import SphereLMForCausalLM, SphereModel
from spherelm.interop.huggingface.seq2seq import SphereSeq2SeqLM
from spherelm.models import Config, Decoder

__all__ = ["SphereLMConfig", "SphereLMForCausalLM", "SphereSeq2SeqConfig", "SphereSeq2SeqLM", "to_hf"]

WRAPPERS: tuple[tuple[type[SphereLMConfig], type[SphereModel]], ...] = (
    (SphereLMConfig, SphereLMForCausalLM),
    (SphereSeq2SeqConfig, SphereSeq2SeqLM),
)
"""The config and the model of each kind of ours."""

for config_class, _ in WRAPPERS:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoTokenizer.register(config_class, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
AutoModelForCausalLM.register(SphereLMConfig, SphereLMForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(SphereSeq2SeqConfig, SphereSeq2SeqLM, exist_ok=True)


def classes_of(model: Decoder) -> tuple[type[SphereLMConfig], type[SphereModel]]:
    """The config and the class that wrap `model`; `ValueError` for a kind that has none."""
    found = next(((c, w) for c, w in WRAPPERS if model.config.architecture.kind in c.kinds), None)
    if found is None:
        raise UserError(f"there is no Hugging Face class for {type(model).__name__}: use spherelm.load_model")
    return found


def to_hf(model: Decoder) -> SphereModel:
    """`model` as a `PreTrainedModel`, causal or sequence-to-sequence: `save_pretrained`, `generate`, `Trainer`.

    The two share their parameters: training one trains the other. To keep them apart, pass `copy.deepcopy(model)`.
    Raises as `classes_of` does.
    """
    config = model.config
    assert isinstance(config, Config)
    config_class, wrapper = classes_of(model)
    with torch.device("meta"):
        wrapped = wrapper(config_class.of(config))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(wrapped.model.get_submodule(owner), leaf, parameter)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(wrapped.model.get_submodule(owner), leaf, buffer)
    wrapped.config.dtype = model.embed.weight.dtype
    wrapped.model.runtime.compute_dtype = model.runtime.compute_dtype
    return wrapped.train(model.training)
