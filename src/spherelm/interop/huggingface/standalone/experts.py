"""Mixtures of experts (DeepSeekMoE, arXiv 2401.06066): a router picks a few of many SwiGLU blocks for each token.

A loop over the experts, in torch alone. What balances their load while a model is trained is spherelm's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_spherelm import SphereLMConfig


class Router(nn.Linear):
    """Scores by a matrix [n_experts, d_model], in float32; the weights of those picked sum to 1 where they are several.

    `score_bias` [n_experts] counts for picking and for nothing else (DeepSeek-V3, eq. 16).
    """

    score_bias: Tensor

    def __init__(self, config: SphereLMConfig, sizes: dict[str, Any]) -> None:
        super().__init__(config.d_model, sizes["n_experts"], bias=False)
        self.top_k, self.softmax = sizes["experts_per_token"], sizes["router_score"] == "softmax"
        self.register_buffer("score_bias", torch.zeros(sizes["n_experts"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, d_model] -> who computes what, int64 [tokens, top_k], and their weights in the result."""
        logits = F.linear(x, self.weight.to(x.dtype))
        scores = logits.softmax(-1) if self.softmax else logits.sigmoid()
        experts = (scores.detach() + self.score_bias).topk(self.top_k).indices
        weights = scores.gather(-1, experts)
        return experts, weights / weights.sum(-1, keepdim=True) if self.top_k > 1 else weights


class Bank(nn.Module):
    """A matrix for each expert: `weight` [n_experts, out_features, in_features]."""

    def __init__(self, n_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))


class Mixture(nn.Module):
    """`sum_i w_i expert_i(h)` over the experts that the router picks, plus those that are `shared` by all tokens.

    An arm says what the banks `u`, `v` and `o` are, and how `expert` computes with the i-th of them.
    """

    def __init__(self, config: SphereLMConfig, bank: Any, shared: Any) -> None:
        super().__init__()
        sizes = config.architecture["experts"]
        count, n_shared = sizes["n_experts"], sizes["n_shared_experts"]
        self.width = sizes["d_expert"] or config.d_ff // (sizes["experts_per_token"] + n_shared)
        self.router = Router(config, sizes)
        self.u, self.v = bank(count, config.d_model, self.width), bank(count, config.d_model, self.width)
        self.o = bank(count, self.width, config.d_model)
        self.shared = nn.ModuleList(shared(config, None, self.width) for _ in range(n_shared))

    def expert(self, i: int, h: Tensor) -> Tensor:
        """[rows, d_model] -> the same, by expert `i`."""
        u, v, o = (bank.weight[i].to(h.dtype) for bank in (self.u, self.v, self.o))
        return F.linear(F.linear(h, u) * F.silu(F.linear(h, v)), o)

    def routed(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice for tokens [tokens, d_model]."""
        return self.router(flat.to(torch.promote_types(flat.dtype, torch.float32)))

    def forward(self, h: Tensor, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        flat, out = h.flatten(0, -2), torch.zeros_like(h).flatten(0, -2)
        experts, weights = self.routed(flat)
        for i in experts.unique().tolist():
            rows, choice = torch.where(experts == i)
            out = out.index_add(0, rows, self.expert(i, flat[rows]) * weights[rows, choice, None].to(h.dtype))
        return out.view_as(h) + sum(expert(h)[0] for expert in self.shared), None
