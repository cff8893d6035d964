"""The config that Hugging Face transformers stores beside the weights: the arm, and the fields of our own configs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from spherelm.models import ARMS, Config, EncoderDecoder, LanguageModel, arm_of

HEADS = ("num_attention_heads", "num_key_value_heads")
"""What transformers calls `n_heads` and `n_kv_heads`."""


class SphereLMConfig(PreTrainedConfig):
    """`arm` ("gpt", "ngpt", "hybrid", "nhybrid") and the fields of `GPTConfig`, `NGPTConfig` and both hybrids by their names.

    What transformers calls otherwise (hidden_size, num_hidden_layers, ...) is understood too; the fields of the other arm are
    ignored. Raises `ValueError`, as our configs do, for sizes that make no model.
    """

    model_type = "spherelm"
    kind: ClassVar[Any] = LanguageModel
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own way)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "tie_embeddings": "tie_word_embeddings",
    }

    arm: str = "ngpt"
    vocab_size: int = 4096
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 2
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_seq_len: int = 1024
    rope_base: float = 10000.0
    rope: str = "standard"
    step: str = "lerp"
    tie_word_embeddings: bool = False
    init_std: float = 0.02
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
    pattern: str | None = None
    mamba_expand: int = 2
    mamba_d_head: int = 64
    mamba_d_state: int = 64
    mamba_groups: int = 1
    mamba_conv: int = 4
    mamba_chunk: int = 64
    n_experts: int = 8
    experts_per_token: int = 2
    n_shared_experts: int = 0
    d_expert: int | None = None
    router_score: str = "sigmoid"
    balance: str = "bias"
    s_mamba_init: float = 1.0
    s_mamba_scale: float = 1.0
    s_moe_init: float = 1.0
    s_moe_scale: float = 1.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Caches and other tools of transformers count on these two being numbers.
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.d_ff = self.d_ff or 4 * self.d_model
        self.arm_config()

    def arm_config(self) -> Config:
        """The config of ours that this describes."""
        known = [arm for arm, (_, model_class) in ARMS.items() if issubclass(model_class, self.kind)]
        if self.arm not in known:
            raise ValueError(f"unknown arm {self.arm!r}: choose one of {', '.join(known)}")
        config_class, _ = ARMS[self.arm]
        return config_class(**{field.name: getattr(self, field.name) for field in fields(config_class)})

    @classmethod
    def of(cls, config: Config) -> SphereLMConfig:
        """The same model as `config` describes."""
        return cls(arm=arm_of(config), **{field.name: getattr(config, field.name) for field in fields(config)})

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it, with the heads by its names too: peft, which sizes its prompts by them, looks here only."""
        described: dict[str, Any] = super().to_dict()
        return described | {name: getattr(self, name) for name in HEADS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it; where a number is given by two names, ours counts."""
        said_twice = [name for name in HEADS if cls.attribute_map[name] in config_dict]
        return super().from_dict({k: v for k, v in config_dict.items() if k not in said_twice}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: every field of the model, so that no default of a later version can change it.

        Where this is not code that rode along with a model, the pointer to such code is left out: the code is not saved either.
        """
        described: dict[str, Any] = {k: v for k, v in super().to_diff_dict().items() if k not in HEADS}
        if self._auto_class is None:
            described.pop("auto_map", None)
        annotated = {**SphereLMConfig.__annotations__, **type(self).__annotations__}
        model_fields = [name for name in annotated if name != "kind" and not name.endswith("_token_id")]
        return described | {name: getattr(self, name) for name in model_fields}


class SphereSeq2SeqConfig(SphereLMConfig):
    """`arm` ("encdec" or "nencdec") and the fields of `EncDecConfig` and `NEncDecConfig` under their own names.

    decoder_start_token_id: begins every target, where trained here the end token. The rest is as in `SphereLMConfig`.
    """

    model_type = "spherelm-seq2seq"
    kind: ClassVar[Any] = EncoderDecoder

    arm: str = "nencdec"
    n_encoder_layers: int | None = None
    share_embeddings: bool = False
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = None
