"""Direct streaming: the windows of the prepared text, exact from any saved position,
the same for any number of ranks.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from spherelm.data import stream as module
from spherelm.data.hub import HubRequest, HubText
from spherelm.data.loader import validation_windows
from spherelm.data.prepare import prepare
from spherelm.data.shards import open_tokens
from spherelm.data.stream import StreamLoader, held_out_windows
from spherelm.data.tokenizer import ByteTokenizer

pytest.importorskip("datasets", reason="streaming needs datasets: pip install '.[data]' in a clone of spherelm")

TEXTS = [f"{i}. " + "so many words " * (1 + 5 * i % 11) for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of several row groups; blocks of a few windows, pieces of a few documents."""
    monkeypatch.setattr(module, "SHUFFLE_TOKENS", 160)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 200)
    out = tmp_path / "text"
    out.mkdir()
    for i, texts in enumerate((TEXTS[:25], TEXTS[25:])):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), out / f"{i}.parquet", row_group_size=7)
    return out


def loader(folder: Path, val_fraction: float = 0.2, **settings: Any) -> StreamLoader:
    given = {"seq_len": 16, "batch_size": 6, "seed": 3, **settings}
    return StreamLoader(HubText(HubRequest(str(folder))), ByteTokenizer(), val_fraction=val_fraction, **given)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_the_windows_are_those_of_the_prepared_text(folder: Path, tmp_path: Path, val_fraction: float) -> None:
    """Each block holds the next ten windows of the endless row, in another order; held-out documents never come."""
    prepare([], tmp_path / "out", "bytes", val_fraction=val_fraction, hub=HubRequest(str(folder)))
    tokens = open_tokens(tmp_path / "out", "train")
    row = torch.from_numpy(tokens.read(0, len(tokens))).repeat(3)
    ours, count = loader(folder, val_fraction, batch_size=10), int(2.5 * len(tokens)) // 160
    orders = set[tuple[int, ...]]()
    for step in range(count):
        expected = row[step * 160 : (step + 1) * 160 + 1]
        got = torch.cat([ours.batch(step)[0], ours.batch(step)[1][:, -1:]], 1)
        windows = [expected[i * 16 : i * 16 + 17].tolist() for i in range(10)]
        assert sorted(windows) == sorted(got.tolist())
        orders.add(tuple(windows.index(window) for window in got.tolist()))
    assert len(orders) > count // 2


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_are_one_process(folder: Path, world_size: int) -> None:
    whole = loader(folder)
    ranks = [loader(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(30):
        parts = [rank.batch(step) for rank in ranks]
        assert same(whole.batch(step), tuple(torch.cat(part) for part in zip(*parts, strict=True)))
        states = [rank.state(step + 1) for rank in ranks]
        assert all(state == whole.state(step + 1) for state in states)


def test_every_saved_position_goes_on_exactly(folder: Path) -> None:
    """From one process to two and back, over the ends of blocks and of the text."""
    whole = loader(folder)
    batches, states = list[Any](), [whole.state(0)]
    for step in range(60):
        batches.append(whole.batch(step))
        states.append(json.loads(json.dumps(whole.state(step + 1))))
    assert max(len(json.dumps(state)) for state in states) < 1000
    for start in range(0, 60, 7):
        other, second = loader(folder), loader(folder, rank=1, world_size=2)
        for one in (other, second):
            one.restore(states[start])
        for step in range(start, min(start + 9, 60)):
            assert same(other.batch(step), batches[step])
            assert torch.equal(second.batch(step)[0], batches[step][0][3:])
            assert same(other.batch(step), batches[step]), "again"
        chained = loader(folder)
        chained.restore(json.loads(json.dumps(other.state(step))))
        assert same(chained.batch(step), batches[step])
    without = loader(folder)
    without.restore({})
    assert same(without.batch(30), batches[30]), "from the start"


def test_a_stream_only_goes_forward(folder: Path) -> None:
    ours = loader(folder)
    for step in range(9):
        ours.batch(step)
    with pytest.raises(ValueError, match="a stream only moves forward"):
        ours.batch(0)
    state = ours.state(9)
    with pytest.raises(ValueError, match=r"shuffled 10 windows at a time, now it is 20"):
        loader(folder, seq_len=8).restore(state)


def test_a_stream_without_training_text(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no training text"):
        loader(folder, val_fraction=1 - 1e-12).batch(0)


def test_validation_windows_are_the_first_held_out_documents(folder: Path, tmp_path: Path) -> None:
    prepare([], tmp_path / "out", "bytes", val_fraction=0.3, hub=HubRequest(str(folder)))
    tokens = open_tokens(tmp_path / "out", "val")
    text = HubText(HubRequest(str(folder)))
    with closing(text.blocks(None, 200)) as blocks:
        windows, per_byte, fingerprint = held_out_windows(blocks, ByteTokenizer(), 0.3, 16, 10**6)
    whole = validation_windows(tokens, 16, 10**6)
    assert same(windows, whole)
    assert per_byte == len(tokens) / tokens.bytes_total
    with closing(text.blocks(None, 200)) as blocks:
        few, _, other = held_out_windows(blocks, ByteTokenizer(), 0.3, 16, 5)
    assert same(few, tuple(part[:5] for part in whole))
    assert other != fingerprint
    with closing(text.blocks(None)) as blocks, pytest.raises(ValueError, match="less than one window of 99999"):
        held_out_windows(blocks, ByteTokenizer(), 0.3, 99999, 5)
