"""The configs of all models: sizes, an architecture, and for each arm how its weights and learned scales start."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from spherelm.errors import UserError
from spherelm.fields import Among, check
from spherelm.layers.feedforward import MLPS
from spherelm.layers.linear import FORMS, Scale
from spherelm.layers.mamba2 import MambaShape
from spherelm.layers.moe import BALANCINGS, SCORES
from spherelm.layers.rope import ROPES
from spherelm.models.variants import SIGNS, STEPS

LETTERS = "MA-O"
"""Of a pattern: Mamba-2 mixer, attention, MLP, mixture of experts."""


@dataclass(frozen=True)
class MixerSizes:
    """Sizes of Mamba-2 mixers.

    Attributes:
        mamba_expand: Channels inside a Mamba-2 mixer, as a multiple of d_model.
        mamba_d_head: Channels of a mixer's head.
        mamba_d_state: Numbers of state for each channel of a mixer's head.
        mamba_groups: Groups of a mixer's heads; the heads of a group share B and C.
        mamba_conv: Positions that a mixer's convolution sees.
        mamba_chunk: Positions that a mixer computes as one product.
    """

    mamba_expand: PositiveInt = 2
    mamba_d_head: PositiveInt = 64
    mamba_d_state: PositiveInt = 64
    mamba_groups: PositiveInt = 1
    mamba_conv: Annotated[int, Field(ge=2)] = 4
    mamba_chunk: PositiveInt = 64

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of mixtures of experts.

    Attributes:
        n_experts: Experts of a layer.
        experts_per_token: Experts that the router picks for each token.
        n_shared_experts: Further experts, which every token passes.
        d_expert: Channels inside each expert; if left out, the experts of a token are together as wide as an MLP.
        router_score: Scores of experts: sigmoid, or softmax over all experts.
        balance: How the load of experts is kept even: bias, loss or none.
    """

    n_experts: PositiveInt = 8
    experts_per_token: PositiveInt = 2
    n_shared_experts: NonNegativeInt = 0
    d_expert: PositiveInt | None = None
    router_score: Annotated[str, Among(SCORES)] = "sigmoid"
    balance: Annotated[str, Among(BALANCINGS)] = "bias"

    def __post_init__(self) -> None:
        check(self)
        if self.experts_per_token > self.n_experts:
            raise UserError(
                f"experts_per_token={self.experts_per_token} of n_experts={self.n_experts} cannot be picked: "
                f"choose 1 to {self.n_experts}"
            )


@dataclass(frozen=True)
class DecoderArch:
    """A causal language model. Each layer is attention and an MLP; with a pattern, each letter is one layer.

    Attributes:
        pattern: One letter per layer, such as MAM-MAMO: M (Mamba-2 mixer), A (attention), - (MLP), O (experts).
        mixer: Sizes of the mixers.
        experts: Sizes of the mixtures of experts.
    """

    kind: Literal["decoder"] = "decoder"
    pattern: str | None = None
    mixer: MixerSizes = MixerSizes()
    experts: ExpertSizes = ExpertSizes()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EncDecArch:
    """An encoder-decoder: it reads a source in both directions and writes a target of up to max_seq_len tokens each.

    Attributes:
        n_encoder_layers: Layers of the encoder; n_layers if left out.
        share_embeddings: Source and target have one input embedding; with tie_embeddings it is the output's too.
    """

    kind: Literal["encdec"] = "encdec"
    n_encoder_layers: PositiveInt | None = None
    share_embeddings: bool = False

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EncoderArch:
    """An encoder: it reads a text in both directions and predicts its hidden tokens.

    Attributes:
        hidden_part: Fraction of the tokens that are predicted in training.
    """

    kind: Literal["encoder"] = "encoder"
    hidden_part: Annotated[float, Field(gt=0, lt=1)] = 0.15

    def __post_init__(self) -> None:
        check(self)


Architecture = Annotated[DecoderArch | EncDecArch | EncoderArch, Discriminator("kind")]

ARCHITECTURES: dict[str, type[Architecture]] = {
    "decoder": DecoderArch,
    "encdec": EncDecArch,
    "encoder": EncoderArch,
}
"""By the name that `kind` has."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape that both arms share. Raises `UserError`, naming the value and the fix, for sizes that make no model.

    Attributes:
        vocab_size: Token ids, or rows of the embeddings.
        n_layers: Layers, or letters of a pattern.
        d_model: Channels of the hidden state.
        n_heads: Heads of attention, each of d_model / n_heads channels.
        n_kv_heads: Heads of keys and values; n_heads if left out.
        d_ff: Channels inside an MLP; if left out, 4 d_model with a gate and 3 d_model without.
        max_seq_len: Tokens of the longest sequence.
        rope_base: Base of the rotary embedding's frequencies.
        rope: Rotary embedding: standard; nvidia, the formula of NVIDIA/ngpt's checkpoints; or none, no positions.
        tie_embeddings: Use one matrix as input and output embedding.
        activation: Activation of MLPs and experts: swiglu, with a gate, or relu2, squared ReLU without a gate.
        architecture: Kind of model: decoder, encdec or encoder, each with fields of its own.
    """

    arm: ClassVar[str]

    vocab_size: PositiveInt
    n_layers: PositiveInt
    d_model: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None = None
    d_ff: PositiveInt | None = None
    max_seq_len: PositiveInt = 1024
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    rope: Annotated[str, Among(ROPES)] = "standard"
    tie_embeddings: bool = False
    activation: Annotated[str, Among(MLPS)] = "swiglu"
    architecture: Architecture = DecoderArch()

    def __post_init__(self) -> None:
        check(self)
        check_heads(self)
        if isinstance(self.architecture, DecoderArch):
            check_pattern(self, self.architecture)
        elif isinstance(self.architecture, EncoderArch) and self.tie_embeddings:
            raise UserError("an encoder's embeddings cannot be tied: the input has a row more, that of hidden tokens")

    @property
    def d_k(self) -> int:
        """Channels of a head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def ff_width(self) -> int:
        """Channels inside of an MLP."""
        return self.d_ff or MLPS[self.activation].widening * self.d_model

    @property
    def pattern(self) -> str | None:
        """The letters of a decoder's layers, where it has a pattern."""
        return self.architecture.pattern if isinstance(self.architecture, DecoderArch) else None

    @property
    def experts(self) -> ExpertSizes:
        """Of a decoder's mixtures."""
        assert isinstance(self.architecture, DecoderArch)
        return self.architecture.experts

    @property
    def expert_width(self) -> int:
        """Channels inside of each expert."""
        sizes = self.experts
        return sizes.d_expert or self.ff_width // (sizes.experts_per_token + sizes.n_shared_experts)

    @property
    def mamba(self) -> MambaShape:
        """The sizes of a decoder's mixers."""
        assert isinstance(self.architecture, DecoderArch)
        sizes = self.architecture.mixer
        return MambaShape(
            d_model=self.d_model,
            n_heads=sizes.mamba_expand * self.d_model // sizes.mamba_d_head,
            d_head=sizes.mamba_d_head,
            d_state=sizes.mamba_d_state,
            n_groups=sizes.mamba_groups,
            conv_width=sizes.mamba_conv,
            chunk_size=sizes.mamba_chunk,
        )


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """The config of the GPT baseline: the shape, and these fields. The defaults are the paper's.

        model = build(GPTConfig(vocab_size=4096, n_layers=4, d_model=128, n_heads=2))

    Attributes:
        init_std: Standard deviation of the weights at the start.
        qk_norm: Queries and keys pass an RMSNorm. The paper's baseline has none; GPTs of 2026 do.
    """

    arm: ClassVar[str] = "gpt"

    init_std: PositiveFloat = 0.02
    qk_norm: bool = False


@dataclass(frozen=True)
class ScaleSpec:
    """Where a learned scale of nGPT starts and how fast it learns (section 2.5).

    Attributes:
        init: Value in use at the start.
        scale: Value that is stored at the start. The lower it is, the faster the scale learns. 1/sqrt(d_model) if left
            out.
        form: vector: a learned value for each entry; scalar: one for all entries; fixed: always init (Table 5).
    """

    init: PositiveFloat = 1.0
    scale: PositiveFloat | None = None
    form: Annotated[str, Among(FORMS)] = "vector"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Variant:
    """Deviations from nGPT: ablations (Tables 5, 6), checkpoints of NVIDIA's code, FNGPT (arXiv 2605.06067).

    Attributes:
        step: Step of the hidden state: lerp, the paper's; riemannian (eqs. 24-26); or nvidia, which normalizes the
            state before the step too.
        alpha_sign: positive, or free, which lets eigen learning rates be negative.
        qk_norm: Normalize queries and keys.
        inner_norm: Normalize the input of every matrix that writes to the hidden state, as FNGPT does: attention's
            joined heads, the activation of an MLP or an expert, a mixer's y.
    """

    step: Annotated[str, Among(STEPS)] = "lerp"
    alpha_sign: Annotated[str, Among(SIGNS)] = "positive"
    qk_norm: bool = True
    inner_norm: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def norms(self) -> tuple[bool, bool]:
        """Which norms attention has: of queries and keys, and the inner one."""
        return self.qk_norm, self.inner_norm


@dataclass(frozen=True)
class NGPTConfig(ModelConfig):
    """The config of nGPT: the shape, and these fields. The defaults are the paper's, which suit long runs.

        model = build(NGPTConfig(vocab_size=4096, n_layers=4, d_model=128, n_heads=2, s_z=ScaleSpec(init=22.6)))

    Attributes:
        alpha: Eigen learning rates: the step of each attention and each MLP, one number per channel.
        s_qk: Scale of queries and keys.
        s_u: Scale of the MLP's u.
        s_v: Scale of the MLP's gate.
        s_z: Scale of the logits, one number per token of the vocabulary.
        s_mamba: Scale of a Mamba-2 mixer's input, one number.
        s_moe: Scale of a router's input, one number.
        logit_preconditioning: Exponent q of the preconditioned gradient of the logits (arXiv 2608.01284); 0: none.
        common_start: Weight of one random direction that is added to every row of an embedding at the start; 0: none.
        variant: Deviations from the paper.
    """

    arm: ClassVar[str] = "ngpt"

    alpha: ScaleSpec = ScaleSpec(0.05)
    s_qk: ScaleSpec = ScaleSpec()
    s_u: ScaleSpec = ScaleSpec(scale=1.0)
    s_v: ScaleSpec = ScaleSpec(scale=1.0)
    s_z: ScaleSpec = ScaleSpec()
    s_mamba: ScaleSpec = ScaleSpec(scale=1.0)
    s_moe: ScaleSpec = ScaleSpec(scale=1.0)
    logit_preconditioning: NonNegativeFloat = 0.0
    common_start: NonNegativeFloat = 0.0
    variant: Variant = Variant()

    @property
    def mlp_scales(self) -> tuple[ScaleSpec, ...]:
        """Of the matrices of an MLP that read the hidden state: `s_u`, and `s_v` where there is a gate."""
        return tuple(getattr(self, f"s_{name}") for name in MLPS[self.activation].reading)

    def learned(self, spec: ScaleSpec, *shape: int) -> Scale:
        """The learned scale that `spec` describes."""
        return Scale(shape, spec.init, spec.scale or 1 / math.sqrt(self.d_model), spec.form)


Config = GPTConfig | NGPTConfig

CONFIGS: dict[str, type[Config]] = {"gpt": GPTConfig, "ngpt": NGPTConfig}
"""By the name of the arm."""


def check_heads(config: ModelConfig) -> None:
    """Raise `ValueError` if the heads do not share the channels."""
    if config.d_model % config.n_heads:
        raise UserError(
            f"n_heads={config.n_heads} does not divide d_model={config.d_model}: choose n_heads among the divisors of d_model"
        )
    if config.d_k % 2:
        raise UserError(
            f"d_model / n_heads = {config.d_k} is odd, and rotary embedding pairs channels: "
            "choose sizes that give an even number of channels per head"
        )
    if config.n_kv_heads is not None and config.n_heads % config.n_kv_heads:
        raise UserError(f"n_kv_heads={config.n_kv_heads} does not divide n_heads={config.n_heads}")


def check_pattern(config: ModelConfig, arch: DecoderArch) -> None:
    """Raise `ValueError` if the pattern, or the sizes of the parts that it names, cannot make a model."""
    if arch.pattern is None:
        return
    strange = sorted(set(arch.pattern) - set(LETTERS))
    if strange or not arch.pattern:
        named = ", ".join(map(repr, strange)) or "no letters"
        raise UserError(f"pattern {arch.pattern!r} has {named}: a layer is one of {', '.join(LETTERS)}")
    if len(arch.pattern) != config.n_layers:
        raise UserError(
            f"pattern {arch.pattern!r} has {len(arch.pattern)} letters for n_layers={config.n_layers}: one for each layer"
        )
    width, sizes = arch.mixer.mamba_expand * config.d_model, arch.mixer
    if "M" in arch.pattern and width % sizes.mamba_d_head:
        raise UserError(
            f"mamba_d_head={sizes.mamba_d_head} does not divide mamba_expand * d_model = {width}: choose a divisor"
        )
    if "M" in arch.pattern and width // sizes.mamba_d_head % sizes.mamba_groups:
        raise UserError(
            f"mamba_groups={sizes.mamba_groups} does not divide the {width // sizes.mamba_d_head} heads of a mixer"
        )
    if "O" in arch.pattern and config.expert_width < 1:
        raise UserError(
            f"d_ff={config.d_ff} is too narrow for {arch.experts.experts_per_token} experts a token: give d_expert"
        )


def to_plain(config: Config) -> dict[str, Any]:
    """The fields of `config` as plain values, which `from_plain` reads,
    without those of parts that the model does not have.
    """
    plain, pattern = asdict(config), config.pattern or ""
    for letter, group, scale in (("M", "mixer", "s_mamba"), ("O", "experts", "s_moe")):
        if letter not in pattern:
            plain["architecture"].pop(group, None)
            plain.pop(scale, None)
    if "v" not in MLPS[config.activation].reading:
        plain.pop("s_v", None)
    return plain
