"""Text from a model, a token at a time, with cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError
from spherelm.generation.continuation import Continuation
from spherelm.generation.folding import folded, obstacle
from spherelm.generation.sampling import Sampling
from spherelm.generation.text_stream import TextStream, collect, encode_prompt
from spherelm.models.decoder import Decoder, GenerativeModel, LanguageModel

Rows = Sequence[Sequence[int]]
Model = TypeVar("Model", bound=Decoder)
Prompt = TypeVar("Prompt", str, Tensor, Rows)


def for_inference(model: Model) -> Model | LanguageModel:
    """`folded(model)`, which is faster, where the model can be folded; else the model itself."""
    return model if obstacle(model) else folded(model)


def stream(
    model: Decoder,
    prompts: Rows,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    eos_id: int | None = None,
    window: bool = False,
    fold: bool = True,
) -> Iterator[Tensor]:
    """The tokens that `generate` appends, one step after the other: int64 [batch] each, on the model's device.

    prompts: token ids of each row, at least one, rows of any lengths. The rest is as for `generate`, which is built on
    this. Raises `ValueError` at once, not at the first step.
    """
    writer = checked(model, prompts, max_new_tokens, window)
    ready, rows = writer.conditioned(prompts, eos_id)
    return continued(ready, rows, max_new_tokens, sampling or Sampling(), seed, eos_id, window, fold)


def continued(
    ready: LanguageModel, rows: Rows, max_new_tokens: int, sampling: Sampling, seed: int | Sequence[int] | None,
    eos_id: int | None, window: bool, fold: bool = True,
) -> Iterator[Tensor]:  # fmt: skip
    """`stream` of a model and rows as `conditioned` returns them, which are checked."""
    seeds = row_seeds(seed, len(rows))
    if fold and max_new_tokens > 0:
        ready = for_inference(ready)
    return _steps(Continuation(ready, rows, sampling, seeds, window), max_new_tokens, eos_id)


def _steps(continuation: Continuation, max_new_tokens: int, eos_id: int | None) -> Iterator[Tensor]:
    ended = torch.zeros(len(continuation.rows), dtype=torch.bool, device=continuation.device)
    for _ in range(max_new_tokens):
        new = continuation.step()
        if eos_id is not None:
            new = new.masked_fill(ended, eos_id)
            ended |= new == eos_id
        yield new
        if eos_id is not None and ended.all():
            return


def generate(
    model: Decoder,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    tokenizer: Tokenizer | None = None,
    temperature: float = Sampling.temperature,
    top_k: int | None = Sampling.top_k,
    top_p: float | None = Sampling.top_p,
    min_p: float | None = Sampling.min_p,
    repetition_penalty: float = Sampling.repetition_penalty,
    seed: int | Sequence[int] | None = None,
    eos_id: int | None = None,
    window: bool = False,
    fold: bool = True,
) -> Prompt:
    """Continue a text, or each row of tokens by itself, by up to `max_new_tokens` tokens.

        model, tokenizer = load_model("runs/demo/ngpt-0", with_tokenizer=True)
        print(generate(model, "The old man", 60, tokenizer=tokenizer, temperature=0.8, top_k=50))

    Args:
        model: A decoder or an encoder-decoder.
        prompt: A text; int64 [batch, seq] with seq >= 1; or a list of rows of token ids, of any lengths. For an
            encoder-decoder it is the source, without an end token.
        max_new_tokens: The most tokens to add to each row.
        tokenizer: The model's tokenizer. A text needs it.
        temperature: 0 takes the most probable token. This and the next four are the fields of `Sampling`.
        top_k: Draw among the k most probable tokens.
        top_p: Draw among the fewest tokens that together have this probability.
        min_p: Draw among tokens with at least this fraction of the largest probability.
        repetition_penalty: Above 1, makes tokens that occurred less probable.
        seed: Makes the draw repeatable; row i uses seed + i, or seed[i]. `None` uses torch's global random state.
        eos_id: End token; a row that has produced it is filled with it. If left out, the tokenizer's. An
            encoder-decoder needs one.
        window: Continue past the model's max_seq_len, from the last half of the tokens each time.
        fold: Fold learned scales into a copy of the matrices, which is faster for all but a few tokens.

    Returns:
        The text, tensor [batch, seq + new] or list of rows, each with its continuation; rows of a list end at their
        first end token. For a text, an encoder-decoder returns only what it writes.

    Raises:
        UserError: An empty prompt, a text without a tokenizer, a setting out of range, or a length beyond max_seq_len
            without `window`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if tokenizer is not None and eos_id is None:
        eos_id = tokenizer.eos_id
    if isinstance(prompt, Tensor) and (prompt.ndim != 2 or prompt.shape[1] < 1):
        raise UserError(f"the prompt must be [batch, seq] with at least one token, got shape {tuple(prompt.shape)}")
    given = token_rows(prompt, tokenizer)
    writer = checked(model, given, max_new_tokens, window)
    ready, rows = writer.conditioned(given, eos_id)
    steps = continued(ready, rows, max_new_tokens, sampling, seed, eos_id, window, fold)
    return as_given(prompt, rows, list(steps), tokenizer, eos_id, writer.continues)


def as_given(
    prompt: Prompt, rows: Rows, new: list[Tensor], tokenizer: Tokenizer | None, eos_id: int | None, continues: bool
) -> Prompt:
    """`rows` with their `new` tokens, as a text, a tensor or a list like `prompt`."""
    if isinstance(prompt, Tensor):
        begun = torch.tensor(rows, device=prompt.device)
        return torch.cat((begun, *(step.unsqueeze(-1).to(prompt.device) for step in new)), dim=1)
    if isinstance(prompt, str):
        assert tokenizer is not None, "without it there are no tokens"
        written = TextStream(tokenizer.decode, rows[0])
        text = collect((step.tolist() for step in new), [written], eos_id)[0]
        return prompt + text if continues else text
    columns = torch.stack(new, dim=1).tolist() if new else [[] for _ in rows]
    return lengthened(rows, columns, eos_id)


def token_rows(prompt: str | Tensor | Rows, tokenizer: Tokenizer | None) -> Rows:
    """The token ids of each row of a prompt. Raises `UserError` for a text without a tokenizer."""
    if isinstance(prompt, Tensor):
        rows: Rows = prompt.tolist()
        return rows
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise UserError(
            f"the prompt {prompt!r} is text: give tokenizer=..., which load_model(run, with_tokenizer=True) returns too"
        )
    return [encode_prompt(tokenizer, prompt)]


def lengthened(rows: Rows, added: Rows, eos_id: int | None) -> list[list[int]]:
    """Each row with its tokens of `added` up to the first `eos_id`."""
    return [[*row, *up_to(list(new), eos_id)] for row, new in zip(rows, added, strict=True)]


def up_to(tokens: list[int], eos_id: int | None) -> list[int]:
    """`tokens` up to and with the first `eos_id`."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


def row_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` rows: `seed + i`, or `seed[i]`, or from torch's global random state."""
    if seed is None:
        drawn: list[int] = torch.randint(2**62, (count,)).tolist()
        return drawn
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} rows: give one for each, or one number for all")
    return seeds


def generative(model: Decoder) -> GenerativeModel:
    """The model itself. Raises `UserError` if it writes no text."""
    if not isinstance(model, GenerativeModel):
        raise UserError(
            "an encoder fills in hidden tokens and writes no text: give a run of a decoder or an encoder-decoder"
        )
    return model


def checked(model: Decoder, rows: Rows, max_new_tokens: int, window: bool = False) -> GenerativeModel:
    """The model itself. Raises `ValueError` if it writes no text, there is no row, one is empty,
    holds what is no token, or leaves no room for `max_new_tokens`.
    """
    writer = generative(model)
    limit, vocab_size = model.config.max_seq_len, model.config.vocab_size
    if not len(rows):
        raise UserError("there is no prompt: give at least one row")
    for row in rows:
        if not len(row):
            raise UserError("a prompt is empty: give at least one token")
        if min(row) < 0 or max(row) >= vocab_size:
            raise UserError(f"a prompt holds tokens from {min(row)} to {max(row)}, the model has 0 to {vocab_size - 1}")
        taken = writer.places(row)
        if max_new_tokens < 0 or (taken + max_new_tokens > limit and not window):
            raise UserError(
                f"{taken} prompt tokens and max_new_tokens={max_new_tokens} do not fit the model's "
                f"max_seq_len={limit}: ask for 0 to {max(0, limit - taken)} new tokens or shorten the prompt, "
                "or let the window slide (window=True, --window)"
            )
    return writer
