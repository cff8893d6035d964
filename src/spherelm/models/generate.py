"""Text from a model, a token at a time, with cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from spherelm.models.decoder import Decoder


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """What to draw the next token from: softmax of `logits / temperature`, without the tokens that are cut off.

    logits: [batch, vocab]. top_k keeps the k most probable tokens; top_p the fewest whose probabilities reach p, at least
    one. Temperature 0 puts everything on the most probable token. Result: float32 [batch, vocab], rows sum to 1.
    """
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    ordered, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None:
        kept &= ordered.cumsum(-1) - ordered < top_p
    ordered = ordered * kept
    return torch.zeros_like(ordered).scatter_(-1, ids, ordered / ordered.sum(-1, keepdim=True))


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continue every row of `prompt` by up to `max_new_tokens` tokens.

    prompt: int64 [batch, seq], seq >= 1, rows of equal length. temperature 0 is greedy. seed: makes the draw repeatable;
    `None` takes torch's global random state. A row that has produced `eos_id` is filled with it; generation ends when all
    have. Result: int64 [batch, seq + new]. Raises `ValueError` for an empty prompt, settings out of range, or a length
    beyond the model's max_seq_len.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p)
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    cache, tokens, new = model.new_cache(), prompt, prompt
    ended = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        probabilities = filtered_probabilities(model(new, cache)[:, -1], temperature, top_k, top_p)
        new = torch.multinomial(probabilities, 1, generator=generator)
        if eos_id is not None:
            new = new.masked_fill(ended, eos_id)
            ended |= new == eos_id
        tokens = torch.cat((tokens, new), dim=1)
        if ended.all():
            break
    return tokens


def _check(
    model: Decoder, prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"the prompt must be [batch, seq] with at least one token, got shape {tuple(prompt.shape)}")
    length, limit = prompt.shape[1] + max_new_tokens, model.config.max_seq_len
    if max_new_tokens < 0 or length > limit:
        raise ValueError(
            f"{prompt.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} do not fit the model's "
            f"max_seq_len={limit}: ask for 0 to {max(0, limit - prompt.shape[1])} new tokens or shorten the prompt"
        )
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"out of range: temperature={temperature} (>= 0), top_k={top_k} (>= 1), top_p={top_p} (in (0, 1])"
        )
