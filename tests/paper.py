"""The papers' equations, written out in float64 as plain functions on dictionaries of tensors.

This is the oracle: it has no modules, no optimizers, and takes nothing from ``spherelm`` except the names of the
parameters, so that both can be compared key by key. It is written to be read against the paper, not to be fast:
heads are looped over where the paper speaks of a head, softmax and cross-entropy are spelled out, and Adam is its
definition. Equation numbers are those of nGPT (arXiv 2410.01131 v2) unless another paper is named.

A set of parameters is ``dict[str, Tensor]``:

    embed.weight [V, d]  head.weight [V, d] (absent when tied)  blocks.{i}.attention.{q,k,v,o}.weight
    blocks.{i}.mlp.{u,v,o}.weight                               GPT: blocks.{i}.norm_{a,m}.weight  norm.weight
    nGPT: blocks.{i}.alpha_{a,m}.value  blocks.{i}.attention.s_qk.value  blocks.{i}.mlp.s_{u,v}.value  s_z.value

Encoder-decoders add, to the same names for the decoder:

    encoder.embed.weight (absent when shared)  encoder.blocks.{i}.* as above  blocks.{i}.cross.{q,k,v,o}.weight
    EncDec: blocks.{i}.norm_c.weight  encoder.norm.weight        NEncDec: blocks.{i}.alpha_c.value
    blocks.{i}.cross.s_qk.value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Forward = Callable[[Params, "Shape", Any], Tensor]


@dataclass(frozen=True)
class Shape:
    """Constants of the equations beside the parameters; ``init`` and ``scale`` are section 2.5's, by scale."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    rope_base: float = 10000.0
    rms_eps: float = 1e-6
    alpha: tuple[float, float] = (0.05, 0.0)
    s_qk: tuple[float, float] = (1.0, 0.0)
    s_u: tuple[float, float] = (1.0, 1.0)
    s_v: tuple[float, float] = (1.0, 1.0)
    s_z: tuple[float, float] = (1.0, 0.0)
    n_encoder_layers: int = 0
    inner_norm: bool = False

    @property
    def d_k(self) -> int:
        return self.d_model // self.n_heads


def effective(stored: Tensor, init_scale: tuple[float, float], d_model: int) -> Tensor:
    """Section 2.5: a scale is stored starting at ``scale`` and used as ``stored * init / scale``.

    A ``scale`` of 0 stands for the paper's ``1/sqrt(d_model)``.
    """
    init, scale = init_scale
    return stored * (init / (scale or d_model**-0.5))


# ---------------------------------------------------------------------------------------------- shared pieces


def norm(x: Tensor, dim: int = -1) -> Tensor:
    """``x / ||x||_2`` along ``dim``."""
    return x / torch.sqrt((x * x).sum(dim, keepdim=True))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rope(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of ``x [B, T, d_k]``: channels i and i + d_k/2 of position m turn by ``m * base^(-2i/d_k)``."""
    length, d_k = x.shape[-2:]
    half = d_k // 2
    positions = torch.arange(length, dtype=x.dtype)
    columns: list[Tensor] = [torch.empty(0)] * d_k
    for i in range(half):
        angle = positions * base ** (-2 * i / d_k)
        first, second = x[..., i], x[..., i + half]
        columns[i] = first * torch.cos(angle) - second * torch.sin(angle)
        columns[i + half] = first * torch.sin(angle) + second * torch.cos(angle)
    return torch.stack(columns, -1)


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys, key j visible to query i when j <= i. ``scores [..., T, T]``."""
    length = scores.shape[-1]
    visible = torch.arange(length)[None, :] <= torch.arange(length)[:, None]
    scores = torch.where(visible, scores, torch.full_like(scores, -math.inf))
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def head(weight: Tensor, index: int, d_k: int) -> Tensor:
    """Rows of one head: ``weight [heads * d_k, d]`` to ``[d_k, d]``."""
    return weight[index * d_k : (index + 1) * d_k]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not -100 of ``log sum exp(z) - z[target]``, in nats."""
    return smoothed_cross_entropy(logits, targets, 0.0)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al., arXiv 1512.00567): a target is ``(1 - e) one-hot + e / V``;
    ``cross_entropy`` at 0.
    """
    keep = targets != -100
    z, wanted = logits[keep], targets[keep]
    top = z.detach().amax(-1, keepdim=True)
    log_sum = torch.log(torch.exp(z - top).sum(-1)) + top.squeeze(-1)
    return (log_sum - (1 - smoothing) * z[torch.arange(len(wanted)), wanted] - smoothing * z.mean(-1)).mean()


# ---------------------------------------------------------------------------------------------- GPT, eqs. 1-9


def gpt_softmax_scale(d_k: int) -> float:
    return 1 / math.sqrt(d_k)


def q_or_k(p: Params, name: str, shape: Shape, x: Tensor) -> Tensor:
    """One head's queries or keys, through the RMSNorm that today's GPTs have there, if this one has it."""
    return rms_norm(x, p[name + "_norm.weight"], shape.rms_eps) if name + "_norm.weight" in p else x


def gpt_attention(p: Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    """ATTN of eq. 4: softmax of eq. 13's left hand side, head by head; k/v head j serves n_heads/n_kv_heads queries."""
    group, d_k = shape.n_heads // shape.n_kv_heads, shape.d_k
    heads = []
    for i in range(shape.n_heads):
        q = rope(q_or_k(p, prefix + "q", shape, h @ head(p[prefix + "q.weight"], i, d_k).T), shape.rope_base)
        k = rope(q_or_k(p, prefix + "k", shape, h @ head(p[prefix + "k.weight"], i // group, d_k).T), shape.rope_base)
        v = h @ head(p[prefix + "v.weight"], i // group, d_k).T
        heads.append(causal_softmax(q @ k.transpose(-1, -2) * gpt_softmax_scale(d_k)) @ v)
    return torch.cat(heads, -1) @ p[prefix + "o.weight"].T


def squared_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, torch.zeros_like(x))


def gpt_mlp(p: Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    """Eqs. 17 to 19; without a matrix ``v``, that of "Natively 4-Bit" (arXiv 2605.06067): squared ReLU, no gate."""
    if prefix + "v.weight" not in p:
        return squared_relu(h @ p[prefix + "u.weight"].T) @ p[prefix + "o.weight"].T
    u, v = h @ p[prefix + "u.weight"].T, h @ p[prefix + "v.weight"].T
    return (u * silu(v)) @ p[prefix + "o.weight"].T


def gpt(p: Params, shape: Shape, tokens: Tensor) -> Tensor:
    """Logits of the baseline: ``[B, T]`` to ``[B, T, V]``."""
    h = p["embed.weight"][tokens]
    for i in range(shape.n_layers):
        b = f"blocks.{i}."
        h = h + gpt_attention(p, b + "attention.", shape, rms_norm(h, p[b + "norm_a.weight"], shape.rms_eps))
        h = h + gpt_mlp(p, b + "mlp.", shape, rms_norm(h, p[b + "norm_m.weight"], shape.rms_eps))
    h = rms_norm(h, p["norm.weight"], shape.rms_eps)
    return h @ p.get("head.weight", p["embed.weight"]).T


# ---------------------------------------------------------------------------------------------- nGPT, eqs. 10-21


def softmax_scale(d_k: int) -> float:
    return math.sqrt(d_k)


def eigen_rate(p: Params, name: str, shape: Shape) -> Tensor:
    """alpha of eqs. 10 and 11, non-negative."""
    return torch.abs(effective(p[name], shape.alpha, shape.d_model))


def scale_q_k(q: Tensor, k: Tensor, s_qk: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 15 and 16 after rotation: the same ``s_qk [d_k]`` of this query head on both."""
    return norm(q) * s_qk, norm(k) * s_qk


def written(shape: Shape, x: Tensor) -> Tensor:
    """What the matrix that writes to the hidden state reads: FNGPT (arXiv 2605.06067) normalizes it."""
    return norm(x) if shape.inner_norm else x


def attention(p: Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    group, d_k = shape.n_heads // shape.n_kv_heads, shape.d_k
    s_qk = effective(p[prefix + "s_qk.value"], shape.s_qk, shape.d_model)
    heads = []
    for i in range(shape.n_heads):
        q = rope(h @ head(p[prefix + "q.weight"], i, d_k).T, shape.rope_base)
        k = rope(h @ head(p[prefix + "k.weight"], i // group, d_k).T, shape.rope_base)
        v = h @ head(p[prefix + "v.weight"], i // group, d_k).T
        q, k = scale_q_k(q, k, s_qk[i])
        heads.append(causal_softmax(q @ k.transpose(-1, -2) * softmax_scale(d_k)) @ v)
    return written(shape, torch.cat(heads, -1)) @ p[prefix + "o.weight"].T


def v_scale(d_model: int) -> float:
    """Eq. 21's sqrt(d_model): brings v back to the range where SiLU is not linear."""
    return math.sqrt(d_model)


def mlp(p: Params, prefix: str, shape: Shape, h: Tensor) -> Tensor:
    """Eqs. 17 to 21; without a matrix ``v``, ``W_o relu(s_u sqrt(d_model) W_u h)^2`` (arXiv 2605.06067)."""
    u = h @ p[prefix + "u.weight"].T * effective(p[prefix + "s_u.value"], shape.s_u, shape.d_model)
    if prefix + "v.weight" not in p:
        return written(shape, squared_relu(u * math.sqrt(shape.d_model))) @ p[prefix + "o.weight"].T
    v = h @ p[prefix + "v.weight"].T * effective(p[prefix + "s_v.value"], shape.s_v, shape.d_model)
    return written(shape, u * silu(v * v_scale(shape.d_model))) @ p[prefix + "o.weight"].T


def step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Eqs. 10 and 11: ``Norm(h + alpha (h_A - h))``."""
    return norm(h + alpha * (target - h))


def ngpt(p: Params, shape: Shape, tokens: Tensor) -> Tensor:
    """Logits of the normalized Transformer: ``[B, T]`` to ``[B, T, V]``."""
    h = p["embed.weight"][tokens]
    for i in range(shape.n_layers):
        b = f"blocks.{i}."
        h = step(h, norm(attention(p, b + "attention.", shape, h)), eigen_rate(p, b + "alpha_a.value", shape))
        h = step(h, norm(mlp(p, b + "mlp.", shape, h)), eigen_rate(p, b + "alpha_m.value", shape))
    s_z = effective(p["s_z.value"], shape.s_z, shape.d_model)
    return s_z * (h @ p.get("head.weight", p["embed.weight"]).T)


# ---------------------------------------------------------------------------------------------- encoder-decoders
# No paper writes these down: the Transformer's encoder and decoder (Vaswani et al., arXiv 1706.03762, section 3) with
# GPT's and nGPT's blocks as above. A source row is [S] ids, negative where there is nothing. Rows are computed one by
# one, each cut to its real length, so that there is no padding here that could be treated wrongly.

Pairs = tuple[Tensor, Tensor]


def softmax(scores: Tensor) -> Tensor:
    """Over all keys: nothing is hidden."""
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def gpt_encoder(p: Params, shape: Shape, source: Tensor) -> Tensor:
    """States [S, d] of one real source [S], each position attending to every other; RMSNorm at the end."""
    h, d_k = p.get("encoder.embed.weight", p["embed.weight"])[source], shape.d_k
    for i in range(shape.n_encoder_layers):
        b = f"encoder.blocks.{i}."
        x, heads, a = rms_norm(h, p[b + "norm_a.weight"], shape.rms_eps), [], b + "attention."
        for j in range(shape.n_heads):
            k_head = head(p[a + "k.weight"], j * shape.n_kv_heads // shape.n_heads, d_k)
            q = rope(q_or_k(p, a + "q", shape, x @ head(p[a + "q.weight"], j, d_k).T), shape.rope_base)
            k = rope(q_or_k(p, a + "k", shape, x @ k_head.T), shape.rope_base)
            v = x @ head(p[b + "attention.v.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T
            heads.append(softmax(q @ k.T * gpt_softmax_scale(d_k)) @ v)
        h = h + torch.cat(heads, -1) @ p[b + "attention.o.weight"].T
        h = h + gpt_mlp(p, b + "mlp.", shape, rms_norm(h, p[b + "norm_m.weight"], shape.rms_eps))
    return rms_norm(h, p["encoder.norm.weight"], shape.rms_eps)


def gpt_cross(p: Params, prefix: str, shape: Shape, h: Tensor, memory: Tensor) -> Tensor:
    """Queries from the target's ``h [T, d]``, keys and values from the source's states ``[S, d]``; no rotation."""
    heads, d_k = [], shape.d_k
    for j in range(shape.n_heads):
        q = q_or_k(p, prefix + "q", shape, h @ head(p[prefix + "q.weight"], j, d_k).T)
        k = memory @ head(p[prefix + "k.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T
        k = q_or_k(p, prefix + "k", shape, k)
        v = memory @ head(p[prefix + "v.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T
        heads.append(softmax(q @ k.T * gpt_softmax_scale(d_k)) @ v)
    return torch.cat(heads, -1) @ p[prefix + "o.weight"].T


def encdec(p: Params, shape: Shape, pairs: Pairs) -> Tensor:
    """Logits of the baseline: sources ``[B, S]`` and targets so far ``[B, T]`` to ``[B, T, V]``."""
    rows = []
    for source, tokens in zip(*pairs, strict=True):
        memory = gpt_encoder(p, shape, source[source >= 0])
        h = p["embed.weight"][tokens]
        for i in range(shape.n_layers):
            b = f"blocks.{i}."
            h = h + gpt_attention(p, b + "attention.", shape, rms_norm(h, p[b + "norm_a.weight"], shape.rms_eps))
            h = h + gpt_cross(p, b + "cross.", shape, rms_norm(h, p[b + "norm_c.weight"], shape.rms_eps), memory)
            h = h + gpt_mlp(p, b + "mlp.", shape, rms_norm(h, p[b + "norm_m.weight"], shape.rms_eps))
        h = rms_norm(h, p["norm.weight"], shape.rms_eps)
        rows.append(h @ p.get("head.weight", p["embed.weight"]).T)
    return torch.stack(rows)


def encoder(p: Params, shape: Shape, source: Tensor) -> Tensor:
    """Unit states [S, d] of one real source [S]: eqs. 10 to 21 without the causal mask."""
    h, d_k = p.get("encoder.embed.weight", p["embed.weight"])[source], shape.d_k
    for i in range(shape.n_encoder_layers):
        b = f"encoder.blocks.{i}."
        s_qk, heads = effective(p[b + "attention.s_qk.value"], shape.s_qk, shape.d_model), []
        for j in range(shape.n_heads):
            q = rope(h @ head(p[b + "attention.q.weight"], j, d_k).T, shape.rope_base)
            k = rope(
                h @ head(p[b + "attention.k.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T, shape.rope_base
            )
            v = h @ head(p[b + "attention.v.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T
            q, k = scale_q_k(q, k, s_qk[j])
            heads.append(softmax(q @ k.T * softmax_scale(d_k)) @ v)
        h_a = norm(written(shape, torch.cat(heads, -1)) @ p[b + "attention.o.weight"].T)
        h = step(h, h_a, eigen_rate(p, b + "alpha_a.value", shape))
        h = step(h, norm(mlp(p, b + "mlp.", shape, h)), eigen_rate(p, b + "alpha_m.value", shape))
    return h


def cross(p: Params, prefix: str, shape: Shape, h: Tensor, memory: Tensor) -> Tensor:
    """Eqs. 13, 15, 16 with keys of the source and without rotation; ``s_qk`` is this attention's own."""
    s_qk, heads, d_k = effective(p[prefix + "s_qk.value"], shape.s_qk, shape.d_model), [], shape.d_k
    for j in range(shape.n_heads):
        q = h @ head(p[prefix + "q.weight"], j, d_k).T
        k = memory @ head(p[prefix + "k.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T
        v = memory @ head(p[prefix + "v.weight"], j * shape.n_kv_heads // shape.n_heads, d_k).T
        q, k = scale_q_k(q, k, s_qk[j])
        heads.append(softmax(q @ k.T * softmax_scale(d_k)) @ v)
    return written(shape, torch.cat(heads, -1)) @ p[prefix + "o.weight"].T


def nencdec(p: Params, shape: Shape, pairs: Pairs) -> Tensor:
    """Logits of the normalized encoder-decoder: three steps on the sphere a decoder layer."""
    rows = []
    for source, tokens in zip(*pairs, strict=True):
        memory = encoder(p, shape, source[source >= 0])
        h = p["embed.weight"][tokens]
        for i in range(shape.n_layers):
            b = f"blocks.{i}."
            h = step(h, norm(attention(p, b + "attention.", shape, h)), eigen_rate(p, b + "alpha_a.value", shape))
            h = step(h, norm(cross(p, b + "cross.", shape, h, memory)), eigen_rate(p, b + "alpha_c.value", shape))
            h = step(h, norm(mlp(p, b + "mlp.", shape, h)), eigen_rate(p, b + "alpha_m.value", shape))
        s_z = effective(p["s_z.value"], shape.s_z, shape.d_model)
        rows.append(s_z * (h @ p.get("head.weight", p["embed.weight"]).T))
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------- unit axes

UNIT_AXIS = {
    "embed.weight": 1,
    "head.weight": 1,
    "attention.q.weight": 1,
    "attention.k.weight": 1,
    "attention.v.weight": 1,
    "attention.o.weight": 0,
    "cross.q.weight": 1,
    "cross.k.weight": 1,
    "cross.v.weight": 1,
    "cross.o.weight": 0,
    "mlp.u.weight": 1,
    "mlp.v.weight": 1,
    "mlp.o.weight": 0,
    "mamba.in_proj.weight": 1,
    "mamba.out_proj.weight": 0,
    **{f"experts.{matrix}.weight": 2 for matrix in "uv"},
    **{f"shared.0.{matrix}.weight": 1 for matrix in "uv"},
    "experts.o.weight": 1,
    "shared.0.o.weight": 0,
}


def unit_axis(name: str) -> int | None:
    """The ``d_model`` axis of a matrix in ``[out, in]`` layout, None for what is not normalized."""
    return next((axis for suffix, axis in UNIT_AXIS.items() if name.endswith(suffix)), None)


def retract(p: Params) -> Params:
    """Section 2.6, step 1: every matrix normalized along its embedding axis."""
    axes = {name: unit_axis(name) for name in p}
    return {name: w if (axis := axes[name]) is None else norm(w, axis) for name, w in p.items()}


# ---------------------------------------------------------------------------------------------- training


def loss_and_gradients(
    forward: Forward, p: Params, shape: Shape, tokens: Any, targets: Tensor
) -> tuple[Tensor, Params]:
    """Loss in nats per token and its gradient with respect to every parameter."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in p.items()}
    loss = cross_entropy(forward(leaves, shape, tokens), targets)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def clip(gradients: Params, limit: float, eps: float = 1e-6) -> Params:
    """All gradients times ``min(1, limit / (global norm + eps))``; eps is that of ``clip_grad_norm_``."""
    total = torch.sqrt(sum(((g * g).sum() for g in gradients.values()), torch.zeros((), dtype=torch.float64)))
    factor = min(1.0, limit / (float(total) + eps))
    return {name: g * factor for name, g in gradients.items()}


@dataclass
class Moments:
    """Adam's state: first and second moments and the number of steps taken."""

    first: Params
    second: Params
    count: int = 0


def no_moments(p: Params) -> Moments:
    return Moments({n: torch.zeros_like(w) for n, w in p.items()}, {n: torch.zeros_like(w) for n, w in p.items()})


@dataclass(frozen=True)
class Recipe:
    """Optimizer constants of Tables 2 and 3. ``lr`` and ``decay`` may differ by parameter name."""

    lr: Callable[[str], float]
    decay: Callable[[str], float]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    limit: float = 1.0
    on_sphere: bool = False


def adam(p: Params, gradients: Params, moments: Moments, recipe: Recipe, factor: float = 1.0) -> tuple[Params, Moments]:
    """One step of Adam with bias correction; a non-zero decay is decoupled, as in AdamW."""
    b1, b2 = recipe.betas
    t = moments.count + 1
    first = {n: b1 * moments.first[n] + (1 - b1) * g for n, g in gradients.items()}
    second = {n: b2 * moments.second[n] + (1 - b2) * g * g for n, g in gradients.items()}
    new = {}
    for name, w in p.items():
        direction = first[name] / (1 - b1**t) / (torch.sqrt(second[name] / (1 - b2**t)) + recipe.eps)
        new[name] = w - factor * recipe.lr(name) * (direction + recipe.decay(name) * w)
    return new, Moments(first, second, t)


def train(
    forward: Forward,
    p: Params,
    shape: Shape,
    batches: Iterable[tuple[Any, Tensor]],
    recipe: Recipe,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> tuple[list[float], Params]:
    """One optimizer step a batch; returns the losses before each step and the last parameters."""
    losses, moments = [], no_moments(p)
    for i, (tokens, targets) in enumerate(batches):
        loss, gradients = loss_and_gradients(forward, p, shape, tokens, targets)
        p, moments = adam(p, clip(gradients, recipe.limit), moments, recipe, factor(i))
        p = retract(p) if recipe.on_sphere else p
        losses.append(float(loss))
    return losses, p


def gpt_decay(name: str) -> float:
    """A.5: 0.1 on matrices, the embeddings among them; gains, and what a state space learns, are left alone."""
    return 0.0 if "norm" in name or ".ssm." in name else 0.1


def paper_recipe(arm: str, lr: float) -> Recipe:
    """Tables 2 and 3: AdamW for the baseline, Adam and retraction for nGPT."""
    if arm in ("gpt", "encdec", "hybrid"):
        return Recipe(lambda name: lr, gpt_decay)
    return Recipe(lambda name: lr, lambda name: 0.0, on_sphere=True)


# ---------------------------------------------------------------------------------------------- other steps and rules


def riemannian_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Eqs. 24 to 26: ``Norm(h - alpha (h (h . target) - target))``."""
    return norm(h - alpha * (h * (h * target).sum(-1, keepdim=True) - target))


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Eq. 6: spherical linear interpolation of unit vectors, the angle from their dot product."""
    theta = torch.acos((a * b).sum(-1, keepdim=True))
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def capped_move(w: Tensor, candidate: Tensor, theta_max: float, dim: int = -1) -> Tensor:
    """Angular step cap ("Training nGPT", arXiv 2608.01284), before the renormalization; one vector at a time."""
    rows, candidates = w.movedim(dim, -1), candidate.movedim(dim, -1)
    moved = []
    for old, new in zip(rows.reshape(-1, rows.shape[-1]), candidates.reshape(-1, rows.shape[-1]), strict=True):
        along = float(old @ new)
        t = new - along * old
        length = math.sqrt(float(t @ t))
        over = math.atan2(length, along) > theta_max
        moved.append(math.cos(theta_max) * old + math.sin(theta_max) * t / length if over else new)
    return torch.stack(moved).reshape(rows.shape).movedim(-1, dim)


def preconditioned_cosine_gradient(s_z: Tensor, logit_gradient: Tensor, q: float = 1.0) -> Tensor:
    """LGP ("Training nGPT"): ``dL/du = (s_z / mean(s_z))^q dL/dz``, with s_z the effective scale."""
    return (s_z / s_z.mean()) ** q * logit_gradient


# ---------------------------------------------------------------------------------------------- schedules
# Each as a function of r in [0, 1], the part of the decay that is over, to the part of the peak that is left.


def cosine_decay(r: float, end: float = 0.0) -> float:
    return end + (1 - end) * (1 + math.cos(math.pi * r)) / 2


def linear_decay(r: float, end: float = 0.0) -> float:
    return end + (1 - end) * (1 - r)


def minus_sqrt_decay(r: float, end: float = 0.0) -> float:
    """Of WSD's last part: ``1 - sqrt(r)``."""
    return end + (1 - end) * (1 - math.sqrt(r))


def log_decay(r: float, rho: float, end: float = 0.0) -> float:
    """ "Training nGPT": ``eta_min + (eta_max - eta_min) (1 - log(1 + r/rho) / log(1 + 1/rho))``."""
    return end + (1 - end) * (1 - math.log(1 + r / rho) / math.log(1 + 1 / rho))


def log_decay_area(rho: float) -> float:
    """The area under ``log_decay`` with ``end`` 0: ``1/ln(1 + 1/rho) - rho``."""
    return 1 / math.log(1 + 1 / rho) - rho


# ------------------------------------------------------------------- NVFP4 (arXiv 2605.06067; NVIDIA, arXiv 2509.25149)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code."""
E4M3 = (*(m / 8 * 2.0**-6 for m in range(8)), *((1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)))[
    :-1
]
"""Magnitudes by code; the last one is NaN."""


def nearest(value: float, magnitudes: tuple[float, ...]) -> float:
    """The nearest magnitude, of two as near as each other the one whose code is even; beyond the last one the last."""
    code = min(range(len(magnitudes)), key=lambda code: (abs(magnitudes[code] - abs(value)), code % 2))
    return math.copysign(magnitudes[code], value)


def nvfp4(x: Tensor, amax: float | None = None) -> Tensor:
    """Rows of `x` in NVFP4: 16 numbers share an E4M3 scale, all share amax / (6 * 448)."""
    of_all = (float(x.abs().max()) if amax is None else amax) / (6 * 448)
    back = x.double().clone()
    for row in back:
        for block in row.split(16):
            scale = max(nearest(float(block.abs().max()) / 6 / of_all, E4M3), 2.0**-6) * of_all
            for i, value in enumerate(block.tolist()):
                block[i] = nearest(value / scale, E2M1) * scale
    return back
