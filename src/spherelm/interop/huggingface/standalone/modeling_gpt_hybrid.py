"""GPT with Mamba-2 mixers and mixtures of experts among its layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .configuration_spherelm import SphereLMConfig
from .experts import Bank, Mixture
from .mixers import Hybrid, StateSpace
from .modeling_gpt import MLPS, GPTForCausalLM, GPTModel, linear


class GatedRMSNorm(nn.Module):
    """`RMSNorm(y SiLU(z)) * gain`, over each group's channels."""

    def __init__(self, width: int, n_groups: int) -> None:
        super().__init__()
        self.n_groups, self.weight = n_groups, nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """[..., width] twice -> the same."""
        gated = (y * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(gated, gated.shape[-1:], None, 1e-6).flatten(-2) * self.weight.to(y.dtype)


class Mixer(nn.Module):
    """`W_out RMSNorm(SSM(x, B, C, dt) SiLU(z))` with `z, x, B, C, dt = W_in h`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.ssm = StateSpace(config, layer_idx)
        self.in_proj = linear(config.d_model, sum(self.ssm.sizes))
        self.norm = GatedRMSNorm(self.ssm.d_inner, self.ssm.n_groups)
        self.out_proj = linear(self.ssm.d_inner, config.d_model)

    def forward(self, h: Tensor, positions: Tensor, cache: Cache | None = None, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        z, xbc, dt = self.in_proj(h).split(self.ssm.sizes, dim=-1)
        return self.out_proj(self.norm(self.ssm(xbc, dt, positions, cache), z)), None


class MixtureOfExperts(Mixture):
    """Every expert is GPT's MLP."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__(config, Bank, MLPS)


class GPTHybridModel(Hybrid, GPTModel):
    """The hybrid without its logits."""

    parts = GPTModel.parts | {"M": Mixer, "O": MixtureOfExperts}


class GPTHybridForCausalLM(GPTForCausalLM):
    """The hybrid as a language model."""

    model_class = GPTHybridModel
