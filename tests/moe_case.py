"""Language models whose MLPs are mixtures of experts, made of the models that there are: for tests of what any model has."""

from __future__ import annotations

from typing import Any

from torch import nn

from spherelm.layers.linear import Scale
from spherelm.layers.moe import MixtureOfExperts, Router, UnitMixtureOfExperts
from spherelm.models import Decoder, GPTConfig, NGPTConfig, build
from spherelm.models.decoder import KITS, Block

SIZES: dict[str, Any] = {"vocab_size": 23, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "max_seq_len": 8}
E, D_FF = 6, 12


def mixture(arm: str, d_model: int = 16, n_experts: int = E, top_k: int = 2, **router: Any) -> nn.Module:
    """The arm's mixture of experts."""
    chooser = Router(d_model, n_experts, top_k, **router)
    if arm == "gpt":
        return MixtureOfExperts(d_model, D_FF, chooser)
    scales = (Scale(1, 1.0, 1.0), Scale((n_experts, D_FF), 1.0, 1.0), Scale((n_experts, D_FF), 1.0, 1.0))
    return UnitMixtureOfExperts(d_model, D_FF, chooser, *scales)


def model_with_experts(arm: str = "ngpt", **router: Any) -> Decoder:
    """A `GPT` or an `NGPT` of two layers with experts in place of its MLPs."""
    model = build(GPTConfig(**SIZES) if arm == "gpt" else NGPTConfig(**SIZES))
    for i, block in enumerate(model.blocks):
        experts = KITS[arm].sublayer(model.config, mixture(arm, **router))
        model.blocks[i] = Block("AO", {"attention": block.attention, "experts": experts})
    model.init_weights()
    return model
