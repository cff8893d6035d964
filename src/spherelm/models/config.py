"""The configs of all models: sizes, and for each arm how its weights and learned scales start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spherelm.layers.linear import FORMS, Scale
from spherelm.layers.rope import ROPES
from spherelm.sphere import norm, riemannian_step, step


class DecoderConfig(Protocol):
    """The fields that every decoder's config shares."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int | None: ...
    @property
    def d_ff(self) -> int | None: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def rope_base(self) -> float: ...
    @property
    def rope(self) -> str: ...


def check_shape(config: DecoderConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the sizes cannot make a model."""
    for name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    if config.d_model % config.n_heads:
        raise ValueError(
            f"n_heads={config.n_heads} does not divide d_model={config.d_model}: choose n_heads among the divisors of d_model"
        )
    if (config.d_model // config.n_heads) % 2:
        raise ValueError(
            f"d_model / n_heads = {config.d_model // config.n_heads} is odd, and rotary embedding pairs channels: "
            "choose sizes that give an even number of channels per head"
        )
    if config.n_kv_heads is not None and config.n_heads % config.n_kv_heads:
        raise ValueError(f"n_kv_heads={config.n_kv_heads} does not divide n_heads={config.n_heads}")
    if not config.rope_base > 1:
        raise ValueError(f"rope_base must be greater than 1, got {config.rope_base}")
    if config.rope not in ROPES:
        raise ValueError(f"unknown rope {config.rope!r}: choose one of {', '.join(ROPES)}")


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


class Sizes:
    """What follows from the fields of a config."""

    @property
    def d_k(self: DecoderConfig) -> int:
        """Channels of a head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self: DecoderConfig) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def ff_width(self: DecoderConfig) -> int:
        """Channels inside of an MLP."""
        return self.d_ff or 4 * self.d_model


@dataclass(frozen=True)
class GPTConfig(Sizes):
    """The shape of a `GPT`. `None` for `n_kv_heads` means n_heads, for `d_ff` 4 d_model.

    rope: "standard", "nvidia" for the formula that NVIDIA/ngpt's checkpoints were trained with, or "none" for no positions.
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
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_shape(self)
        if not self.init_std > 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")


@dataclass(frozen=True)
class NGPTConfig(Sizes):
    """The shape of an `NGPT` and where its learned scales start; the defaults are the paper's (section 2.5).

    `None` for `n_kv_heads` means n_heads, for `d_ff` 4 d_model, for a `*_scale` 1/sqrt(d_model). rope: as in `GPTConfig`.
    step: "lerp", the paper's step on the sphere, or "nvidia", which normalizes the point that it starts from as well.
    logit_preconditioning: the exponent q of `layers.readout.preconditioned`, 0 for the plain gradient. common_start: with which
    weight every row of an embedding starts towards one direction (`models.start.share_direction`). For ablations (Tables
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
    return Scale(
        shape, getattr(config, f"{name}_init"), default_scale(config, name), getattr(config, f"{name}_form", "vector")
    )


class EncoderDecoderConfig(DecoderConfig, Protocol):
    """The fields that configs of encoder-decoders share."""

    @property
    def n_encoder_layers(self) -> int | None: ...


def check_encoder(config: EncoderDecoderConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the encoder's depth makes no model."""
    layers = config.n_encoder_layers
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 1):
        raise ValueError(f"n_encoder_layers must be a positive whole number or None, got {layers!r}")


@dataclass(frozen=True)
class EncDecConfig(GPTConfig):
    """The shape of an `EncDec`: that of its decoder, as in `GPTConfig`, and its encoder's.

    n_encoder_layers: `None` means n_layers. share_embeddings: source and target have one input embedding; with tie_embeddings
    it is the output embedding too. max_seq_len: of a source and of a target, each.
    """

    n_encoder_layers: int | None = None
    share_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder(self)


@dataclass(frozen=True)
class NEncDecConfig(NGPTConfig):
    """The shape of an `NEncDec` and where its learned scales start: `NGPTConfig`, and the encoder's as in `EncDecConfig`.

    alpha_init, s_qk_init, ...: of every such scale, in the encoder and in the decoder.
    """

    n_encoder_layers: int | None = None
    share_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder(self)


class MaskedConfig(DecoderConfig, Protocol):
    """The fields that configs of encoders share."""

    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def hidden_part(self) -> float: ...


def check_masked(config: MaskedConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, for what no encoder can be made of."""
    if not 0 < config.hidden_part < 1:
        raise ValueError(f"hidden_part must lie between 0 and 1, got {config.hidden_part}")
    if config.tie_embeddings:
        raise ValueError("an encoder's embeddings cannot be tied: the input has a row more, that of hidden tokens")


@dataclass(frozen=True)
class EncoderConfig(GPTConfig):
    """The shape of an `Encoder`, as in `GPTConfig`. hidden_part: of the tokens, while it is trained."""

    hidden_part: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masked(self)


@dataclass(frozen=True)
class NEncoderConfig(NGPTConfig):
    """The shape of an `NEncoder`, as in `NGPTConfig`. hidden_part: of the tokens, while it is trained."""

    hidden_part: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masked(self)
