"""A tokenizer of one's own text: lossless, of the size asked for, read wherever a tokenizer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import tokenizers

from spherelm.data.bpe import train_on_files
from spherelm.data.prepare import prepare
from spherelm.data.rows import RowSettings
from spherelm.data.shards import open_tokens
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import UserError

TEXTS = [f"{tiny.text(seed, 60)}\n\nZoë 東京 🙂\n" for seed in range(40)]


def test_the_command_makes_what_prepare_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": {"text": text}}) + "\n" for text in TEXTS) + "null\n")
    command = commands.make_command(monkeypatch, capsys)
    words = ["data", "tokenizer", "--input", tmp_path / "a.jsonl", "--field", "body.text", "--vocab-size", 300]
    refused = command(*words, "--out", tmp_path / "no")
    assert (refused.code, "line 41: no string" in refused.err, (tmp_path / "no").exists()) == (2, True, False)
    answer = command(*words, "--skip-bad", "--out", tmp_path / "tok")
    assert (answer.code, answer.out.startswith("a tokenizer of 300 entries is in ")) == (0, True)
    tokenizer = load_tokenizer(str(tmp_path / "tok"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 0)
    for text in [*TEXTS, "<|endoftext|> ẞ\x00"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tmp_path / "tok", rows=RowSettings("body.text", True))
    assert open_tokens(tmp_path / "out", "train").vocab_size == 300
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tok" / "tokenizer.json"))
    assert library.encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0])


def test_the_same_entries_however_the_text_is_stored(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "a" / f"{number:02d}.txt").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps(TEXTS))
    one, other = (train_on_files([tmp_path / name], tmp_path / f"{name}-out", 400) for name in ("a", "b.json"))
    assert one.fingerprint == other.fingerprint


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too little")
    for size, message in ((256, "at least 257"), (9999, "the text gives only .* lower --vocab-size")):
        with pytest.raises(UserError, match=message):
            train_on_files([tmp_path / "a.txt"], tmp_path / "out", size)
    with pytest.raises(UserError, match="no input files"):
        train_on_files([], tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()
