"""The oracle for Mamba-2 and for hybrids: their equations in float64, position by position, beside ``paper.py``.

The recurrence of a state space is written as it is defined (Mamba-2, arXiv 2405.21060, section 2): no chunks, no dual
form, one head and one row of the batch at a time. Parameters by name:

    blocks.{i}.attention.* or blocks.{i}.mlp.* as in ``paper.py``; or blocks.{i}.experts.* as in ``paper_moe.py``, with
    a score bias of 0; or blocks.{i}.mamba.*:
    in_proj.weight [projected, d]  out_proj.weight [d, inner]
    ssm.conv_weight [channels, width]  ssm.conv_bias [channels]  ssm.{A_log,D,dt_bias} [heads]
    Hybrid: blocks.{i}.norm.weight, mixers' norm.weight [inner]  NHybrid: blocks.{i}.alpha.value, mixers'
    s_mamba.value [1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import paper
import paper_moe
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape(paper.Shape):
    """``paper.Shape`` and what a mixer's equations need."""

    pattern: str = ""
    heads: int = 1
    d_state: int = 1
    groups: int = 1
    s_mamba: tuple[float, float] = (1.0, 1.0)
    experts: paper_moe.Experts | None = None


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def convolution(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """``x [T, channels]``: each channel with its own past, nothing before the first position."""
    width, rows = weight.shape[1], []
    for t in range(len(x)):
        y = bias
        for k in range(width):
            source = t - (width - 1 - k)
            y = y + weight[:, k] * x[source] if source >= 0 else y
        rows.append(y)
    return torch.stack(rows)


def recurrence(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """One head: ``x [T, P], dt [T], b, c [T, N]`` to ``[T, P]``; ``S <- exp(dt A) S + dt x b^T``, ``y = S c + D x``."""
    state, rows = torch.zeros(x.shape[1], b.shape[1], dtype=x.dtype), []
    for t in range(len(x)):
        state = torch.exp(dt[t] * rate) * state + dt[t] * torch.outer(x[t], b[t])
        rows.append(state @ c[t] + skip * x[t])
    return torch.stack(rows)


def state_space(p: paper.Params, prefix: str, shape: Shape, projected: Tensor) -> tuple[Tensor, Tensor]:
    """One row ``[T, projected]`` of what in_proj gave: y ``[T, inner]``, and the gate z."""
    channels = len(p[prefix + "ssm.conv_bias"])
    inner = channels - 2 * shape.groups * shape.d_state
    z, xbc, dt = projected[:, :inner], projected[:, inner : inner + channels], projected[:, inner + channels :]
    xbc = paper.silu(convolution(p[prefix + "ssm.conv_weight"], p[prefix + "ssm.conv_bias"], xbc))
    dt, rate = softplus(dt + p[prefix + "ssm.dt_bias"]), -torch.exp(p[prefix + "ssm.A_log"])
    width, heads = inner // shape.heads, []
    for i in range(shape.heads):
        group = i * shape.groups // shape.heads
        b = xbc[:, inner + group * shape.d_state :][:, : shape.d_state]
        c = xbc[:, inner + (shape.groups + group) * shape.d_state :][:, : shape.d_state]
        x = xbc[:, i * width : (i + 1) * width]
        heads.append(recurrence(x, dt[:, i], rate[i], b, c, p[prefix + "ssm.D"][i]))
    return torch.cat(heads, -1), z


def mamba2(p: paper.Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    """The baseline's mixer: Mamba-2's, with its RMSNorm over each group's channels after the gate."""
    rows = []
    for row in h:
        y, z = state_space(p, prefix, shape, row @ p[prefix + "in_proj.weight"].T)
        gated = (y * paper.silu(z)).reshape(len(y), shape.groups, -1)
        gain = p[prefix + "norm.weight"].reshape(shape.groups, -1)
        rows.append(paper.rms_norm(gated, gain, shape.rms_eps).reshape(y.shape) @ p[prefix + "out_proj.weight"].T)
    return torch.stack(rows)


def input_scale(p: paper.Params, prefix: str, shape: Shape) -> Tensor:
    """``s_mamba``, and eq. 21's factor for the same reason."""
    return paper.effective(p[prefix + "s_mamba.value"], shape.s_mamba, shape.d_model) * math.sqrt(shape.d_model)


def unit_mamba2(p: paper.Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    """On the sphere ("Training nGPT"): no inner norm, and one learned number on what is read."""
    rows = []
    for row in h:
        y, z = state_space(p, prefix, shape, input_scale(p, prefix, shape) * row @ p[prefix + "in_proj.weight"].T)
        rows.append(paper.written(shape, y * paper.silu(z)) @ p[prefix + "out_proj.weight"].T)
    return torch.stack(rows)


def unbiased(p: paper.Params, prefix: str) -> paper.Params:
    """Beside the parameters the bias by which a router picks, as it is before any update."""
    return {**p, prefix + "router.score_bias": torch.zeros(len(p[prefix + "router.weight"]), dtype=torch.float64)}


def experts_of(shape: Shape) -> paper_moe.Experts:
    assert shape.experts is not None
    return shape.experts


def experts(p: paper.Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    return paper_moe.gpt_moe(unbiased(p, prefix), prefix, shape, experts_of(shape), h)


def unit_experts(p: paper.Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    return paper_moe.moe(unbiased(p, prefix), prefix, shape, experts_of(shape), h)


BASELINE = {
    "M": ("mamba", mamba2),
    "A": ("attention", paper.gpt_attention),
    "-": ("mlp", paper.gpt_mlp),
    "O": ("experts", experts),
}
ON_SPHERE = {
    "M": ("mamba", unit_mamba2),
    "A": ("attention", paper.attention),
    "-": ("mlp", paper.mlp),
    "O": ("experts", unit_experts),
}


def hybrid(p: paper.Params, shape: Shape, tokens: Tensor) -> Tensor:
    """Logits of the baseline: a pre-norm residual layer for each letter."""
    h = p["embed.weight"][tokens]
    for i, letter in enumerate(shape.pattern):
        b, (name, layer) = f"blocks.{i}.", BASELINE[letter]
        h = h + layer(p, f"{b}{name}.", shape, paper.rms_norm(h, p[b + "norm.weight"], shape.rms_eps))
    return paper.rms_norm(h, p["norm.weight"], shape.rms_eps) @ p.get("head.weight", p["embed.weight"]).T


def nhybrid(p: paper.Params, shape: Shape, tokens: Tensor) -> Tensor:
    """Logits of the normalized hybrid: one step on the sphere (eqs. 10, 11) for each letter."""
    h = p["embed.weight"][tokens]
    for i, letter in enumerate(shape.pattern):
        b, (name, layer) = f"blocks.{i}.", ON_SPHERE[letter]
        proposal = paper.norm(layer(p, f"{b}{name}.", shape, h))
        h = paper.step(h, proposal, paper.eigen_rate(p, b + "alpha.value", shape))
    s_z = paper.effective(p["s_z.value"], shape.s_z, shape.d_model)
    return s_z * (h @ p.get("head.weight", p["embed.weight"]).T)
