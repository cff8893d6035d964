"""The oracle for mixtures of experts: their equations in float64, token by token and expert by expert,
beside ``paper.py``.

No sorting, no groups, no banks in one product. Parameters by name, below a prefix:

    router.weight [E, d]  router.score_bias [E]  u.weight, v.weight [E, d_ff, d]  o.weight [E, d, d_ff]
    on the sphere: s_moe.value [1]  s_u.value, s_v.value [E, d_ff] shared experts: shared.{i}.{u,v,o}.weight, on the
    sphere shared.{i}.s_{u,v}.value
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import paper
import torch
from torch import Tensor


@dataclass(frozen=True)
class Experts:
    """``score`` "sigmoid" or "softmax"; ``normalize``: weights of the picked over their sum;
    ``s_moe``: init and scale.
    """

    top_k: int
    score: str
    normalize: bool
    n_shared: int = 0
    s_moe: tuple[float, float] = (1.0, 1.0)


def scores(p: paper.Params, prefix: str, how: Experts, x: Tensor) -> Tensor:
    """Of one token ``x [d]``, for each expert: DeepSeek-V3's eq. 15 (sigmoid), or DeepSeekMoE's eq. 10 (softmax)."""
    logits = torch.stack([row @ x for row in p[prefix + "router.weight"]])
    if how.score == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    powers = torch.exp(logits - logits.detach().max())
    return powers / powers.sum()


def picked(p: paper.Params, prefix: str, how: Experts, s: Tensor) -> list[tuple[int, Tensor]]:
    """The experts with the largest ``score + bias``, and their weights,
    of which the bias is no part (DeepSeek-V3, eq. 16).
    """
    biased = (s.detach() + p[prefix + "router.score_bias"]).tolist()
    best = sorted(range(len(biased)), key=lambda e: -biased[e])[: how.top_k]
    total = torch.stack([s[e] for e in best]).sum() if how.normalize else 1.0
    return [(e, s[e] / total) for e in best]


def expert(p: paper.Params, prefix: str, e: int) -> paper.Params:
    """The matrices and scales of one expert of the banks, by the names of an MLP."""
    names = [n for n in ("u.weight", "v.weight", "o.weight", "s_u.value", "s_v.value") if prefix + n in p]
    return {name: p[prefix + name][e] for name in names}


def gpt_moe(p: paper.Params, prefix: str, shape: paper.Shape, how: Experts, h: Tensor) -> Tensor:
    """The baseline's: weighted experts and all shared ones. ``h [..., d]``."""
    out = []
    for x in h.reshape(-1, shape.d_model):
        y = torch.zeros_like(x)
        for e, weight in picked(p, prefix, how, scores(p, prefix, how, x)):
            y = y + weight * paper.gpt_mlp(expert(p, prefix, e), "", shape, x)
        for i in range(how.n_shared):
            y = y + paper.gpt_mlp(p, f"{prefix}shared.{i}.", shape, x)
        out.append(y)
    return torch.stack(out).reshape(h.shape)


def moe(p: paper.Params, prefix: str, shape: paper.Shape, how: Experts, h: Tensor) -> Tensor:
    """On the sphere: the router sees ``s_moe sqrt(d_model) h``, every expert is the MLP of eqs. 17 to 21."""
    s_moe = paper.effective(p[prefix + "s_moe.value"], how.s_moe, shape.d_model)
    out = []
    for x in h.reshape(-1, shape.d_model):
        y = torch.zeros_like(x)
        for e, weight in picked(p, prefix, how, scores(p, prefix, how, s_moe * math.sqrt(shape.d_model) * x)):
            y = y + weight * paper.mlp(expert(p, prefix, e), "", shape, x)
        for i in range(how.n_shared):
            y = y + paper.mlp(p, f"{prefix}shared.{i}.", shape, x)
        out.append(y)
    return torch.stack(out).reshape(h.shape)


def balance_loss(p: paper.Params, prefix: str, how: Experts, h: Tensor) -> Tensor:
    """Switch Transformer (arXiv 2101.03961), eqs. 4 to 6, without its coefficient: ``E sum_e f_e P_e`` over all tokens.

    Of ``top_k`` choices a token, ``f_e`` is the part that went to ``e``; of sigmoid scores, ``P_e`` is the mean of each
    over the sum over experts (DeepSeek-V3, eqs. 17 to 20).
    """
    n, tokens = len(p[prefix + "router.weight"]), h.reshape(-1, h.shape[-1])
    f, total = [0.0] * n, [torch.zeros((), dtype=h.dtype) for _ in range(n)]
    for x in tokens:
        s = scores(p, prefix, how, x)
        for e, _ in picked(p, prefix, how, s):
            f[e] += 1 / (how.top_k * len(tokens))
        for e in range(n):
            total[e] = total[e] + s[e] / s.sum() / len(tokens)
    return n * torch.stack([f[e] * total[e] for e in range(n)]).sum()
