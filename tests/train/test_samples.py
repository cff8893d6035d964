"""Text from a run directory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch

from spherelm import load_model
from spherelm.data.tokenizer import ByteTokenizer
from spherelm.train.checkpoint import latest_checkpoint
from spherelm.train.samples import continuations
from spherelm.train.trainer import train


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to write letters."""
    path = tmp_path_factory.mktemp("samples") / "run"
    train(tiny.run_config("ngpt", data, steps=30, eval_every=0, max_seq_len=32), path, show_progress=False)
    return path


def test_a_run_and_its_checkpoint_write_the_same(run: Path) -> None:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    texts = continuations(run, "ba", 3, 8, temperature=0.8, top_k=50, seed=3)
    assert texts == continuations(checkpoint, "ba", 3, 8, temperature=0.8, top_k=50, seed=3)
    assert len(set(texts)) > 1
    assert all(0 < len(text) <= 8 for text in texts)


def test_greedy_text_is_argmax_of_the_model(run: Path) -> None:
    (text,) = continuations(run, "ba", 1, 6, temperature=0)
    ids, model = torch.tensor([list(b"ba")]), load_model(run)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert text == bytes(ids[0, 2:].tolist()).decode()


def test_text_ends_where_the_model_ends_the_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = continuations(run, "ba", 1, 8, temperature=0)
    third = ord(whole[2])
    monkeypatch.setattr(ByteTokenizer, "eos_id", third, raising=False)
    original = ByteTokenizer.__init__

    def ends_with_third(self: ByteTokenizer) -> None:
        original(self)
        self.eos_id = third

    monkeypatch.setattr(ByteTokenizer, "__init__", ends_with_third)
    (text,) = continuations(run, "ba", 1, 8, temperature=0)
    assert text == whole[: whole.index(chr(third))]


@pytest.mark.parametrize(
    ("prompt", "tokens", "settings", "message"),
    [
        ("", 3, {}, "the prompt is empty: give at least one character"),
        ("ba" * 16, 1, {}, "32 prompt tokens and max_new_tokens=1 do not fit.*max_seq_len=32"),
        ("ba", 31, {}, "ask for 0 to 30 new tokens or shorten the prompt"),
        ("ba", 3, {"temperature": math.nan}, "out of range: temperature=nan"),
        ("ba", 3, {"top_p": math.nan}, "out of range: .*top_p=nan"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    run: Path, prompt: str, tokens: int, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        continuations(run, prompt, 1, tokens, **settings)
