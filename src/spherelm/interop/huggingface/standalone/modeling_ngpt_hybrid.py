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
from .modeling_ngpt import MLPS, NGPTForCausalLM, NGPTModel, Scale, Unit, UnitLinear, inner_norm


class UnitMixer(nn.Module):
    """`W_out (SSM(x, B, C, dt) SiLU(z))` with `z, x, B, C, dt = s_mamba sqrt(d_model) W_in h`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.ssm = StateSpace(config, layer_idx)
        self.in_proj = UnitLinear(config.d_model, sum(self.ssm.sizes))
        self.out_proj = UnitLinear(self.ssm.d_inner, config.d_model, writes=True)
        self.s_mamba = Scale(config, "s_mamba", 1, gain=math.sqrt(config.d_model))
        self.inner = inner_norm(config)

    def forward(self, h: Tensor, positions: Tensor, cache: Cache | None = None, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        z, xbc, dt = self.s_mamba(self.in_proj(h)).split(self.ssm.sizes, dim=-1)
        return self.out_proj(self.inner(self.ssm(xbc, dt, positions, cache) * F.silu(z))), None


class UnitBank(Unit, Bank):
    """Matrices of experts with unit rows; with unit columns where they write to the hidden state."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__(n_experts, in_features, out_features)
        self.unit_axis = 2


class UnitMixture(Mixture):
    """Every expert is nGPT's MLP; the router reads `s_moe sqrt(d_model) h`."""

    def __init__(self, config: SphereLMConfig, layer_idx: int) -> None:
        super().__init__(config, UnitBank, MLPS)
        self.o.unit_axis, self.inner = 1, inner_norm(config)
        count, root = self.router.out_features, math.sqrt(config.d_model)
        self.s_moe = Scale(config, "s_moe", 1, gain=root)
        for name, gain in zip(self.reading, (1.0, root) if len(self.reading) == 2 else (root,), strict=True):
            self.add_module(f"s_{name}", Scale(config, f"s_{name}", count, self.width, gain=gain))

    def routed(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        return super().routed(self.s_moe(flat.float() if flat.itemsize < 4 else flat))

    def products(self, i: int, h: Tensor) -> list[Tensor]:
        scales = (self.get_submodule(f"s_{name}").effective()[i].to(h.dtype) for name in self.reading)
        return [scale * product for scale, product in zip(scales, super().products(i, h), strict=True)]


class NGPTHybridModel(Hybrid, NGPTModel):
    """The hybrid without its logits."""

    parts = NGPTModel.parts | {"M": UnitMixer, "O": UnitMixture}


class NGPTHybridForCausalLM(NGPTForCausalLM):
    """The hybrid as a language model."""

    model_class = NGPTHybridModel
