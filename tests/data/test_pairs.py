"""Parallel text into a directory of ids, and out of it again in batches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pairs
import torch

from spherelm.data.documents import DocumentError, read_lines
from spherelm.data.pair_loader import PairBatch, PairLoader, held_out_pairs, pair_batch
from spherelm.data.pairs import (
    PairFiles,
    PairSettings,
    open_pairs,
    prepare_pairs,
    read_pairs_manifest,
    train_tokenizer,
)
from spherelm.data.tokenizer import load_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_pairs.make_pairs(tmp_path)


def test_every_pair_comes_back(tmp_path: Path) -> None:
    data = tiny_pairs.make_pairs(tmp_path, tokenizer=None, vocab_size=270)
    tokenizer = load_tokenizer(data)
    assert tokenizer.vocab_size == 270
    for split in ("train", "val"):
        pairs = open_pairs(data, split)
        texts = [tuple(tokenizer.decode(side) for side in pairs.row(i)) for i in range(len(pairs))]
        source, target = (read_lines(tmp_path / f"{split}.{side}") for side in ("src", "tgt"))
        assert texts == list(zip(source, target, strict=True))
        entry = read_pairs_manifest(data)["splits"][split]
        assert entry["target_bytes"] == sum(len(text.encode()) for text in target)
        assert entry["longest"] == max(max(len(s), len(t)) for s, t in (pairs.row(i) for i in range(len(pairs)))) + 1


def test_the_tokenizer_is_learned_from_both_sides_of_the_training_pairs_alone(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["aabb", "bbcc"] * 5, 260)
    assert tokenizer.eos_id == 0
    assert tokenizer.decode(tokenizer.encode("Ärger <|endoftext|>")) == "Ärger <|endoftext|>"
    assert sorted(len(tokenizer.encode(text)) for text in ("aabb", "bbcc")) == [2, 2]
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["a"], 200)
    with pytest.raises(ValueError, match="the text gives only 258 tokens, not 300"):
        train_tokenizer(["ab", "ab"], 300)


def test_blank_and_long_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    train = tiny_pairs.write_files(tmp_path, "train", ["ba", "", "badi", "ba du ki lo", " "])
    val = tiny_pairs.write_files(tmp_path, "val", ["du"])
    splits = prepare_pairs(train, tmp_path / "pairs", val, PairSettings(tokenizer="bytes", max_tokens=5))["splits"]
    assert splits["train"]["pairs"] == 2
    assert splits["train"]["left_out"] == {"blank": 2, "too_long": 1}
    with pytest.raises(
        DocumentError, match="longer than 2 tokens: 3 train pairs, the longest has 12; raise --max-tokens"
    ):
        prepare_pairs(train, tmp_path / "other", val, PairSettings(tokenizer="bytes", max_tokens=2))
    with pytest.raises(DocumentError, match="longer than 5 tokens: 1 val pair, the longest"):
        prepare_pairs(val, tmp_path / "other", train, PairSettings(tokenizer="bytes", max_tokens=5))
    assert not (tmp_path / "other").exists()


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text.de.gz"
    with gzip.open(path, "wb") as file:
        file.write("eins\r\nzwei\u2028drei\n\nvier".encode())
    assert read_lines(path) == ["eins", "zwei\u2028drei", "", "vier"]
    with pytest.raises(FileNotFoundError, match="no input file"):
        read_lines(tmp_path / "none")
    with pytest.raises(DocumentError, match="is a directory"):
        read_lines(tmp_path)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, data: Path) -> None:
    train, short = (tiny_pairs.write_files(tmp_path, f"n{n}", ["ba"] * n) for n in (3, 2))
    mixed = PairFiles(train.source, short.target)
    with pytest.raises(DocumentError, match=r"n3.src has 3 lines and .*n2.tgt 2"):
        prepare_pairs(mixed, tmp_path / "new", train)
    with pytest.raises(FileExistsError, match="choose another --out"):
        prepare_pairs(train, data, train)
    with pytest.raises(ValueError, match="max_tokens must be at least 2"):
        PairSettings(max_tokens=1)
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        open_pairs(tmp_path, "train")
    blank = tiny_pairs.write_files(tmp_path, "blank", ["", ""])
    with pytest.raises(DocumentError, match="hold no pair with text on both sides"):
        prepare_pairs(blank, tmp_path / "new", train)


def test_training_pairs_are_no_validation_pairs(tmp_path: Path) -> None:
    """All of them, or some of them, under whatever names; where there are others among them they may be."""
    train = tiny_pairs.write_files(tmp_path, "train", ["ba", "badi", "du ki"])
    again = PairFiles(tmp_path / "again.src.gz", tmp_path / "again.tgt")
    again.source.write_bytes(gzip.compress(b"du ki\nba\nba\n"))
    again.target.write_text("".join(f"{tiny_pairs.translate(text)}\n" for text in ("du ki", "ba", "ba")))
    for val in (train, again):
        with pytest.raises(DocumentError, match=r"every pair of .* is in the training text too: name other files"):
            prepare_pairs(train, tmp_path / "pairs", val, PairSettings(tokenizer="bytes"))
    assert not (tmp_path / "pairs").exists()
    some = tiny_pairs.write_files(tmp_path, "some", ["ba", "lo"])
    prepare_pairs(train, tmp_path / "pairs", some, PairSettings(tokenizer="bytes"))


def test_damage_is_noticed(data: Path) -> None:
    path = data / "train.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="missing or damaged: prepare the pairs again"):
        open_pairs(data, "train")
    (data / "pairs.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_pairs(data, "val")


def parts(batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """Sources and targets of a batch, without padding, after checking the layout of every row."""
    found = []
    for read, written, wanted in zip(*(part.tolist() for part in batch), strict=True):
        source, target = ([t for t in row if t >= 0] for row in (read, wanted))
        assert read[: len(source)] == source
        assert source[-1] == target[-1] == written[0] == 256
        assert written[1 : len(target)] == target[:-1]
        assert wanted[: len(target)] == target
        found.append((source[:-1], target[:-1]))
    return found


def test_a_batch_says_where_sources_end_and_targets_begin(data: Path) -> None:
    pairs = open_pairs(data, "train")
    rows = [3, 7, 1]
    assert parts(pair_batch(pairs, rows, 256)) == [tuple(side.tolist() for side in pairs.row(i)) for i in rows]


def test_an_epoch_has_every_pair_once_in_batches_of_like_length(data: Path) -> None:
    pairs = open_pairs(data, "train")
    loader = PairLoader(pairs, 256, 4, seed=1)
    assert loader.batches == 15
    epochs = [[parts(loader.batch(step)) for step in range(e * 15, e * 15 + 15)] for e in range(2)]
    everything = sorted((s.tolist(), t.tolist()) for s, t in (pairs.row(i) for i in range(60)))
    for epoch in epochs:
        assert sorted(pair for batch in epoch for pair in batch) == everything
    assert epochs[0] != epochs[1]
    spread = [max(len(s) + len(t) for s, t in b) - min(len(s) + len(t) for s, t in b) for b in epochs[0]]
    whole = max(len(s) + len(t) for s, t in everything) - min(len(s) + len(t) for s, t in everything)
    assert np.mean(spread) < whole / 5
    lengths = [len(b[0][0]) for b in epochs[0]]
    assert lengths != sorted(lengths), "batches come in random order"


def test_a_rest_that_fills_no_batch_changes_from_epoch_to_epoch(data: Path) -> None:
    loader = PairLoader(open_pairs(data, "train"), 256, 7, seed=1)
    seen = [{str(p) for step in range(e * 8, e * 8 + 8) for p in parts(loader.batch(step))} for e in range(3)]
    assert len(set.union(*seen)) > len(seen[0])


def test_a_batch_depends_on_seed_and_step_alone(data: Path) -> None:
    pairs = open_pairs(data, "train")
    one, other = PairLoader(pairs, 256, 4, seed=1), PairLoader(pairs, 256, 4, seed=1)
    for step in (40, 3, 16):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(step), other.batch(step), strict=True))
    assert not torch.equal(one.batch(3)[0], PairLoader(pairs, 256, 4, seed=2).batch(3)[0])
    assert one.state(5) == {}
    one.restore({})


def test_processes_share_a_batch(data: Path) -> None:
    pairs = open_pairs(data, "train")
    whole = parts(PairLoader(pairs, 256, 4, seed=1).batch(9))
    halves = [parts(PairLoader(pairs, 256, 4, 1, rank, 2).batch(9)) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    counts = [sum(len(target) + 1 for _, target in half) for half in halves]
    weights = [PairLoader(pairs, 256, 4, 1, rank, 2).weight(9) for rank in range(2)]
    assert weights == [2 * count / sum(counts) for count in counts]
    assert PairLoader(pairs, 256, 4, seed=1).weight(9) == 1
    with pytest.raises(ValueError, match="fewer than batch_size=61"):
        PairLoader(pairs, 256, 61, 0)


def test_validation_pairs_are_spread_over_the_file(data: Path) -> None:
    pairs = open_pairs(data, "val")
    everything = parts(held_out_pairs(pairs, 10**6, 256))
    assert sorted(everything) == sorted((s.tolist(), t.tolist()) for s, t in (pairs.row(i) for i in range(20)))
    some = parts(held_out_pairs(pairs, 5, 256))
    ends = [tuple(side.tolist() for side in pairs.row(i)) for i in (0, 19)]
    assert len(some) == 5
    assert all(end in some for end in ends)


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from spherelm.cli import main

    files = [*tiny_pairs.write_files(tmp_path, "a", ["ba du"] * 9), *tiny_pairs.write_files(tmp_path, "b", ["di"])]
    names = ("--source", "--target", "--val-source", "--val-target")
    flags = [word for name, file in zip(names, files, strict=True) for word in (name, str(file))]
    command = ["spherelm", "data", "pairs", *flags, "--out", str(tmp_path / "o"), "--tokenizer", "bytes"]
    monkeypatch.setattr("sys.argv", command)
    main()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "train: 9 pairs, 45 and 45 tokens, the longest text 6; left out: 0 blank, 0 too long"
    assert json.loads((tmp_path / "o" / "pairs.json").read_text())["splits"]["val"]["pairs"] == 1
