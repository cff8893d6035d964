"""Complete models, built from a config: the baseline of each kind and its normalized twin."""

from __future__ import annotations

import torch

from spherelm.models.decoder import Decoder, LanguageModel
from spherelm.models.encdec import EncDec, EncDecConfig
from spherelm.models.encoder import Encoder, EncoderConfig
from spherelm.models.encoder_decoder import EncoderDecoder
from spherelm.models.gpt import GPT, GPTConfig
from spherelm.models.hybrid import Hybrid, HybridConfig
from spherelm.models.masked import MaskedModel
from spherelm.models.nencdec import NEncDec, NEncDecConfig
from spherelm.models.nencoder import NEncoder, NEncoderConfig
from spherelm.models.ngpt import NGPT, NGPTConfig
from spherelm.models.nhybrid import NHybrid, NHybridConfig
from spherelm.models.pattern import PatternModel

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
    "PatternModel",
    "arm_of",
    "build",
    "is_normalized",
    "parameter_count",
]

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
            return model_class(config)
    names = ", ".join(config_class.__name__ for config_class, _ in ARMS.values())
    raise ValueError(f"no model is built from a {type(config).__name__}: pass one of {names}")


def arm_of(config: Config) -> str:
    """The name of the arm that `config` belongs to, a key of `ARMS`."""
    return next(arm for arm, (config_class, _) in ARMS.items() if type(config) is config_class)


def is_normalized(arm: str) -> bool:
    """Whether the weights of `arm` live on the sphere."""
    return arm in TWINS


def parameter_count(config: Config) -> int:
    """How many learned numbers the model of `config` has; none of them are allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())
