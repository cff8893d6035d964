"""The code that GPT and nGPT share when transformers runs them: positions, masks, caches, blocks, logits, generation.

The mathematics of a model is in the file that imports this one, `modeling_ngpt.py` or `modeling_gpt.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_spherelm import SphereLMConfig

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the key-value cache in the installed transformers."""

NAMES = {"A": "attention", "C": "cross_attention", "-": "mlp", "M": "mixer", "O": "experts"}
"""The attribute of a block that holds the part of a letter."""


def rotary_table(config: SphereLMConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles: floating [batch, seq] -> twice [batch, 1, seq, d_k / 2]."""
    channels = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=positions.dtype)
    turns = positions[:, None, :, None] * config.rope_base ** (-channels / config.head_dim)
    if config.rope == "nvidia":  # as NVIDIA/ngpt computes its table, which mixes up cosines and sines
        sin, cos = torch.stack((turns.sin(), turns.cos()), dim=-1).flatten(-2).chunk(2, dim=-1)
        return cos, sin
    return turns.cos(), turns.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair of channels (i, i + d_k/2) of `x` [batch, heads, seq, d_k] by its position's angle."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def nvidia_rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """NVIDIA/ngpt's formula: neighbours (x_2i, x_2i+1) become (-x_2i+1 cos_i, x_2i sin_i)."""
    cos, sin = table
    wide = x.to(cos.dtype)
    return torch.stack((-wide[..., 1::2] * cos, wide[..., ::2] * sin), dim=-1).flatten(-2).to(x.dtype)


ROTATIONS = {"standard": rotate, "nvidia": nvidia_rotate, "none": lambda x, table: x}
"""By the config's `rope`."""


def split_heads(x: Tensor, d_k: int) -> Tensor:
    """[batch, seq, heads * d_k] -> [batch, heads, seq, d_k]."""
    return x.unflatten(-1, (-1, d_k)).transpose(1, 2)


def eager_attention(
    part: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention with a float32 softmax: [batch, heads, seq, d_k] -> [batch, seq, heads, d_k], and weights."""
    k, v = (x.repeat_interleave(part.num_key_value_groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scaling).to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class AttentionPart(nn.Module):
    """What transformers' attention functions read. Each kind calls them in its `forward`, where vLLM looks."""

    def __init__(self, config: SphereLMConfig, layer_idx: int, scaling: float, is_causal: bool = True) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling, self.is_causal = config, layer_idx, scaling, is_causal
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.d_k, self.n_kv_heads = config.head_dim, config.n_kv_heads


class Block(GradientCheckpointingLayer):
    """Sublayers one after the other, by name."""

    def __init__(self, sublayers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, sublayer in sublayers.items():
            self.add_module(name, sublayer)

    def forward(self, h: Tensor, **around: Any) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        for sublayer in self.children():
            h = sublayer(h, **around)
        return h


class SpherePreTrainedModel(PreTrainedModel):
    """The class attributes that transformers reads from every model here."""

    config_class = SphereLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": AttentionPart}
    _input_embed_layer = "embed"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.d_model**-0.5)
        elif hasattr(module, "draw"):
            module.draw()


class SphereLMModel(SpherePreTrainedModel):
    """A decoder without its logits: `embed`, `blocks`, and the norm of the `head`. Its parts are those of the arm."""

    parts: ClassVar[dict[str, Any]]
    sublayer: ClassVar[Any]
    embedding: ClassVar[Any]
    head_class: ClassVar[Any]

    def __init__(self, config: SphereLMConfig) -> None:
        super().__init__(config)
        self.embed = self.embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(self.block(word, layer) for layer, word in enumerate(self.words(config)))
        self.head = self.head_class(config)
        self.post_init()

    @staticmethod
    def words(config: SphereLMConfig) -> list[str]:
        """The letters of each block's parts."""
        return list(config.architecture.get("pattern") or ["A-"] * config.n_layers)

    def block(self, word: str, layer: int, **settings: Any) -> Block:
        """The block of the parts in `word`."""
        made = {NAMES[x]: self.parts[x](self.config, layer, **(settings if x == "A" else {})) for x in word}
        return Block({name: self.sublayer(self.config, part) for name, part in made.items()})

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and result as those of transformers' own models; `cache` also by its older name."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        h = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        given = past_key_values if cache is None else cache
        cache = new_cache(self, use_cache) if given is None else given
        positions = positions_of(h, position_ids, attention_mask, cache)
        # Without a cache that was given, positions that restart separate packed texts.
        mask = create_causal_mask(
            config=self.config, inputs_embeds=h, attention_mask=attention_mask, position_ids=position_ids,
            **{CACHE: given},
        )  # fmt: skip
        h = self.run(h, cache, attention_mask=mask, positions=positions, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.head.norm(h), **{CACHE: cache})

    def run(self, h: Tensor, cache: Cache | None, positions: Tensor, **around: Any) -> Tensor:
        """All blocks. around: what parts read besides the hidden state, and what attention functions are given."""
        table = rotary_table(self.config, positions.to(torch.promote_types(h.dtype, torch.float32)))
        for block in self.blocks:
            h = block(h, cache=cache, table=table, positions=positions, **around)
        return h


def new_cache(model: Any, use_cache: bool | None) -> DynamicCache | None:
    """An empty cache, where one is wanted; blocks that are computed again for the backward pass would write twice."""
    wanted = model.config.use_cache and not model.training if use_cache is None else use_cache
    recomputed = model.gradient_checkpointing and model.training
    return DynamicCache(config=model.config) if wanted and not recomputed else None


def positions_of(h: Tensor, given: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Positions [batch or 1, seq]: as given, else counted from the first token that is no padding."""
    if given is not None:
        return given
    past, seq = 0 if cache is None else int(cache.get_seq_length()), h.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past : past + seq]
    return torch.arange(past, past + seq, device=h.device).unsqueeze(0)


class Generating(SpherePreTrainedModel, GenerationMixin):
    """The methods that `generate` and the tools around it need of a `model` with a `head`."""

    _tied_weights_keys = {"model.head.linear.weight": "model.embed.weight"}

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.head.linear
        return head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused unless nothing changes: learned scales have one entry a token."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(f"the vocabulary of {self.config.vocab_size} cannot be resized to {new_num_tokens}")
        embedding: nn.Module = self.model.embed
        return embedding

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; prompts padded on the right are refused, since new tokens go there."""
        mask = kwargs.get("decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError("prompts are padded on the right: pad on the left (tokenizer.padding_side = 'left')")
        return super().prepare_inputs_for_generation(*args, **kwargs)


class SphereLMForCausalLM(Generating):
    """A causal language model. `labels` [batch, seq] are the tokens themselves, shifted here; -100 is ignored."""

    model_class: ClassVar[Any]

    def __init__(self, config: SphereLMConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def read(self, h: Tensor) -> Tensor:
        """Logits of what the model gave."""
        logits: Tensor = self.model.head(h)
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As for the `model`; logits [batch, seq, vocab], of the last `logits_to_keep` positions if given."""
        found = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache=use_cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.read(found.last_hidden_state[:, keep]), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {CACHE: found.get(CACHE), "hidden_states": found.hidden_states, "attentions": found.attentions}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
