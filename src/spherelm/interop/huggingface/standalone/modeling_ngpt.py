"""The normalized Transformer, nGPT (Loshchilov et al., arXiv 2410.01131): every vector of the hidden state is unit.

Numbers of equations and sections are the paper's. Written by spherelm, to be read; it needs torch and transformers.
Copyright the spherelm authors. Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Cache
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_spherelm import SphereLMConfig
from .modeling_spherelm import (
    ROTATIONS,
    AttentionPart,
    SphereLMForCausalLM,
    SphereLMModel,
    eager_attention,
    split_heads,
)


def norm(x: Tensor, dim: int = -1) -> Tensor:
    """Every vector along `dim` on the unit sphere (section 2.1); its length is computed in float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dim).to(x.dtype)


# ---- Weights: unit vectors along the hidden state, which training keeps on the sphere

unit_modules: WeakSet[nn.Module] = WeakSet()
"""Every module whose weight has unit vectors along its `unit_axis`."""


class Unit(nn.Module):
    """A module whose `weight` has unit vectors along `unit_axis`."""

    weight: nn.Parameter
    unit_axis: int = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unit_modules.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        super().__setstate__(state)
        unit_modules.add(self)

    def draw(self) -> None:
        """Directions at random."""
        init.copy_(self.weight, norm(torch.randn_like(self.weight), self.unit_axis))


class UnitLinear(Unit, nn.Linear):
    """A product without bias: unit rows, or unit columns if it `writes` to the hidden state (sections 2.3, 2.4)."""

    def __init__(self, in_features: int, out_features: int, writes: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.unit_axis = 0 if writes else 1


class UnitEmbedding(Unit, nn.Embedding):
    """An embedding with unit rows (section 2.1)."""


@torch.no_grad()
def retract_moved(optimizer: Optimizer, *_: Any) -> None:
    """Put the unit weights of `optimizer` back on the sphere (section 2.6), after a step of any optimizer."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in list(unit_modules):
        if id(module.weight) in moved:
            module.weight.copy_(norm(module.weight, module.unit_axis))


register_optimizer_step_post_hook(retract_moved)


def check_unit(model: Any, *_: Any) -> None:
    """Before training passes 1, 2, 4, 8, ...: raise `ValueError` if a trained weight has left the sphere."""
    if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    if model.config.folded:
        raise ValueError("a folded model is for inference: train the model that it was made from")
    model.passes += 1
    for name, module in model.named_modules() if model.passes & (model.passes - 1) == 0 else ():
        if module in unit_modules and type(module.weight.data) is Tensor and module.weight.requires_grad:
            lengths = torch.linalg.vector_norm(module.weight.detach().float(), dim=module.unit_axis)
            if lengths.numel() and (lengths - 1).abs().max() > 0.01:
                raise ValueError(f"{name} has left the unit sphere: something else than a torch optimizer moved it")


class Scale(nn.Module):
    """A learned scale: stored as `value`, used as `value * init / scale` (section 2.5), times a constant `gain`."""

    def __init__(self, config: SphereLMConfig, name: str, *shape: int, gain: float = 1.0) -> None:
        super().__init__()
        spec = config.start[name]
        self.stored = spec["scale"] or config.d_model**-0.5
        self.shape, self.factor = shape, spec["init"] / self.stored * gain
        stored_shape = shape if spec["form"] == "vector" else (1,)
        self.value = nn.Parameter(torch.full(stored_shape, self.stored), requires_grad=spec["form"] != "fixed")

    def draw(self) -> None:
        """The start."""
        init.constant_(self.value, self.stored)

    def effective(self) -> Tensor:
        """The scale that is meant, in its shape."""
        return (self.value * self.factor).expand(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the scale."""
        return x * self.effective().to(x.dtype)


def foldable(config: SphereLMConfig, name: str, *shape: int, gain: float = 1.0) -> nn.Module:
    """A scale of a product's results, which in a folded model is in the product's matrix."""
    return nn.Identity() if config.folded else Scale(config, name, *shape, gain=gain)


# ---- Steps on the sphere, and the parts of a block


def lerp_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """`Norm(h + alpha (target - h))` (eqs. 10, 11)."""
    return norm(h + alpha * (target - h))


STEPS: dict[str, Any] = {
    "lerp": lerp_step,
    "nvidia": lambda h, target, alpha: lerp_step(norm(h), target, alpha),
    "riemannian": lambda h, x, alpha: norm(h - alpha * ((h * x).sum(-1, keepdim=True) * h - x)),  # eqs. 24 to 26
}
SIGNS = {"positive": torch.abs, "free": torch.positive}


def inner_norm(config: SphereLMConfig) -> Any:
    """What a matrix that writes reads: unit vectors if the config says so; folded, the step's norm does it."""
    return norm if config.start["variant"]["inner_norm"] and not config.folded else torch.positive


class Step(nn.Module):
    """A sublayer: `h` moves on the sphere a part `alpha` of the way to `Norm(part(h))`, channel by channel."""

    def __init__(self, config: SphereLMConfig, part: nn.Module) -> None:
        super().__init__()
        variant = config.start["variant"]
        self.step, self.sign = STEPS[variant["step"]], SIGNS[variant["alpha_sign"]]
        self.alpha, self.part = Scale(config, "alpha", config.d_model), part

    def forward(self, h: Tensor, **around: Any) -> Tensor:
        """Unit vectors [batch, seq, d_model] -> the same."""
        made, _ = self.part(h, **around)
        wide = torch.promote_types(h.dtype, torch.float32)
        return self.step(h.to(wide), norm(made).to(wide), self.sign(self.alpha.effective())).to(h.dtype)


class UnitAttention(AttentionPart):
    """Queries and keys are unit vectors per head; the softmax scale is sqrt(d_k) (eqs. 12, 13, 15, 16).

    Both carry `s_qk` in the paper. Only the product counts, so it is here once, squared, on the queries.
    """

    def __init__(self, config: SphereLMConfig, layer_idx: int, is_causal: bool = True) -> None:
        super().__init__(config, layer_idx, math.sqrt(config.head_dim), is_causal)
        kv_width = self.n_kv_heads * self.d_k
        self.rotate, qk_norm = ROTATIONS[config.rope], config.start["variant"]["qk_norm"]
        self.unit, self.inner = norm if qk_norm else torch.positive, inner_norm(config)
        self.q, self.k = UnitLinear(config.d_model, config.d_model), UnitLinear(config.d_model, kv_width)
        self.v, self.o = UnitLinear(config.d_model, kv_width), UnitLinear(config.d_model, config.d_model, writes=True)
        self.s_qk = Scale(config, "s_qk", config.n_heads, self.d_k)

    def forward(
        self,
        h: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, seq, d_model] -> the same, and the attention weights where the attention function has them."""
        q, k, v = self.q(h), self.k(h), self.v(h)
        q, k, v = (split_heads(x, self.d_k) for x in (q, k, v))
        q, k = self.unit(self.rotate(q, table)), self.unit(self.rotate(k, table))
        q = q * self.s_qk.effective().square().unsqueeze(1).to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        made, weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o(self.inner(made.reshape(*h.shape[:-1], -1))), weights


class UnitFeedForward(nn.Module):
    """SwiGLU: `W_o (s_u u * SiLU(s_v sqrt(d_model) v))` with `u = W_u h`, `v = W_v h` (eqs. 17 to 21)."""

    def __init__(self, config: SphereLMConfig, layer_idx: int | None = None, width: int | None = None) -> None:
        super().__init__()
        d_ff = width or config.d_ff
        self.u, self.v = UnitLinear(config.d_model, d_ff), UnitLinear(config.d_model, d_ff)
        self.o, self.inner = UnitLinear(d_ff, config.d_model, writes=True), inner_norm(config)
        self.s_u = foldable(config, "s_u", d_ff)
        self.s_v = foldable(config, "s_v", d_ff, gain=math.sqrt(config.d_model))

    def forward(self, h: Tensor, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        return self.o(self.inner(self.s_u(self.u(h)) * F.silu(self.s_v(self.v(h))))), None


class UnitSquaredReLU(nn.Module):
    """An MLP without a gate: `W_o relu(s_u sqrt(d_model) W_u h)^2` (arXiv 2605.06067)."""

    def __init__(self, config: SphereLMConfig, layer_idx: int | None = None, width: int | None = None) -> None:
        super().__init__()
        d_ff = width or config.d_ff
        self.u, self.o = UnitLinear(config.d_model, d_ff), UnitLinear(d_ff, config.d_model, writes=True)
        self.s_u, self.inner = foldable(config, "s_u", d_ff, gain=math.sqrt(config.d_model)), inner_norm(config)

    def forward(self, h: Tensor, **around: Any) -> tuple[Tensor, None]:
        """[batch, seq, d_model] -> the same."""
        return self.o(self.inner(self.s_u(self.u(h)).relu().square())), None


MLPS: dict[str, Any] = {"swiglu": UnitFeedForward, "relu2": UnitSquaredReLU}


class Head(nn.Module):
    """Logits `s_z (h E_out^T)`: cosines, each with a learned scale (eq. 3)."""

    def __init__(self, config: SphereLMConfig) -> None:
        super().__init__()
        self.norm = nn.Identity()
        if not config.folded:
            self.linear = UnitLinear(config.d_model, config.vocab_size)
            self.s_z = Scale(config, "s_z", config.vocab_size)

    def forward(self, h: Tensor) -> Tensor:
        """[..., d_model] -> [..., vocab]."""
        return self.s_z(self.linear(h))


class NGPTModel(SphereLMModel):
    """nGPT without its logits."""

    parts = {"A": UnitAttention, "-": lambda config, *rest: MLPS[config.activation](config, *rest)}
    sublayer, embedding, head_class = Step, UnitEmbedding, Head
    passes = 0

    def __init__(self, config: SphereLMConfig) -> None:
        super().__init__(config)
        self.register_forward_pre_hook(check_unit)


class NGPTForCausalLM(SphereLMForCausalLM):
    """nGPT as a language model. Any torch optimizer keeps its weights on the sphere (`retract_moved`)."""

    model_class = NGPTModel
