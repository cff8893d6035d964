"""The folder that transformers loads a model from: weights, config, tokenizer, card and, if asked for, the code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from spherelm.interop.huggingface import to_hf
from spherelm.interop.huggingface.standalone import AUTO_MAPS, FILE, standalone_source
from spherelm.interop.huggingface.tokenization import fast_tokenizer
from spherelm.models import Decoder


@dataclass(frozen=True)
class TokenizerDefinition:
    """The text of a `tokenizer.json`, and the spelling of its end token."""

    json: str
    eos_token: str


def save_folder(
    model: Decoder,
    out: Path,
    tokenizer: TokenizerDefinition | None,
    card: str,
    dtype: torch.dtype = torch.float32,
    standalone: bool = False,
) -> None:
    """Write `model`, its weights converted to `dtype` in place, into the directory `out`."""
    wrapped = to_hf(model.to(dtype))
    wrapped.config.dtype = dtype
    if tokenizer is not None:
        pairs = wrapped.config.is_encoder_decoder
        fast = fast_tokenizer(tokenizer.json, tokenizer.eos_token, model.config.max_seq_len, ends=pairs)
        wrapped.config.eos_token_id = wrapped.config.pad_token_id = fast.eos_token_id
        if pairs:
            wrapped.config.decoder_start_token_id = fast.eos_token_id
        wrapped.generation_config = GenerationConfig.from_model_config(wrapped.config)
        fast.save_pretrained(out)
    wrapped.save_pretrained(out)
    if standalone:
        ride_along(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def ride_along(out: Path) -> None:
    """Put the modeling code into the saved folder `out`, and say in its config.json where the Auto classes find it."""
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (out / FILE).write_text(standalone_source(config["arm"]), encoding="utf-8")
    config |= {"auto_map": AUTO_MAPS[config["model_type"]]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
