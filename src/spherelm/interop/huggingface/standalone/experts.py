"""Mixtures of experts (DeepSeekMoE, arXiv 2401.06066): a router picks a few of many MLPs for each token.

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


ACTIVATIONS: dict[str, tuple[str, Any]] = {
    "swiglu": ("uv", lambda u, v: u * F.silu(v)),
    "relu2": ("u", lambda u: u.relu().square()),
}
"""The matrices that read the hidden state, and what becomes of their products."""


class Mixture(nn.Module):
    """`sum_i w_i expert_i(h)` over the experts that the router picks, plus those that are shared by all tokens.

    An arm says what its banks are, its `mlps` by name of the activation, and what `products` and `inner` are.
    """

    inner: Any = staticmethod(torch.positive)

    def __init__(self, config: SphereLMConfig, bank: Any, mlps: dict[str, Any]) -> None:
        super().__init__()
        sizes = config.architecture["experts"]
        count, n_shared = sizes["n_experts"], sizes["n_shared_experts"]
        self.width = sizes["d_expert"] or config.d_ff // (sizes["experts_per_token"] + n_shared)
        self.router = Router(config, sizes)
        self.reading, self.activate = ACTIVATIONS[config.activation]
        for name in self.reading:
            self.add_module(name, bank(count, config.d_model, self.width))
        self.o = bank(count, self.width, config.d_model)
        self.shared = nn.ModuleList(mlps[config.activation](config, None, self.width) for _ in range(n_shared))

    def products(self, i: int, h: Tensor) -> list[Tensor]:
        """What expert `i` reads of [rows, d_model]: `u`, and `v` where there is a gate."""
        return [F.linear(h, self.get_parameter(f"{name}.weight")[i].to(h.dtype)) for name in self.reading]

    def expert(self, i: int, h: Tensor) -> Tensor:
        """[rows, d_model] -> the same, by expert `i`."""
        return F.linear(self.inner(self.activate(*self.products(i, h))), self.o.weight[i].to(h.dtype))

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
