"""The folder that transformers loads a model from: weights, config, tokenizer, card and, if asked for, the code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from spherelm.errors import UserError
from spherelm.interop.huggingface import WRAPPERS, to_hf
from spherelm.interop.huggingface.few_bits import round_matrices
from spherelm.interop.huggingface.folded import to_folded_hf
from spherelm.interop.huggingface.standalone import ride_along
from spherelm.interop.huggingface.tokenization import fast_tokenizer
from spherelm.models import Decoder


@dataclass(frozen=True)
class TokenizerDefinition:
    """The text of a `tokenizer.json`, and the spelling of its end token."""

    json: str
    eos_token: str


RUN_FILE = "spherelm.json"
"""The file with the config of the run that the model came from, and the update that it is of ("step")."""

SHARD = "5GB"
"""The largest file of weights; what is more goes into several."""


def save_folder(
    model: Decoder,
    out: Path,
    tokenizer: TokenizerDefinition | None,
    card: str,
    dtype: torch.dtype = torch.float32,
    standalone: bool = False,
    folded: bool = False,
    few_bits: str | None = None,
) -> None:
    """Write `model`, its weights converted to `dtype` in place, into the directory `out`.

    folded: in the form for servers, with the code beside it that runs it. few_bits: of a folded one, the format of its
    matrices, as `round_matrices` has it. Raises `UserError` for a model that has no such form.
    """
    wrapped: Any = to_folded_hf(model) if folded else to_hf(model.to(dtype))
    wrapped.to(dtype)
    config = wrapped.config
    config.dtype = dtype
    if few_bits is not None:
        round_matrices(wrapped, few_bits)
    if tokenizer is not None:
        fast = fast_tokenizer(
            tokenizer.json, tokenizer.eos_token, model.config.max_seq_len, ends=config.is_encoder_decoder
        )
        config.eos_token_id = config.pad_token_id = fast.eos_token_id
        if config.is_encoder_decoder:
            config.decoder_start_token_id = fast.eos_token_id
        fast.save_pretrained(out)
    wrapped.generation_config = generation_config(config)
    wrapped.save_pretrained(out, max_shard_size=SHARD)
    if standalone or folded:
        ride_along(out, model.config)
    (out / "README.md").write_text(card, encoding="utf-8")


def generation_config(config: Any) -> GenerationConfig:
    """The tokens that begin, fill and end a text; how it is drawn is for whoever asks for it."""
    names = ["eos_token_id", "pad_token_id", *(["decoder_start_token_id"] if config.is_encoder_decoder else [])]
    return GenerationConfig(**{name: getattr(config, name) for name in names})


def read_folder(folder: Path) -> Decoder:
    """The model in `folder`, in float32. Raises `UserError` for a folder
    that `spherelm export` did not write, or folded.
    """
    path = folder / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.exists() else None
    found = next((wrapper for config_class, wrapper in WRAPPERS if config_class.model_type == kind), None)
    if found is None or not (folder / RUN_FILE).exists():
        raise UserError(f"{folder} cannot become a run again: its model_type is {kind}")
    model: Decoder = found.from_pretrained(folder, dtype=torch.float32).model
    return model
