"""The same model for inference: every learned scale and gain inside the matrices, products that share an input joined.

| learned | goes into |
|---|---|
| nGPT `s_z` | the rows of the output embedding, which then is a matrix of its own where it was tied |
| nGPT `s_u`, `s_v` sqrt(d_model) | the rows of the MLP's `u` and `v`; without a gate `s_u` sqrt(d_model) those of `u` |
| nGPT `alpha` | one vector a sub-block: the sign taken, init and scale multiplied in |
| nGPT `s_qk` | one vector a layer, squared, and a vector of ones for the keys |
| GPT's RMSNorm gains | the columns of the matrices that read the normalized state |

`s_qk` cannot go into `W_q`: the query is normalized after the product, which would take a common factor out again and
let the others change its length; and it acts channel by channel after the rotation, which mixes channels i and i +
d_k/2 by angles that depend on the position. It costs (n_heads + n_kv_heads) d_k multiplications a layer and token, one
pass over queries and keys.

FNGPT's inner norms are left out: `Norm(W_o Norm(y)) = Norm(W_o y)`, and the step takes the norm of what a part makes.
They are for products in formats of few bits, which are not folded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm import sphere
from spherelm.errors import UserError
from spherelm.layers.attention import Attend, Attention, UnitAttention, attend, join_heads, split_heads
from spherelm.layers.cache import LayerCache
from spherelm.layers.feedforward import FeedForward, SquaredReLU, UnitFeedForward, UnitSquaredReLU
from spherelm.layers.linear import INNER_NORMS, Embedding, Linear, Scale, UnitEmbedding, UnitLinear
from spherelm.layers.readout import Readout
from spherelm.layers.rmsnorm import RMSNorm
from spherelm.layers.rope import RotaryTable, Rotation
from spherelm.models import GPT, NGPT, gpt, ngpt
from spherelm.models.decoder import Block, Decoder, LanguageModel
from spherelm.models.kit import Surroundings
from spherelm.models.variants import nvidia_step

Transform = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def unit(x: Tensor) -> Tensor:
    """`sphere.norm` along the last axis without what backward needs, which takes longer than the norm of one token."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(sphere.TINY)).to(x.dtype)


def lerp_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """`sphere.step` (nGPT, eqs. 10, 11) without what backward needs; alpha:
    [d_model], in the dtype that lengths have.
    """
    return unit(torch.lerp(h.to(alpha.dtype), target.to(alpha.dtype), alpha)).to(h.dtype)


def _nvidia_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    return lerp_step(unit(h), target, alpha)


FOLDED_STEPS: dict[Step, Step] = {
    sphere.step: lerp_step,
    nvidia_step: _nvidia_step,
    sphere.riemannian_step: sphere.riemannian_step,
}
"""The folded form of each step on the sphere."""


class FoldedFeedForward(nn.Module):
    """`W_o (u * SiLU(v))`, u and v out of one product with [2 d_ff, d_model]."""

    reads: tuple[str, ...] = ()

    def __init__(self, u: Tensor, v: Tensor, o: Tensor) -> None:
        super().__init__()
        self.uv, self.o = fixed(torch.cat((u, v))), fixed(o)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        u, v = self.uv(h).chunk(2, dim=-1)
        return self.o(u * F.silu(v))


class FoldedSquaredReLU(nn.Module):
    """`W_o relu(W_u h)^2`."""

    reads: tuple[str, ...] = ()

    def __init__(self, u: Tensor, o: Tensor) -> None:
        super().__init__()
        self.u, self.o = fixed(u), fixed(o)

    def forward(self, h: Tensor) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        return self.o(F.relu(self.u(h)).square())


class UnitScale(nn.Module):
    """Unit vectors times a scale: [batch, heads, seq, d_k] queries and keys -> the same, scale [heads, 1, d_k]."""

    scale: Tensor

    def __init__(self, unit: Transform, scale: Tensor) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.scale


class NormedRotation(nn.Module):
    """The norms of queries and of keys, whose gains differ, and then `rotation`:
    [batch, heads, seq, d_k] -> the same.
    """

    gains: Tensor

    def __init__(self, source: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        q, k = source.q_norm, source.k_norm
        assert isinstance(q, RMSNorm)
        assert isinstance(k, RMSNorm)
        gains = torch.cat((q.weight.expand(source.n_heads, -1), k.weight.expand(source.n_kv_heads, -1)))
        self.rotation, self.norm = source.rotation, GainlessNorm(q)
        self.register_buffer("gains", gains.unsqueeze(1).to(dtype, copy=True))

    def forward(self, x: Tensor, table: RotaryTable) -> Tensor:
        return self.rotation(self.norm(x) * self.gains, table)


class FoldedAttention(nn.Module):
    """The attention of `source`: its queries, keys and values are one product,
    and `finish` ends queries and keys together.

    qkv: [(n_heads + 2 n_kv_heads) d_k, d_model].
    """

    reads = Attention.reads

    def __init__(
        self, source: Attention | UnitAttention, qkv: Tensor, o: Tensor, rotation: Rotation, finish: nn.Module
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.softmax_scale = source.n_heads, source.n_kv_heads, source.softmax_scale
        self.rotation, self.finish = rotation, finish
        self.qkv, self.o = fixed(qkv), fixed(o)

    def forward(
        self,
        h: Tensor,
        table: RotaryTable,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        attend: Attend = attend,
    ) -> Tensor:
        """[batch, seq, d_model] -> the same; with a cache, `h` holds only the new positions."""
        heads = split_heads(self.qkv(h), self.n_heads + 2 * self.n_kv_heads)
        qk, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=1)
        q, k = self.finish(self.rotation(qk, table)).split((self.n_heads, self.n_kv_heads), dim=1)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.o(join_heads(attend(q, k, v, self.softmax_scale, mask)))


class GainlessNorm(nn.Module):
    """RMSNorm without a gain over the last axis."""

    def __init__(self, source: RMSNorm) -> None:
        super().__init__()
        self.shape, self.eps = source.normalized_shape, source.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> the same."""
        return F.rms_norm(x, self.shape, None, self.eps)


class FoldedResidual(nn.Module):
    """`Residual` whose gains are in the matrices of `part`."""

    def __init__(self, source: gpt.Residual, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, gain, part = GainlessNorm(source.norm), source.norm.weight, source.part
        if isinstance(part, Attention):
            qkv = torch.cat((part.q.weight, part.k.weight, part.v.weight)) * gain
            rotation = NormedRotation(part, dtype) if isinstance(part.q_norm, RMSNorm) else part.rotation
            self.part: nn.Module = FoldedAttention(
                part, qkv.to(dtype), part.o.weight.to(dtype), rotation, nn.Identity()
            )
        elif isinstance(part, SquaredReLU):
            self.part = FoldedSquaredReLU((part.u.weight * gain).to(dtype), part.o.weight.to(dtype))
        else:
            assert isinstance(part, FeedForward)
            u, v = (matrix.weight * gain for matrix in (part.u, part.v))
            self.part = FoldedFeedForward(u.to(dtype), v.to(dtype), part.o.weight.to(dtype))

    def forward(self, h: Tensor, around: Surroundings) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        return h + self.part(self.norm(h), *around.for_part(self.part))


class FoldedStep(nn.Module):
    """`Step` whose scales are in the matrices of `part`, as far as they can be."""

    alpha: Tensor

    def __init__(self, source: ngpt.Step, dtype: torch.dtype) -> None:
        super().__init__()
        self.step, part = FOLDED_STEPS[source.step], source.part
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("alpha", source.sign(source.alpha()).to(wide, copy=True))
        if isinstance(part, UnitAttention):
            s_qk = part.s_qk().square().unsqueeze(1)
            scale = torch.cat((s_qk, torch.ones_like(s_qk[:1]).expand(part.n_kv_heads, -1, -1)))
            finish = UnitScale(unit if part.qk_norm else torch.positive, scale.to(dtype))
            qkv = torch.cat((part.q.weight, part.k.weight, part.v.weight))
            self.part: nn.Module = FoldedAttention(
                part, qkv.to(dtype), part.o.weight.to(dtype), part.rope.rotation, finish
            )
        elif isinstance(part, UnitSquaredReLU):
            u = part.u.scaled_weight(part.s_u() * part.input_gain)
            self.part = FoldedSquaredReLU(u.to(dtype), part.o.weight.to(dtype))
        else:
            assert isinstance(part, UnitFeedForward)
            u, v = part.u.scaled_weight(part.s_u()), part.v.scaled_weight(part.s_v() * part.gate_gain)
            self.part = FoldedFeedForward(u.to(dtype), v.to(dtype), part.o.weight.to(dtype))

    def forward(self, h: Tensor, around: Surroundings) -> Tensor:
        """Unit vectors [batch, seq, d_model] -> the same."""
        return self.step(h, unit(self.part(h, *around.for_part(self.part))), self.alpha)


class FoldedHead(nn.Module):
    """Logits as one product."""

    def __init__(self, source: gpt.Head | ngpt.Head, dtype: torch.dtype) -> None:
        super().__init__()
        if isinstance(source, gpt.Head):
            self.norm: nn.Module = GainlessNorm(source.norm)
            weight = source.linear.weight * source.norm.weight
        else:
            self.norm = nn.Identity()
            weight = source.linear.scaled_weight(source.s_z())
        self.linear = fixed(weight.to(dtype))

    def forward(self, h: Tensor) -> Readout:
        """[..., d_model] -> what the logits are computed from."""
        return Readout(self.norm(h), self.linear.weight)


def folded_block(block: Block, dtype: torch.dtype) -> Block:
    """`block` with folded sublayers."""
    fold: Any = {gpt.Residual: FoldedResidual, ngpt.Step: FoldedStep}
    return Block(block.letters, {name: fold[type(part)](part, dtype) for name, part in block.sublayers.items()})


class Folded(LanguageModel):
    """The result of `folded`: a decoder whose weights are fixed."""

    def __init__(self, source: LanguageModel) -> None:
        nn.Module.__init__(self)
        self.config = source.config
        dtype = source.runtime.compute_dtype or source.embed.weight.dtype
        self.runtime = replace(source.runtime, compute_dtype=None)
        with torch.device("meta"):
            self.embed = Embedding(*source.embed.weight.shape)
        self.embed.weight = frozen(source.embed.weight.to(dtype))
        self.blocks = nn.ModuleList(folded_block(block, dtype) for block in source.blocks)  # type: ignore[arg-type]
        self.head = FoldedHead(source.head, dtype)
        self.eval()

    def init_weights(self) -> NoReturn:
        self._refuse()

    def train(self, mode: bool = True) -> Folded:
        """Refused, unless mode is False."""
        if mode:
            self._refuse()
        super().train(False)
        return self

    def _refuse(self) -> NoReturn:
        raise UserError("a folded model is for inference: train the model that it was made from, and fold that again")


def fixed(weight: Tensor) -> Linear:
    """A matrix product with a copy of `weight` [out_features, in_features], which has no gradient."""
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = frozen(weight)
    return linear


def frozen(weight: Tensor) -> nn.Parameter:
    """A copy of `weight` as a parameter without a gradient."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


KNOWN: tuple[type[nn.Module], ...] = (
    *(Block, RMSNorm, nn.Identity, nn.ModuleList),
    *(gpt.Residual, Attention, FeedForward, SquaredReLU, Embedding, Linear, gpt.Head),
    *(ngpt.Step, UnitAttention, UnitFeedForward, UnitSquaredReLU, Scale, UnitEmbedding, UnitLinear, ngpt.Head),
)
"""The modules that a foldable model may consist of, besides itself."""


def obstacle(model: nn.Module) -> str | None:
    """Why `model` cannot be folded, as the end of a sentence; `None` if it can."""
    if type(model) not in (GPT, NGPT) or any(block.letters != "A-" for block in model.blocks):  # type: ignore[union-attr]
        return f"{type(model).__name__} is not a language model of attention and MLP alone"
    for name, module in model.named_modules():
        if (module is not model and type(module) not in KNOWN) or "forward" in module.__dict__:
            return f"{name} is a {type(module).__name__}, not spherelm's"
        if "product" in module.__dict__:
            return f"the product of {name} is rounded or replaced, which a folded one would not be"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks, which would not be called"
        if getattr(module, "step", sphere.step) not in FOLDED_STEPS:
            return f"{name} takes a step on the sphere that is not known here"
        if getattr(module, "inner", torch.positive) not in INNER_NORMS.values():
            return f"{name} has an inner norm that is not known here"
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:
            return f"{name} is not a plain tensor but a {type(parameter.data).__name__}"
    return None


@torch.no_grad()
def folded(model: Decoder) -> LanguageModel:
    """The model that computes what `model` computes, to rounding,
    and whose learned scales and gains sit in its matrices.

    For inference: it refuses `train()`, none of its weights takes a gradient, none declares a unit axis. It is a copy,
    as large as the model again, in the dtype that the model computes in, and does not follow when the model changes. A
    folded model comes back as it is. Raises `ValueError` for a model with parts that are not known here.
    """
    if isinstance(model, Folded):
        return model
    problem = obstacle(model)
    if problem is not None:
        raise UserError(f"this model cannot be folded: {problem}; use it as it is (fold=False)")
    assert isinstance(model, LanguageModel)
    return Folded(model)
