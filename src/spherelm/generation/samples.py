"""Text that a trained run writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spherelm.counting import counted
from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError, read_text, unknown
from spherelm.generation.beam import BeamSettings, beam_search
from spherelm.generation.continuation import Continuation
from spherelm.generation.generate import checked, continued, for_inference, generative, row_seeds
from spherelm.generation.sampling import Sampling
from spherelm.generation.text_stream import TextStream, collect, encode_prompt
from spherelm.layers.linear import departure
from spherelm.models import model_class
from spherelm.models.decoder import GenerativeModel, LanguageModel, Rows
from spherelm.progress import say
from spherelm.runs.config import read_config
from spherelm.runs.loading import load_model, run_directory

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
"""The number formats of the weights of a loaded model."""

LENGTH = 100
"""Tokens that are added to a text where nobody says how many, if there is room."""

BATCH = 16
"""Texts that are written at a time; how many does not change them."""


def continuations(
    run: Path,
    prompts: str | Sequence[str],
    count: int,
    max_new_tokens: int | None,
    *,
    seed: int | None = None,
    stop: Sequence[str] = (),
    window: bool = False,
    write: Callable[[str], None] | None = None,
    precision: str = "float32",
    device: str = "cpu",
    beams: BeamSettings | None = None,
    **settings: Any,
) -> list[str]:
    """`count` texts by which the model of `run` (a run directory or a checkpoint) continues each prompt,
    prompt by prompt.

    An encoder-decoder's prompts are what it reads, its texts whole: see `continues`. max_new_tokens: `None` for
    `LENGTH`, or what is left of max_seq_len behind the longest prompt. beams: the best `count` texts that a beam
    search finds, instead of drawn ones; neither seed nor settings count then, and write is given whole texts.
    settings: those of `Sampling` (temperature, top_k, ...). seed: text i draws with seed + i, and is what it would be
    alone. A text ends where the model ends the document, and before the first `stop` string. window: as for
    `Continuation`. write: is given every piece of text that is certain, as soon as it is, of one text after the other.
    precision, device: as for `load_for_inference`. Raises `ValueError`, before anything is written, for an empty prompt
    or one that leaves no room for `max_new_tokens`.
    """
    if count < 1:
        raise UserError(f"samples must be at least 1, got {count}")
    sampling = Sampling(**settings)
    TextStream(lambda tokens: "", stops=stop)  # refuses what is no stop string before the model is read
    model, tokenizer = load_for_inference(run, precision, device)
    given = [prompts] if isinstance(prompts, str) else prompts
    encoded = [
        encode_prompt(tokenizer, prompt, f"prompt {i}" if len(given) > 1 else "prompt")
        for i, prompt in enumerate(given, 1)
    ]
    rows = [ids for ids in encoded for _ in range(count)]
    if max_new_tokens is None:
        room = model.config.max_seq_len - max(model.places(row) for row in rows)
        max_new_tokens = LENGTH if window else max(1, min(LENGTH, room))
    checked(model, rows, max_new_tokens, window)
    if beams is not None:
        return searched(model, tokenizer, encoded, count, max_new_tokens, beams, stop, write)
    seeds, size = row_seeds(seed, len(rows)), BATCH if write is None else 1
    texts: list[str] = []
    for i in range(0, len(rows), size):
        batch = rows[i : i + size]
        ready, begun = model.conditioned(batch, tokenizer.eos_id)
        streams = [TextStream(tokenizer.decode, row, stop) for row in begun]
        steps = continued(ready, begun, max_new_tokens, sampling, seeds[i : i + size], tokenizer.eos_id, window)
        texts += collect((step.tolist() for step in steps), streams, tokenizer.eos_id, write)
    return texts


def searched(
    model: GenerativeModel,
    tokenizer: Tokenizer,
    prompts: Rows,
    count: int,
    max_new_tokens: int,
    beams: BeamSettings,
    stop: Sequence[str] = (),
    write: Callable[[str], None] | None = None,
) -> list[str]:
    """The `count` best texts of a beam search for each prompt, as `continuations` has them."""
    if count > beams.beams:
        raise UserError(
            f"{counted(beams.beams, 'beam')} cannot find {counted(count, 'text')}: ask for at most as many samples as beams"
        )
    texts = []
    found = beam_search(model, prompts, max_new_tokens, tokenizer.eos_id, beams)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        read = list(prompt) if model.continues else []
        for hypothesis in hypotheses[:count]:
            steps = ([token] for token in hypothesis.tokens)
            texts += collect(steps, [TextStream(tokenizer.decode, read, stop)], tokenizer.eos_id, write)
    return texts


def continues(run: Path) -> bool:
    """Whether the texts of a run's model begin with their prompts,
    as a language model's do and a translation does not.
    """
    return getattr(model_class(read_config(run_directory(run) / "config.json").model), "continues", False)


def load_for_inference(run: Path, precision: str = "float32", device: str = "cpu") -> tuple[GenerativeModel, Tokenizer]:
    """The model of a run directory or a checkpoint, folded where it can be, and its tokenizer.

    precision: one of `PRECISIONS`; "int8" is of the weights, with which float32 is computed. device: where it
    computes. Says on stderr how far rounding has taken the weights off the sphere. Raises `ValueError` if
    the model writes no text or torchao is missing.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    model, tokenizer = load_model(run, dtype, with_tokenizer=True)
    if precision == "int8":
        from spherelm.generation.quantization import quantized

        model = quantized(model)
    if precision != "float32":
        say(f"weights in {precision}, departure from the sphere {departure(model):.1e}")
    return generative(for_inference(model.to(device))), tokenizer


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: one a line, empty lines left out; of a .jsonl the "prompt" of each line's object.

    Raises `ValueError` that names the line, `FileNotFoundError`.
    """
    lines = read_text(path, "give a text file with a prompt a line").split("\n")
    read = _from_json if path.suffix == ".jsonl" else lambda path, number, line: line.rstrip("\r")
    prompts = [read(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one a line")
    return prompts


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, line {number}: expected an object like {{"prompt": "text"}}')
    return prompt


class Conversation:
    """A text that a model and a reader write in turn; what was read stays in the cache.

    Where the text is longer than the model's max_seq_len, it goes on from its last half, as `Continuation` says.
    run, settings, seed, stop, precision, device: as for `continuations`.
    """

    def __init__(
        self,
        run: Path,
        seed: int = 0,
        stop: Sequence[str] = (),
        precision: str = "float32",
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        self._sampling, self._stop, self._seed = Sampling(**settings), tuple(stop), seed
        TextStream(lambda tokens: "", stops=stop)
        model, self._tokenizer = load_for_inference(run, precision, device)
        if not isinstance(model, LanguageModel):
            raise UserError(f"{run} holds an encoder-decoder, which cannot converse: give --prompt or --prompts")
        self._model = model
        self._text: Continuation | None = None

    def restart(self) -> None:
        """Forget the text: the next answer begins a new one, which draws with the next seed."""
        if self._text is not None:
            self._text, self._seed = None, self._seed + 1

    def answer(self, said: str, max_new_tokens: int) -> Iterator[str]:
        """Append `said` and continue by up to `max_new_tokens` tokens: pieces of text.

        Broken off in between, the text stays as far as it has been written. Where the model ends the document, the end
        is left out of the text, so that it can continue. Raises `UserError`, the text unchanged, for no input.
        """
        ids = encode_prompt(self._tokenizer, said, "text")
        if self._text is None:
            self._text = Continuation(self._model, [ids], self._sampling, [self._seed], window=True)
        else:
            self._text.extend(ids)
        return self._written(self._text, max_new_tokens)

    def _written(self, text: Continuation, count: int) -> Iterator[str]:
        row = text.rows[0]
        pieces = TextStream(self._tokenizer.decode, row, self._stop)
        for _ in range(count):
            text.step()
            if row[-1] == self._tokenizer.eos_id:
                row.pop()
                break
            yield pieces.push(row[-1])
            if pieces.ended:
                return
        yield pieces.close()
