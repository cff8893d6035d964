"""nGPT with Mamba-2 mixers and mixtures of experts among its layers ("Training nGPT", arXiv 2608.01284)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .configuration_spherelm import SphereLMConfig
from .experts import Bank, Mixture
from .mixers import Hybrid, StateSpace
from .modeling_ngpt import NGPTForCausalLM, NGPTModel, Scale, Unit, UnitFeedForward, UnitLinear


class UnitMixer(nn.Module):
    """`W_out (SSM(x, B, C, dt) SiLU(z))` with `z, x, B, C, dt = s_mamba sqrt(d_model) W_in h`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.ssm = StateSpace(config, layer_idx)
        self.in_proj = UnitLinear(config.d_model, sum(self.ssm.sizes))
        self.out_proj = UnitLinear(self.ssm.d_inner, config.d_model, writes=True)
        self.s_mamba = Scale(config, "s_mamba", 1, gain=math.sqrt(config.d_model))

    def forward(self, h: Tensor, positions: Tensor, cache: Cache | None = None, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        z, xbc, dt = self.s_mamba(self.in_proj(h)).split(self.ssm.sizes, dim=-1)
        return self.out_proj(self.ssm(xbc, dt, positions, cache) * F.silu(z)), None


class UnitBank(Unit, Bank):
    """Matrices of experts with unit rows; with unit columns where they write to the hidden state."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__(n_experts, in_features, out_features)
        self.unit_axis = 2


class UnitMixture(Mixture):
    """Every expert is nGPT's MLP; the router reads `s_moe sqrt(d_model) h`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__(config, UnitBank, UnitFeedForward)
        self.o.unit_axis = 1
        count, root = self.router.out_features, math.sqrt(config.d_model)
        self.s_moe = Scale(config, "s_moe", 1, gain=root)
        self.s_u, self.s_v = Scale(config, "s_u", count, self.width), Scale(config, "s_v", count, self.width, gain=root)

    def routed(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        return super().routed(self.s_moe(flat.float() if flat.itemsize < 4 else flat))

    def expert(self, i: int, h: Tensor) -> Tensor:
        u, v, o = (bank.weight[i].to(h.dtype) for bank in (self.u, self.v, self.o))
        s_u, s_v = (scale.effective()[i].to(h.dtype) for scale in (self.s_u, self.s_v))
        return F.linear(s_u * F.linear(h, u) * F.silu(s_v * F.linear(h, v)), o)


class NGPTHybridModel(Hybrid, NGPTModel):
    """The hybrid without its logits."""

    parts = NGPTModel.parts | {"M": UnitMixer, "O": UnitMixture}


class NGPTHybridForCausalLM(NGPTForCausalLM):
    """The hybrid as a language model."""

    model_class = NGPTHybridModel
