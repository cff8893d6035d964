"""The normalized Transformer, nGPT (Loshchilov et al., arXiv 2410.01131). Read beside `gpt.py`: the difference is the paper.

| weight | shape | unit axis |
|---|---|---|
| `embed`, `head` (E_in, E_out) | [vocab, d_model] | 1, each row |
| attention `q`, `k`, `v` | [heads*d_k, d_model] | 1, each row |
| attention `o` | [d_model, heads*d_k] | 0, each column |
| MLP `u`, `v` | [d_ff, d_model] | 1, each row |
| MLP `o` | [d_model, d_ff] | 0, each column |

Every matrix starts as N(0, 1/sqrt(d_model)) and is normalized; learned scales start at their effective `init`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spherelm.layers.attention import UnitAttention
from spherelm.layers.cache import LayerCache
from spherelm.layers.feedforward import UnitFeedForward
from spherelm.layers.linear import FORMS, Linear, Scale, UnitEmbedding, UnitExpertLinear, UnitLinear, retract
from spherelm.layers.moe import Router
from spherelm.layers.readout import Readout, preconditioned, scaled
from spherelm.layers.rope import ROPES, RotaryTable
from spherelm.models.decoder import LanguageModel, check_shape
from spherelm.sphere import norm, riemannian_step, step


def nvidia_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """`step` from `Norm(h)`, as NVIDIA/ngpt takes it: for a unit `h` the same point, whose gradient has no part along `h`.

    Only the input embeddings notice: every later `h` is the result of a `norm`, which lets no such part through.
    """
    return step(norm(h), target, alpha)


STEPS = {"lerp": step, "nvidia": nvidia_step, "riemannian": riemannian_step}
"""The steps on the sphere, by the name that a config's field `step` has."""

SIGNS: dict[str, Callable[[Tensor], Tensor]] = {"positive": torch.abs, "free": torch.positive}
"""What becomes of a learned alpha, by the name that a config's field `alpha_sign` has; `torch.positive` leaves it."""

SCALES = ("alpha", "s_qk", "s_u", "s_v", "s_z")
"""The learned scales; each has `*_init`, `*_scale` and `*_form` in the config."""

Reading = Callable[[Tensor, Linear, Tensor], Readout]
"""(h, head, s_z) -> readout."""


@dataclass(frozen=True)
class NGPTConfig:
    """The shape of an `NGPT` and where its learned scales start; the defaults are the paper's (section 2.5).

    `None` for `n_kv_heads` means n_heads, for `d_ff` 4 d_model, for a `*_scale` 1/sqrt(d_model). rope: as in `GPTConfig`.
    step: "lerp", the paper's step on the sphere, or "nvidia", which normalizes the point that it starts from as well.
    logit_preconditioning: the exponent q of `layers.readout.preconditioned`, 0 for the plain gradient. common_start: with which
    weight every row of an embedding starts towards one direction (`draw_on_sphere`). For ablations (Tables
    4 to 6): step "riemannian" (eqs. 24-26); a `*_form` is one of `FORMS`, a value for each entry, one learned for all, or one
    fixed; alpha_sign "free" lets eigen learning rates be negative; without qk_norm queries and keys are not normalized.
    """

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_seq_len: int = 1024
    rope_base: float = 10000.0
    rope: str = "standard"
    step: str = "lerp"
    tie_embeddings: bool = False
    alpha_init: float = 0.05
    alpha_scale: float | None = None
    s_qk_init: float = 1.0
    s_qk_scale: float | None = None
    s_u_init: float = 1.0
    s_u_scale: float = 1.0
    s_v_init: float = 1.0
    s_v_scale: float = 1.0
    s_z_init: float = 1.0
    s_z_scale: float | None = None
    logit_preconditioning: float = 0.0
    common_start: float = 0.0
    alpha_form: str = "vector"
    s_qk_form: str = "vector"
    s_u_form: str = "vector"
    s_v_form: str = "vector"
    s_z_form: str = "vector"
    alpha_sign: str = "positive"
    qk_norm: bool = True

    def __post_init__(self) -> None:
        check_shape(self)
        named: dict[str, Iterable[str]] = {"step": STEPS, "alpha_sign": SIGNS}
        named |= {f"{name}_form": FORMS for name in SCALES}
        for name, known in named.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in SCALES:
            if not getattr(self, f"{name}_init") > 0:
                raise ValueError(f"{name}_init must be positive, got {getattr(self, f'{name}_init')}")
            stored = getattr(self, f"{name}_scale")
            if stored is not None and not stored > 0:
                raise ValueError(f"{name}_scale must be positive or None, got {stored}")
        for name in ("logit_preconditioning", "common_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def default_scale(config: NGPTConfig, name: str) -> float:
    """The stored start of the learned scale `name`: its `*_scale` field, or 1/sqrt(d_model) where that is None."""
    value: float | None = getattr(config, f"{name}_scale")
    return 1 / math.sqrt(config.d_model) if value is None else value


def learned_scale(config: NGPTConfig, name: str, shape: int | tuple[int, ...]) -> Scale:
    """The learned scale `name` with the init and scale that the config gives it."""
    return Scale(shape, getattr(config, f"{name}_init"), default_scale(config, name), getattr(config, f"{name}_form"))


def reading_of(config: NGPTConfig) -> Reading:
    """How the logits are read, and their gradients come back: as the config's `logit_preconditioning` says."""
    q = config.logit_preconditioning
    return partial(preconditioned, q=q) if q else scaled


def draw_on_sphere(model: nn.Module, d_model: int, common_start: float = 0.0) -> None:
    """Draw every matrix of `model` anew, N(0, 1/sqrt(d_model)); set its learned scales to their start.

    The unit matrices are normalized; a router's is drawn like them and is not. With `common_start` > 0 each row of an embedding
    becomes Norm(row + common_start c), with a unit vector c that is drawn for each embedding: logits start nearly equal, as
    a GPT's with small weights do, however large s_z is, and tokens that have not been seen stay beside each other. Ours.
    """
    for module in model.modules():
        if isinstance(module, Scale):
            module.reset_parameters()
        elif isinstance(module, UnitLinear | UnitEmbedding | UnitExpertLinear | Router):
            nn.init.normal_(module.weight, std=1 / math.sqrt(d_model))
        if isinstance(module, Router):
            module.reset_balance()
    retract(model)
    if common_start:
        with torch.no_grad():
            for weight in embedding_weights(model):
                weight.add_(norm(torch.randn(d_model, device=weight.device)), alpha=common_start)
        retract(model)


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The matrices [vocab, d_model] that tokens are read with and logits are read out with; one that does both once."""
    weights = [
        module.weight
        for module in model.modules()
        if isinstance(module, UnitEmbedding | UnitLinear) and module.role != "matrix"
    ]
    return list({id(weight): weight for weight in weights}.values())


class NGPTBlock(nn.Module):
    """`h <- Norm(h + alpha_A (Norm(ATTN(h)) - h))`, then the same with the MLP and `alpha_M` (eqs. 10, 11)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        d, d_ff = config.d_model, config.d_ff or 4 * config.d_model
        self.step, self.sign = STEPS[config.step], SIGNS[config.alpha_sign]
        self.alpha_a, self.alpha_m = learned_scale(config, "alpha", d), learned_scale(config, "alpha", d)
        s_qk = learned_scale(config, "s_qk", (config.n_heads, d // config.n_heads))
        n_kv_heads, rope = config.n_kv_heads or config.n_heads, ROPES[config.rope]
        self.attention = UnitAttention(d, config.n_heads, n_kv_heads, s_qk, rope, config.qk_norm)
        self.mlp = UnitFeedForward(d, d_ff, learned_scale(config, "s_u", d_ff), learned_scale(config, "s_v", d_ff))

    def forward(
        self, h: Tensor, table: RotaryTable, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Unit vectors [batch, seq, d_model] -> the same."""
        h = self.step(h, norm(self.attention(h, table, mask, cache)), self.sign(self.alpha_a()))
        h = self.step(h, norm(self.mlp(h)), self.sign(self.alpha_m()))
        return h


class NGPT(LanguageModel):
    """nGPT: logits `z = s_z (h E_out^T)`, cosines with one learned scale per vocabulary entry (eq. 3)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        self.embed = UnitEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(NGPTBlock(config) for _ in range(config.n_layers))
        self.head = UnitLinear(config.d_model, config.vocab_size, unit_axis=1, role="output_embedding")
        self.s_z = learned_scale(config, "s_z", config.vocab_size)
        self.reading, self.common_start = reading_of(config), config.common_start
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix anew and put it on the sphere; set the learned scales to their start."""
        draw_on_sphere(self, self.config.d_model, self.common_start)

    def readout(self, h: Tensor) -> Readout:
        return self.reading(h, self.head, self.s_z())
