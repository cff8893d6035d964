"""Encoder-decoders as transformers runs them, for both arms: a source is read in both directions, a target written."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_spherelm import SphereLMConfig, SphereSeq2SeqConfig
from .modeling_spherelm import (
    CACHE,
    AttentionPart,
    Block,
    Generating,
    SphereLMModel,
    eager_attention,
    new_cache,
    positions_of,
    split_heads,
)


class CrossAttentionPart(AttentionPart):
    """Queries from the target, keys and values from the source's states; positions are in neither.

    An arm has matrices `q`, `k`, `v`, `o`, and says what becomes of `queries` and `keys` [batch, heads, seq, d_k].
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    inner: Any = staticmethod(torch.positive)

    def queries(self, q: Tensor) -> Tensor:
        """Of the product."""
        return q

    def keys(self, k: Tensor) -> Tensor:
        """Of the product."""
        return k

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, n_kv_heads, source, d_k] of the source's states."""
        return self.keys(split_heads(self.k(states), self.d_k)), split_heads(self.v(states), self.d_k)

    def forward(
        self, h: Tensor, states: Tensor, source_mask: Tensor | None, crossed: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, target, d_model] -> the same, and attention weights; crossed:
        a cache that keeps the source's keys.
        """
        q = self.queries(split_heads(self.q(h), self.d_k))
        if crossed is None:
            k, v = self.read(states)
        elif crossed.is_updated.get(self.layer_idx):
            stored = crossed.cross_attention_cache.layers[self.layer_idx]
            k, v = stored.keys, stored.values
        else:
            k, v = crossed.cross_attention_cache.update(*self.read(states), self.layer_idx)
            crossed.is_updated[self.layer_idx] = True
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        made, weights = attention(self, q, k, v, source_mask, scaling=self.scaling, dropout=0.0, is_causal=False)
        return self.o(self.inner(made.reshape(*h.shape[:-1], -1))), weights


class Encoder(SphereLMModel):
    """Reads a source in both directions. norm: what the last state goes through."""

    def __init__(self, config: SphereLMConfig, owner: SphereLMModel, depth: int, norm: nn.Module) -> None:
        super(SphereLMModel, self).__init__(config)
        self.embed = owner.embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(owner.block("A-", layer, is_causal=False) for layer in range(depth))
        self.norm = norm
        self.post_init()

    @capture_outputs
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """As transformers' own encoders; positions are counted from the first token that is no padding."""
        h = self.embed(input_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=h, attention_mask=attention_mask)
        positions = positions_of(h, None, attention_mask, None)
        return BaseModelOutput(last_hidden_state=self.norm(self.run(h, None, positions, attention_mask=mask)))


class Seq2SeqModel(SphereLMModel):
    """An `encoder`, and a decoder whose blocks attend to what it made of the source, `states`."""

    config_class = SphereSeq2SeqConfig
    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": OutputRecorder(AttentionPart, index=1, layer_name="attention"),
        "cross_attentions": OutputRecorder(AttentionPart, index=1, layer_name="cross_attention"),
    }
    source_norm: ClassVar[Any]

    def __init__(self, config: SphereSeq2SeqConfig) -> None:
        super().__init__(config)
        depth = config.architecture.get("n_encoder_layers") or config.n_layers
        self.encoder = Encoder(config, self, depth, self.source_norm(config.d_model))
        self.post_init()

    @staticmethod
    def words(config: SphereLMConfig) -> list[str]:
        return ["AC-"] * config.n_layers


class SphereSeq2SeqLM(Generating):
    """An encoder-decoder. `labels` [batch, target] are the target's tokens with their end, -100 ignored.

    Without `decoder_input_ids` they are moved right by one after `decoder_start_token_id`.
    """

    config_class = SphereSeq2SeqConfig
    main_input_name = "input_ids"
    model_class: ClassVar[Any]

    def __init__(self, config: SphereSeq2SeqConfig) -> None:
        super().__init__(config)
        tied = {"model.head.linear.weight": "model.embed.weight"} if config.tie_word_embeddings else {}
        shared = {"model.encoder.embed.weight": "model.embed.weight"} if config.architecture["share_embeddings"] else {}
        self._tied_weights_keys = {**tied, **shared}
        self.model = self.model_class(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which weights are others; source and target may share theirs where the output has its own."""
        return dict(self._tied_weights_keys)

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        encoder: nn.Module = self.model.encoder
        return encoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """`labels` [batch, target] shifted right by one after the start token; ignored places become that token."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("decoder_start_token_id is not set: set it in the config, or give decoder_input_ids")
        moved = labels.roll(1, dims=1)
        moved = moved.masked_fill(moved < 0, start)
        moved[:, 0] = start
        return moved

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Arguments and result as those of transformers' own sequence-to-sequence models.

        attention_mask: of the source. cache: an `EncoderDecoderCache`, also by its older name.
        """
        wanted = {name: kwargs.pop(name, None) for name in ("output_attentions", "output_hidden_states")}
        asked = {name: value for name, value in wanted.items() if value is not None}
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(input_ids, attention_mask, **asked)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels: there is nothing to write")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        states, h = encoder_outputs[0], self.model.embed(decoder_input_ids)
        source_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=h, attention_mask=attention_mask, encoder_hidden_states=states
        )
        both: Any = past_key_values if cache is None else cache
        if both is None and (grown := new_cache(self, use_cache)) is not None:
            both = EncoderDecoderCache(grown, DynamicCache(config=self.config))
        found = self.model(
            None, decoder_attention_mask, None, None if both is None else both.self_attention_cache, h,
            use_cache=False, states=states, source_mask=source_mask, crossed=both, **asked,
        )  # fmt: skip
        logits, loss = self.model.head(found.last_hidden_state), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=self.config.vocab_size, shift_labels=labels, **kwargs
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: both},
            decoder_hidden_states=found.get("hidden_states"),
            decoder_attentions=found.get("attentions"),
            cross_attentions=found.get("cross_attentions"),
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )
