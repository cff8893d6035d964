"""Text that a trained run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spherelm.data.tokenizer import load_tokenizer
from spherelm.models.generate import generate
from spherelm.train.checkpoint import NAME, load_model


def continuations(run: Path, prompt: str, count: int, max_new_tokens: int, **settings: Any) -> list[str]:
    """`count` texts by which the model of `run` (a run directory or a checkpoint) continues `prompt`.

    settings: those of `generate` (temperature, top_k, top_p, seed). A text ends early where the model ends the document.
    Raises `ValueError` for an empty prompt or one that leaves no room for `max_new_tokens`.
    """
    model = load_model(run)
    tokenizer = load_tokenizer(run.parent.parent if NAME.fullmatch(run.name) else run)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give at least one character")
    rows = generate(model, torch.tensor([ids] * count), max_new_tokens, eos_id=tokenizer.eos_id, **settings)
    texts = []
    for row in rows[:, len(ids) :].tolist():
        texts.append(tokenizer.decode(row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row))
    return texts
