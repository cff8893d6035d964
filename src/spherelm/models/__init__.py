"""Complete models, built from a config: the baseline of each kind and its normalized twin."""

from __future__ import annotations

import torch

from spherelm.models import gpt, ngpt
from spherelm.models.config import (
    EncDecConfig,
    EncoderConfig,
    GPTConfig,
    NEncDecConfig,
    NEncoderConfig,
    NGPTConfig,
)
from spherelm.models.decoder import Decoder, LanguageModel
from spherelm.models.encoder import MaskedModel
from spherelm.models.encoder_decoder import EncoderDecoder
from spherelm.models.pattern import HybridConfig, NHybridConfig

__all__ = [
    "ARMS",
    "GPT",
    "MASKED_CONFIGS",
    "NGPT",
    "TWINS",
    "Config",
    "Decoder",
    "EncDec",
    "EncDecConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "GPTConfig",
    "Hybrid",
    "HybridConfig",
    "LanguageModel",
    "MaskedModel",
    "NEncDec",
    "NEncDecConfig",
    "NEncoder",
    "NEncoderConfig",
    "NGPTConfig",
    "NHybrid",
    "NHybridConfig",
    "arm_of",
    "build",
    "has_pattern",
    "is_normalized",
    "parameter_count",
]


class GPT(LanguageModel):
    """The baseline (`gpt.py`), a language model."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config, gpt.KIT)


class NGPT(LanguageModel):
    """The normalized Transformer (`ngpt.py`), a language model."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config, ngpt.KIT)


class Hybrid(LanguageModel):
    """The baseline with layers of several kinds."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config, gpt.KIT)


class NHybrid(LanguageModel):
    """The normalized Transformer with layers of several kinds ("Training nGPT", arXiv 2608.01284)."""

    def __init__(self, config: NHybridConfig) -> None:
        super().__init__(config, ngpt.KIT)


class EncDec(EncoderDecoder):
    """The baseline as an encoder-decoder."""

    def __init__(self, config: EncDecConfig) -> None:
        super().__init__(config, gpt.KIT)


class NEncDec(EncoderDecoder):
    """The normalized Transformer as an encoder-decoder."""

    def __init__(self, config: NEncDecConfig) -> None:
        super().__init__(config, ngpt.KIT)


class Encoder(MaskedModel):
    """The baseline as an encoder."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, gpt.KIT)


class NEncoder(MaskedModel):
    """The normalized Transformer as an encoder."""

    def __init__(self, config: NEncoderConfig) -> None:
        super().__init__(config, ngpt.KIT)


Config = (
    GPTConfig
    | NGPTConfig
    | EncDecConfig
    | NEncDecConfig
    | EncoderConfig
    | NEncoderConfig
    | HybridConfig
    | NHybridConfig
)

MASKED_CONFIGS = (EncoderConfig, NEncoderConfig)
"""Of models that fill in what is hidden in a text."""

ARMS: dict[str, tuple[type[Config], type[Decoder]]] = {
    "gpt": (GPTConfig, GPT),
    "ngpt": (NGPTConfig, NGPT),
    "encdec": (EncDecConfig, EncDec),
    "nencdec": (NEncDecConfig, NEncDec),
    "encoder": (EncoderConfig, Encoder),
    "nencoder": (NEncoderConfig, NEncoder),
    "hybrid": (HybridConfig, Hybrid),
    "nhybrid": (NHybridConfig, NHybrid),
}
"""The config and the model of each arm, by the name that the command line and run directories use."""

TWINS = {"ngpt": "gpt", "nencdec": "encdec", "nencoder": "encoder", "nhybrid": "hybrid"}
"""The baseline of each normalized arm."""


def build(config: Config) -> Decoder:
    """The model that `config` describes, freshly initialized from torch's global random state, in float32."""
    for config_class, model_class in ARMS.values():
        if type(config) is config_class:
            return model_class(config)  # type: ignore[call-arg] # that of an arm brings its kit
    names = ", ".join(config_class.__name__ for config_class, _ in ARMS.values())
    raise ValueError(f"no model is built from a {type(config).__name__}: pass one of {names}")


def arm_of(config: Config) -> str:
    """The name of the arm that `config` belongs to, a key of `ARMS`."""
    return next(arm for arm, (config_class, _) in ARMS.items() if type(config) is config_class)


def is_normalized(arm: str) -> bool:
    """Whether the weights of `arm` live on the sphere."""
    return arm in TWINS


def has_pattern(arm: str) -> bool:
    """Whether the layers of `arm` are those of a pattern of letters."""
    return hasattr(ARMS[arm][0], "mamba_expand")


def parameter_count(config: Config) -> int:
    """How many learned numbers the model of `config` has; none of them are allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())
