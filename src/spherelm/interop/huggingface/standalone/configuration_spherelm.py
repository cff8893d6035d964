"""The config of a spherelm model: the fields of its config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class SphereLMConfig(PreTrainedConfig):
    """Sizes of a causal language model, and what its learned scales and norms are.

    Attributes:
        arm: "ngpt" or "gpt".
        vocab_size, n_layers, d_model, n_heads, n_kv_heads, d_ff, max_seq_len: Sizes.
        rope, rope_base: How positions turn queries and keys, and the base of the frequencies.
        activation: Of MLPs: "swiglu", with a gate, or "relu2", the square of ReLU.
        architecture: `kind`, and where layers follow a `pattern` its letters and the sizes of their parts.
        start: The scales and variants of the arm.
    """

    model_type = "spherelm"
    folded = False
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
    }

    arm: str = "ngpt"
    vocab_size: int = 4096
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 2
    n_kv_heads: Any = None  # n_heads
    d_ff: Any = None  # 4 d_model, with relu2 3 d_model
    max_seq_len: int = 1024
    rope_base: float = 10000.0
    rope: str = "standard"
    tie_word_embeddings: bool = False
    activation: str = "swiglu"
    architecture: Any = None
    start: Any = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.d_ff = self.d_ff or {"swiglu": 4, "relu2": 3}[self.activation] * self.d_model
        self.architecture, self.start = self.architecture or {}, self.start or {}

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.d_model // self.n_heads


class FoldedConfig(SphereLMConfig):
    """Of a model for inference: learned scales and gains are inside its matrices, as far as they can be."""

    model_type = "spherelm-folded"
    folded = True


class SphereSeq2SeqConfig(SphereLMConfig):
    """Of an encoder-decoder. decoder_start_token_id: begins every target."""

    model_type = "spherelm-seq2seq"
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = None
