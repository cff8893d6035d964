"""Our models as Hugging Face transformers knows models. The modules and their maths are ours; this translates calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from spherelm.errors import UserError
from spherelm.interop.huggingface.configuration import SphereLMConfig
from spherelm.interop.huggingface.retracting import check_departure, keep
from spherelm.interop.huggingface.states import CountView, views
from spherelm.layers.attention import Attend, attend
from spherelm.layers.cache import KVCache, LayerCache
from spherelm.layers.linear import UnitEmbedding, UnitLinear
from spherelm.layers.readout import read_logits
from spherelm.models import build
from spherelm.models.decoder import run_block
from spherelm.models.kit import Surroundings
from spherelm.models.older import adapter_today, is_old, today

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the key-value cache in the installed transformers, in arguments and results."""

_recorded: ContextVar[list[Tensor] | None] = ContextVar("_recorded", default=None)


@contextmanager
def recorded_attention(wanted: bool) -> Iterator[list[Tensor] | None]:
    """Collect the attention weights that `eager_attend` computes in the list given, if they are `wanted`."""
    token = _recorded.set([] if wanted else None)
    try:
        yield _recorded.get()
    finally:
        _recorded.reset(token)


def eager_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The computation of `attend`, written out: every score exists, masked and turned into weights in float32.

    A mask may also be added to the scores, as transformers has it: 0 where a query may look, else the lowest number.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    # In float16, which ends at 65504, a negative score beside the mask's lowest number would be minus infinity.
    scores = (q @ k.transpose(-1, -2) * scale).to(torch.promote_types(q.dtype, torch.float32))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(q.dtype)
    record = _recorded.get()
    if record is not None:
        record.append(weights)
    return weights @ v


ATTENTIONS: dict[str, Attend] = {"sdpa": attend, "eager": eager_attend}


class ChosenAttention:
    """The attention that the config names at the time of the call (`set_attn_implementation` may change it)."""

    def __init__(self, config: SphereLMConfig) -> None:
        self.config = config

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        name = self.config._attn_implementation
        if name not in ATTENTIONS:
            raise UserError(f"attn_implementation={name!r} is not supported: choose one of {', '.join(ATTENTIONS)}")
        return ATTENTIONS[name](q, k, v, scale, mask)


class LayerView(LayerCache):
    """One layer of a cache of transformers, with the methods of ours."""

    def __init__(self, cache: Cache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length(self.layer))

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = self.cache.update(keys, values, self.layer)
        return pair


class CacheView(KVCache):
    """A cache of transformers (dynamic, static, quantized, ...; of hybrids dynamic), with the methods of ours.

    Keys enter it rotated and, in nGPT, normalized; queries alone carry `s_qk`. pattern: the model's
    layers, a letter each.
    """

    def __init__(self, cache: Cache, pattern: str) -> None:
        self.layers = views(cache, pattern, LayerView)

    def passed(self, h: Tensor) -> None:
        """Note that `h` [batch, seq, d_model] has gone through all layers."""
        for layer in self.layers:
            if isinstance(layer, CountView):
                layer.passed(h)


def check_adapters(model: nn.Module) -> None:
    """Raise `ValueError` if a wrapper (of `peft`) adds to a weight without keeping it on the sphere,
    or to the read-out.

    The sum of a unit matrix and a low-rank one is not unit, and the read-out takes its matrix, not the module's result.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is None or getattr(module, "keeps_sphere", False):
            continue
        if getattr(base, "unit_axis", None) is not None:
            raise UserError(f"{type(module).__name__} takes {name} off the unit sphere: {adapter_fix(module, base)}")
        if name.endswith("model.head.linear"):
            raise UserError(f"{type(module).__name__} on {name} would have no effect: leave it out of target_modules")


def adapter_fix(module: nn.Module, base: nn.Module) -> str:
    """The fix to suggest where `module` adapts `base`, whose vectors must be unit."""
    if isinstance(base, UnitEmbedding):
        return "an embedding takes no adapter: leave it out, or train it whole by modules_to_save"
    if isinstance(base, UnitLinear) and hasattr(module, "lora_A"):
        return (
            "pass peft the config that spherelm.interop.huggingface.adapters.on_sphere(config) returns, and a model of "
            "spherelm's own classes (no trust_remote_code)"
        )
    return "take LoRA on matrices alone, with spherelm.interop.huggingface.adapters.on_sphere"


class SphereModel(PreTrainedModel, GenerationMixin):
    """One of our models (attribute `model`), which transformers can save, load, train and generate with.

    The weights of a normalized one stay on the sphere under any torch optimizer, the Trainer's own too (`retracting`).
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own way)
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _tied_weights_keys = {"model.head.linear.weight": "model.embed.weight"}  # noqa: RUF012
    _input_embed_layer = "embed"
    _supports_sdpa = True
    _checkpoint_conversion_mapping = {".+": lambda match: adapter_today(match[0])}  # noqa: RUF012 (peft's, of its names)
    _gradient_checkpointing_func: Callable[..., Tensor]
    _passes = 0

    def __init__(self, config: SphereLMConfig) -> None:
        super().__init__(config)
        self.model = build(config.arm_config())
        self.model.runtime.attend = ChosenAttention(config)
        self.post_init()
        keep(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which `__init__` has not seen."""
        super().__setstate__(state)
        keep(self)

    def _check(self) -> None:
        """Raise `ValueError` for adapters that do not fit;
        in training also, now and then, for weights off the sphere.
        """
        if "peft_config" in self.__dict__:
            check_adapters(self)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._passes += 1
            if self._passes & (self._passes - 1) == 0:  # ever more rarely: on a GPU it waits for all that was asked for
                check_departure(self)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: dict[str, Tensor] | None, checkpoint_files: list[str] | None, *rest: Any
    ) -> Any:
        """As transformers has it; what version 0.1.0 saved is read by the names of today."""
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            stored = {name: tensor for file in checkpoint_files for name, tensor in load_file(file).items()}
            state_dict = today(stored) if is_old(stored) else None
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *rest)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring, from our model's distributions; leave what it did bring alone.

        Called for each module that lacks a parameter. The first call does it for all, since only the whole model knows
        how each matrix starts, and marks them as done, as transformers marks what it has loaded.
        """
        tensors: list[Any] = [*self.model.parameters(), *self.model.buffers()]
        loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
        self.model.init_weights()
        for tensor, value in loaded:
            tensor.copy_(value)
        for tensor in tensors:
            tensor._is_hf_initialized = True

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.head.linear
        return head

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused unless it is another of the same kind and shape, which says of itself that its rows are unit."""
        self._check_kind(self.model.embed, value)
        self.model.embed = value

    def set_output_embeddings(self, value: nn.Module) -> None:
        """As `set_input_embeddings`."""
        self._check_kind(self.get_output_embeddings(), value)
        self.model.head.linear = value

    @staticmethod
    def _check_kind(ours: nn.Module, other: nn.Module) -> None:
        if type(other) is not type(ours) or other.weight.shape != ours.weight.shape:
            raise UserError(
                f"{other} cannot take the place of {ours}: copy its weight into the old one's and, for an nGPT, retract"
            )

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Refused unless nothing changes: rows must be unit, and `s_z` has one entry a row."""
        wanted, multiple = new_num_tokens or self.config.vocab_size, pad_to_multiple_of or 1
        wanted = -(-wanted // multiple) * multiple
        if wanted != self.config.vocab_size:
            raise UserError(
                f"the vocabulary of {self.config.vocab_size} cannot be resized to {wanted}: "
                "train with a larger vocab_size, which may leave rows unused"
            )
        return self.model.embed

    def _positions(
        self, h: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Positions [batch or 1, seq] of the tokens in `h`:
        as given, else counted from the first token that is no padding.
        """
        if position_ids is not None:
            return position_ids
        past, seq = 0 if cache is None else int(cache.get_seq_length()), h.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            counted = attention_mask.long().cumsum(-1) - 1
            return counted.clamp_min(0)[:, past : past + seq]
        return torch.arange(past, past + seq, device=h.device).unsqueeze(0)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise UserError(
                "prompts are padded on the right, where new tokens go: pad on the left (tokenizer.padding_side = 'left')"
            )
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _wants_hidden(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)

    def _wants_attentions(self, asked: bool | None) -> bool:
        wanted = bool(self.config.output_attentions if asked is None else asked)
        if wanted and self.config._attn_implementation != "eager":
            raise UserError(
                "output_attentions needs attn_implementation='eager': the fused attention has no weights to show"
            )
        return wanted

    def _run_recording(self, states: list[Tensor]) -> Callable[..., Tensor]:
        """The function that calls a block: notes its input in `states`;
        recomputes it in the backward pass if enabled.
        """

        def run(block: nn.Module, h: Tensor, around: Surroundings) -> Tensor:
            states.append(h)
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(block.__call__, h, around)
            return run_block(block, h, around)

        return run


class SphereLMForCausalLM(SphereModel):
    """A `GPT` or an `NGPT`, of any pattern of layers, as transformers has causal language models.

    The result's logits are [batch, seq, vocab]; `labels` [batch, seq] are the tokens themselves, shifted
    here, -100 ignored.
    """

    config_class = SphereLMConfig

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments and result as those of transformers' own causal language models.

        cache: also by its older name `past_key_values`; the result has it by the name that the installed
        transformers uses.

        attention_mask: 1 for tokens, 0 for padding on either side, [batch, past + seq]; or ready to use, [batch, 1,
        seq, past + seq]. inputs_embeds: [batch, seq, d_model], taken as they are (rows of an nGPT's
        embedding are unit).
        """
        self._check()
        h = self._embedded(input_ids, inputs_embeds)
        given = past_key_values if cache is None else cache
        cache = self._cache_to_use(given, use_cache)
        positions = self._positions(h, position_ids, attention_mask, cache)
        # A cache begun here is empty: without it, positions that restart separate packed sequences.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: given},
        )
        view = None if cache is None else CacheView(cache, "".join(block.letters[0] for block in self.model.blocks))
        states: list[Tensor] = []
        with recorded_attention(self._wants_attentions(output_attentions)) as weights:
            h = self.model.trunk(h, view, mask, positions, self._run_recording(states))
        if view is not None:
            view.passed(h)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        readout = self.model.readout(h)
        logits = read_logits(readout._replace(features=readout.features[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: cache},
            hidden_states=(*states, readout.features) if self._wants_hidden(output_hidden_states) else None,
            attentions=None if weights is None else tuple(weights),
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give input_ids or inputs_embeds, one of the two")
        h: Tensor = self.model.embedded(input_ids) if inputs_embeds is None else inputs_embeds
        return h

    def _cache_to_use(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to write to. Recomputed blocks would write twice, and training reads no cache."""
        if self.gradient_checkpointing and self.training:
            return None
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return DynamicCache(config=self.config) if wanted and given is None else given
