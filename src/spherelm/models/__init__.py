"""Complete models, built from a config: GPT, the baseline, and nGPT, each in any architecture."""

from __future__ import annotations

import torch

from spherelm.errors import UserError
from spherelm.models.config import (
    ARCHITECTURES,
    CONFIGS,
    Architecture,
    Config,
    DecoderArch,
    EncDecArch,
    EncoderArch,
    GPTConfig,
    NGPTConfig,
    ScaleSpec,
    Variant,
)
from spherelm.models.decoder import Decoder, LanguageModel
from spherelm.models.encoder import MaskedModel
from spherelm.models.encoder_decoder import EncoderDecoder

__all__ = [
    "ARCHITECTURES",
    "ARMS",
    "CONFIGS",
    "GPT",
    "NAMES",
    "NGPT",
    "Architecture",
    "Config",
    "Decoder",
    "DecoderArch",
    "EncDecArch",
    "EncoderArch",
    "EncoderDecoder",
    "GPTConfig",
    "LanguageModel",
    "MaskedModel",
    "NGPTConfig",
    "ScaleSpec",
    "Variant",
    "build",
    "model_class",
    "parameter_count",
]

ARMS = tuple(CONFIGS)
"""The baseline, then the normalized arm."""

NAMES = {"gpt": "GPT", "ngpt": "nGPT"}
"""The arms' names in text."""


class GPT(LanguageModel):
    """The baseline as a language model: the parts of `gpt.py`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)


class NGPT(LanguageModel):
    """The normalized Transformer as a language model: the parts of `ngpt.py`."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)


LANGUAGE_MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT, "ngpt": NGPT}
OTHERS: dict[str, type[Decoder]] = {"encdec": EncoderDecoder, "encoder": MaskedModel}


def model_class(config: Config) -> type[Decoder]:
    """The class of the model that `config` describes."""
    kind = config.architecture.kind
    return LANGUAGE_MODELS[config.arm] if kind == "decoder" else OTHERS[kind]


def build(config: Config) -> Decoder:
    """The model that `config` describes, freshly initialized from torch's global random state, in float32."""
    if not isinstance(config, Config):
        raise UserError(f"no model is built from a {type(config).__name__}: pass a GPTConfig or an NGPTConfig")
    return model_class(config)(config)  # type: ignore[call-arg]


def parameter_count(config: Config) -> int:
    """How many learned numbers the model of `config` has; none of them are allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())
