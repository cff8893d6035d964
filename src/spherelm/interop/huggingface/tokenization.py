"""Our tokenizers as transformers knows them: a `tokenizer.json` and settings,
giving the ids that the model was trained on.
"""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spherelm.data.bpe import END


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(256 + hidden.index(byte)) if byte in hidden else chr(byte) for byte in range(256)]


def byte_definition() -> str:
    """The `tokenizer.json` of the tokenizer "bytes": byte b is id b, the end of a document 256."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
    definition: str = tokenizer.to_str()
    return definition


def fast_tokenizer(definition: str, eos_token: str, max_seq_len: int, ends: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer that the `tokenizer.json` in `definition` describes, to be used as spherelm uses it.

    Nothing is put before or after a text, and the spelling of a special token inside it is ordinary text; batches are
    padded on the left, with the end token. ends: as encoder-decoders read, each text with its end, padded on the right.
    """
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.add_special_tokens([tokenizers.AddedToken(eos_token, special=True, normalized=False)])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.num_special_tokens_to_add(False):
        tokenizer.post_processor = None
    if ends:
        end = (eos_token, tokenizer.token_to_id(eos_token))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {eos_token}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=eos_token,
        model_max_length=max_seq_len,
        padding_side="right" if ends else "left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
