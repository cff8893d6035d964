"""Our encoder-decoders as Hugging Face transformers knows them: `AutoModelForSeq2SeqLM`, beams, `Seq2SeqTrainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from spherelm.errors import UserError
from spherelm.interop.huggingface.configuration import SphereSeq2SeqConfig
from spherelm.interop.huggingface.modeling import CACHE, LayerView, SphereModel, recorded_attention
from spherelm.layers.cache import KVCache, Pair
from spherelm.layers.cross_attention import Memory, real_tokens
from spherelm.layers.loss import IGNORED
from spherelm.layers.readout import read_logits


class CrossLayerView(LayerView):
    """One layer of an `EncoderDecoderCache`; what is fixed goes into its cache of cross-attention."""

    def __init__(self, cache: EncoderDecoderCache, layer: int) -> None:
        super().__init__(cache.self_attention_cache, layer)
        self.both = cache

    def fixed(self, make: Any) -> Pair:
        cross = self.both.cross_attention_cache
        if self.both.is_updated.get(self.layer):
            stored: Any = cross.layers[self.layer]
            return stored.keys, stored.values
        pair: Pair = cross.update(*make(), self.layer)
        self.both.is_updated[self.layer] = True
        return pair


class CrossCacheView(KVCache):
    """An `EncoderDecoderCache` with the methods of our cache."""

    def __init__(self, cache: EncoderDecoderCache, n_layers: int) -> None:
        self.layers = [CrossLayerView(cache, layer) for layer in range(n_layers)]


def moved_left(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`input_ids` [batch, source] with its padding, on whichever side, made negative and moved after the tokens."""
    if attention_mask is None:
        return input_ids
    keep = attention_mask.bool()
    order = torch.argsort(~keep, dim=1, stable=True)
    return input_ids.masked_fill(~keep, IGNORED).gather(1, order)


class SourceReader(nn.Module):
    """The encoder as `generate` calls it: ids and mask to states, the real ones first in each row."""

    def __init__(self, owner: SphereSeq2SeqLM) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is none of this module's parts

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """As transformers' own encoders."""
        return self._owner[0].encode(input_ids, attention_mask, output_attentions, output_hidden_states)


class SphereSeq2SeqLM(SphereModel):
    """An `EncoderDecoder` of either arm, as transformers has sequence-to-sequence models.

    `labels` [batch, target] are the target's tokens with their end, -100 ignored; without `decoder_input_ids` they are
    moved right by one after `decoder_start_token_id`, as `DataCollatorForSeq2Seq` does it too.
    """

    config_class = SphereSeq2SeqConfig
    main_input_name = "input_ids"

    def __init__(self, config: SphereSeq2SeqConfig) -> None:
        tied = {"model.head.linear.weight": "model.embed.weight"} if config.tie_word_embeddings else {}
        shared = {"model.encoder.embed.weight": "model.embed.weight"} if config.share_embeddings else {}
        self._tied = {**tied, **shared}
        super().__init__(config)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]
        return self._tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which weights are others; source and target may share theirs where the output has its own."""
        return dict(self._tied)

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return SourceReader(self)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """`labels` [batch, target] shifted right by one after the start token; ignored places become that token."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise UserError("decoder_start_token_id is not set: set it in the config, or give decoder_input_ids")
        moved = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) < 0, start)
        moved[:, 0] = start
        return moved

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """The encoder's states of sources padded on either side; in a row of the result the real ones stand first."""
        states: list[Tensor] = []
        with recorded_attention(self._wants_attentions(output_attentions)) as weights:
            memory = self.model.encoder(
                moved_left(input_ids, attention_mask), self.model.runtime, self._run_recording(states)
            )
        wanted = self._wants_hidden(output_hidden_states)
        return BaseModelOutput(
            last_hidden_state=memory.states,
            hidden_states=(*states, memory.states) if wanted else None,
            attentions=None if weights is None else tuple(weights),
        )

    @can_return_tuple  # type: ignore[untyped-decorator]
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Arguments and result as those of transformers' own sequence-to-sequence models.

        attention_mask: of the source, 1 for tokens, 0 for padding on either side. encoder_outputs: what
        `encode` returned for the same mask. cache: an `EncoderDecoderCache`, also by its older name `past_key_values`.
        """
        self._check()
        if encoder_outputs is None:
            encoder_outputs = self.encode(
                self._given(input_ids, kwargs), attention_mask, output_attentions, output_hidden_states
            )
        if decoder_input_ids is None:
            if labels is None:
                raise UserError("give decoder_input_ids or labels: there is nothing to write")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        memory = self._memory(encoder_outputs[0], attention_mask)
        given: Any = past_key_values if cache is None else cache
        both, states = self._cache_to_use(given, use_cache), list[Tensor]()
        h = self.model.embedded(decoder_input_ids)
        positions = self._positions(h, None, decoder_attention_mask, both)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=h, attention_mask=decoder_attention_mask, position_ids=positions,
            **{CACHE: None if given is None else given.self_attention_cache},
        )  # fmt: skip
        view = None if both is None else CrossCacheView(both, self.config.n_layers)
        with recorded_attention(self._wants_attentions(output_attentions)) as weights:
            h = self.model.trunk(h, view, mask, positions, self._run_recording(states), memory)
        readout = self.model.readout(h)
        logits, loss = read_logits(readout), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=self.config.vocab_size, shift_labels=labels, **kwargs
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: both},
            decoder_hidden_states=(*states, readout.features) if self._wants_hidden(output_hidden_states) else None,
            decoder_attentions=None if weights is None else tuple(weights[::2]),
            cross_attentions=None if weights is None else tuple(weights[1::2]),
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )

    def _given(self, input_ids: Tensor | None, others: dict[str, Any]) -> Tensor:
        if others.get("inputs_embeds") is not None:
            raise UserError("the encoder reads input_ids, not inputs_embeds (of trained prompts, for one)")
        if input_ids is None:
            raise UserError("give input_ids or encoder_outputs: there is no source")
        return input_ids

    def _memory(self, states: Tensor, attention_mask: Tensor | None) -> Memory:
        """The states as decoder blocks read them; of each row as many count as its mask has ones."""
        places = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
        if attention_mask is not None:
            places = places.masked_fill(places >= attention_mask.sum(-1, keepdim=True), IGNORED)
        return Memory(states, real_tokens(places))

    def _cache_to_use(self, given: Any, use_cache: bool | None) -> Any:
        """As for a language model, but a cache for each kind of attention."""
        if self.gradient_checkpointing and self.training:
            return None
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if not wanted or given is not None:
            return given
        return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
