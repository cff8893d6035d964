"""Data that changed on the disk: found by `data verify`, and on resuming where that takes no time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import commands
import pytest
import tiny
import tiny_pairs

from spherelm.data import verification
from spherelm.data.shards import BODY_START, open_tokens
from spherelm.data.verification import verify_where_cheap
from spherelm.train.trainer import train


def exchange_a_token(shard: Path) -> None:
    """Put another id of the vocabulary into the middle of the body, which no other check sees."""
    content = bytearray(shard.read_bytes())
    content[BODY_START + 400] ^= 1
    shard.write_bytes(content)


def test_whole_data_are_said_to_be_so(command: commands.Command, tmp_path: Path) -> None:
    data, pairs = tiny.make_data(tmp_path), tiny_pairs.make_pairs(tmp_path)
    answer = command("data", "verify", data, pairs)
    assert (answer.code, answer.err) == (0, "")
    first, second = answer.out.splitlines()
    counts = tiny.read_json(data / "manifest.json")["splits"]
    assert first == (
        f"{data}: as it was prepared (train {counts['train']['tokens']:,} tokens, val {counts['val']['tokens']:,} tokens)"
    )
    counts = tiny.read_json(pairs / "pairs.json")["splits"]["val"]
    assert f"val {counts['source_tokens'] + counts['target_tokens']:,} tokens" in second


def test_without_a_directory_there_is_nothing_to_do(command: commands.Command) -> None:
    answer = command("data", "verify")
    assert answer.code == 2
    assert answer.err == "spherelm: the following arguments are required: DIR; see spherelm data verify --help\n"


@pytest.mark.parametrize("damage", ["train-00000.bin", "val-00000.bin", "pairs", "missing", "tokenizer"])
def test_what_changed_is_named_and_the_rest_is_looked_at(
    damage: str, command: commands.Command, tmp_path: Path
) -> None:
    data, pairs = tiny.make_data(tmp_path), tiny_pairs.make_pairs(tmp_path)
    whole = shutil.copytree(data, tmp_path / "copy")
    named = data / damage
    if damage == "pairs":
        named = pairs / "train.safetensors"
        content = bytearray(named.read_bytes())
        content[-3] ^= 1
        named.write_bytes(content)
    elif damage == "missing":
        named = data / "train-00000.bin"
        named.unlink()
    elif damage == "tokenizer":
        named = pairs
        shutil.copy(Path(verification.__file__).parent / "shipped" / "bpe4096.json", pairs / "tokenizer.json")
        (pairs / "tokenizer.meta.json").unlink()
    else:
        exchange_a_token(named)
    answer = command("data", "verify", data, pairs, whole)
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert line.startswith(f"spherelm: {named}")
    assert f"{whole}: as it was prepared" in answer.out
    assert len(answer.out.splitlines()) == 2


def test_text_that_changed_on_the_disk_is_noticed_on_resuming(tmp_path: Path) -> None:
    """Within the vocabulary, and with a header that says what it said before."""
    data = tiny.make_data(tmp_path)
    config = tiny.run_config("gpt", data, steps=2, save_every=1)
    train(config, tmp_path / "run", show_progress=False)
    exchange_a_token(data / "train-00000.bin")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"train-00000\.bin: damaged: the tokens do not match the sha256"):
        train(config, tmp_path / "run", resume=True, show_progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_of_large_texts_what_was_written_since_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of several processes, each of which reads a part."""
    data = tiny.make_data(tmp_path)
    exchange_a_token(data / "val-00000.bin")
    texts = [open_tokens(data, split) for split in verification.SPLITS]  # type: ignore[arg-type]
    written = (data / "val-00000.bin").stat().st_mtime
    monkeypatch.setattr(verification, "CHEAP_BYTES", 100)
    verify_where_cheap(texts, written)
    os.utime(data / "train-00000.bin", (written - 10, written - 10))
    with pytest.raises(ValueError, match=r"val-00000\.bin: damaged"):
        verify_where_cheap(texts, written - 1)
    monkeypatch.setattr(verification, "CHEAP_BYTES", 1 << 20)
    verify_where_cheap(texts, written, 0, 2)
    with pytest.raises(ValueError, match=r"val-00000\.bin: damaged"):
        verify_where_cheap(texts, written, 1, 2)
