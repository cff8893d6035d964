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
from spherelm.models.decoder import Decoder, GenerativeModel, LanguageModel
from spherelm.models.encoder import MaskedModel
from spherelm.models.encoder_decoder import EncoderDecoder

__all__ = [
    "ARCHITECTURES",
    "ARMS",
    "ARM_NAMES",
    "CONFIGS",
    "GPT",
    "NGPT",
    "Architecture",
    "Config",
    "Decoder",
    "DecoderArch",
    "EncDecArch",
    "EncoderArch",
    "EncoderDecoder",
    "GPTConfig",
    "GenerativeModel",
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

ARM_NAMES = {"gpt": "GPT", "ngpt": "nGPT"}
"""The arms' names in text."""


class GPT(LanguageModel):
    """The baseline: a pre-norm Transformer with RMSNorm, rotary embedding and SwiGLU.

        logits = model(tokens)  # int64 [batch, seq] -> [batch, seq, vocab]
        loss = model.loss(tokens, targets)  # mean cross-entropy in nats; targets of -100 are ignored

    Args:
        config: Shape and initial values. The architecture must be a decoder; `build` makes the others.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)


class NGPT(LanguageModel):
    """The normalized Transformer (nGPT, arXiv 2410.01131).

        logits = model(tokens)  # int64 [batch, seq] -> [batch, seq, vocab]
        loss = model.loss(tokens, targets)  # mean cross-entropy in nats; targets of -100 are ignored

    `attach_retraction` or `build_optimizer` keeps its weights on the sphere in training.

    Args:
        config: Shape and initial values. The architecture must be a decoder; `build` makes the others.
    """

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)


LANGUAGE_MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT, "ngpt": NGPT}
OTHERS: dict[str, type[Decoder]] = {"encdec": EncoderDecoder, "encoder": MaskedModel}


def model_class(config: Config) -> type[Decoder]:
    """The class of the model that `config` describes."""
    kind = config.architecture.kind
    return LANGUAGE_MODELS[config.arm] if kind == "decoder" else OTHERS[kind]


def build(config: Config) -> Decoder:
    """Build the model that `config` describes, in float32, initialized from torch's global random state.

        model = build(NGPTConfig(vocab_size=4096, n_layers=4, d_model=128, n_heads=2))

    Args:
        config: A `GPTConfig` or an `NGPTConfig`. Its architecture makes it a decoder, an encoder-decoder or an encoder.

    Returns:
        A module with `model(tokens)` and `model.loss(tokens, targets)`.

    Raises:
        UserError: `config` is of another type.
    """
    if not isinstance(config, Config):
        raise UserError(f"no model is built from a {type(config).__name__}: pass a GPTConfig or an NGPTConfig")
    return model_class(config)(config)  # type: ignore[call-arg]


def parameter_count(config: Config) -> int:
    """How many learned numbers the model of `config` has; none of them are allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())
