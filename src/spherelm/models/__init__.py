"""Complete models: the baseline GPT and the normalized NGPT, built from a config."""

from __future__ import annotations

import torch

from spherelm.models.decoder import Decoder
from spherelm.models.gpt import GPT, GPTConfig
from spherelm.models.ngpt import NGPT, NGPTConfig

__all__ = ["ARMS", "GPT", "NGPT", "Config", "Decoder", "GPTConfig", "NGPTConfig", "arm_of", "build", "parameter_count"]

Config = GPTConfig | NGPTConfig

ARMS: dict[str, tuple[type[Config], type[Decoder]]] = {"gpt": (GPTConfig, GPT), "ngpt": (NGPTConfig, NGPT)}
"""The config and the model of each arm, by the name that the command line and run directories use."""


def build(config: Config) -> Decoder:
    """The model that `config` describes, freshly initialized from torch's global random state, in float32."""
    for config_class, model_class in ARMS.values():
        if isinstance(config, config_class):
            return model_class(config)
    raise ValueError(f"no model is built from a {type(config).__name__}: pass one of GPTConfig, NGPTConfig")


def arm_of(config: Config) -> str:
    """The name of the arm that `config` belongs to: "gpt" or "ngpt"."""
    return next(arm for arm, (config_class, _) in ARMS.items() if isinstance(config, config_class))


def parameter_count(config: Config) -> int:
    """How many learned numbers the model of `config` has; none of them are allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())
