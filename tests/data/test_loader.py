"""The loader: a bijection, the same for any number of ranks, pure in the step; fixed validation windows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spherelm.data.loader import Loader, validation_windows
from spherelm.data.permutation import Permutation
from spherelm.data.shards import Shard, Tokens
from spherelm.data.tokenizer import ByteTokenizer


class Positions(ByteTokenizer):
    """A vocabulary as long as the text, so that each token can be its own position."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.eos_id = 100_000, 99_999


def positions(directory: Path, length: int) -> Tokens:
    """Tokens 0, 1, 2, ... over three shards, the last being the end token."""
    bounds = [0, length // 3, length // 2, length]
    for i in range(3):
        ids = list(range(bounds[i], bounds[i + 1]))
        tiny.write_shard(directory / f"{i}.bin", [ids], Positions(), len(ids))
    shards = [Shard(directory / f"{i}.bin") for i in range(3)]
    tokens = Tokens(shards, directory, "train")
    assert len(tokens) == length + 3
    return tokens


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return positions(tmp_path_factory.mktemp("text"), 997)


@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_permutation_is_a_bijection(size: int, key: str) -> None:
    order = Permutation(size, key)
    assert sorted(order(range(size)).tolist()) == list(range(size))


@given(size=st.integers(1, 1 << 62), indices=st.lists(st.integers(0, (1 << 62) - 1), min_size=1, max_size=50))
def test_permutation_of_any_size_is_injective(size: int, indices: list[int]) -> None:
    inside = sorted({i % size for i in indices})
    images = Permutation(size, "key")(inside).tolist()
    assert len(set(images)) == len(inside)
    assert all(0 <= image < size for image in images)


def test_permutation_is_pinned() -> None:
    """Runs must be repeatable by later versions: this order may never change."""
    assert Permutation(10, "spherelm")(range(10)).tolist() == [3, 7, 2, 6, 8, 1, 9, 0, 5, 4]


def test_permutation_looks_random() -> None:
    """Over many keys every index goes everywhere about equally often, and so do neighbours' distances."""
    size, keys = 7, 1400
    images = torch.tensor([Permutation(size, str(key))(range(size)).tolist() for key in range(keys)])
    expected = keys / size
    for index in range(size):
        counts = torch.bincount(images[:, index], minlength=size)
        assert (counts - expected).abs().max() < 5 * expected**0.5
    steps = torch.bincount((images[:, 1] - images[:, 0]) % size, minlength=size)
    assert steps[0] == 0
    assert (steps[1:] - keys / (size - 1)).abs().max() < 5 * (keys / (size - 1)) ** 0.5


@pytest.mark.parametrize("size", [0, -1, (1 << 62) + 1])
def test_permutation_of_no_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"not {size}"):
        Permutation(size, "")


def test_permutation_checks_its_argument() -> None:
    with pytest.raises(IndexError, match="index 5 outside"):
        Permutation(5, "")([5])


@settings(max_examples=20)
@given(seq_len=st.integers(1, 60), share=st.integers(1, 3), seed=st.integers(0, 9), step=st.integers(0, 10**6))
def test_ranks_together_are_one_process(text: Tokens, seq_len: int, share: int, seed: int, step: int) -> None:
    batch_size = 4 * share
    whole = Loader(text, seq_len, batch_size, seed).batch(step)
    for world_size in (1, 2, 4):
        ranks = [Loader(text, seq_len, batch_size, seed, rank, world_size).batch(step) for rank in range(world_size)]
        for part, expected in zip(zip(*ranks, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(part), expected)


@pytest.mark.parametrize("seq_len", [16, 200])
def test_no_window_comes_twice_in_an_epoch_at_any_world_size(text: Tokens, seq_len: int) -> None:
    """The ranks' windows of a few epochs, borders included:
    each epoch's once, nothing shared, the same at every size.
    """
    batch_size = 24
    seen = list[list[tuple[int, ...]]]()
    for world_size in (1, 2, 3, 4, 8):
        ranks = [Loader(text, seq_len, batch_size, 7, rank, world_size) for rank in range(world_size)]
        windows = ranks[0].windows
        rows = [tuple(row.tolist()) for step in range(3 * windows) for r in ranks for row in r.batch(step)[0]]
        for epoch in range(24):
            part = rows[epoch * windows : (epoch + 1) * windows]
            assert len(part) == len(set(part)) == windows
        seen.append(rows)
    assert all(rows == seen[0] for rows in seen)


def test_batch_is_a_pure_function_of_the_step(text: Tokens) -> None:
    one, other = Loader(text, 16, 4, seed=3), Loader(text, 16, 4, seed=3)
    forward = [one.batch(step) for step in range(40)]
    backward = [other.batch(step) for step in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for x, y in zip(forward, backward, strict=True) for a, b in zip(x, y, strict=True))
    tokens, targets = forward[0]
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.is_contiguous()
    assert targets.is_contiguous()


def test_targets_are_the_next_tokens(text: Tokens) -> None:
    whole = text.read(0, len(text))
    tokens, targets = Loader(text, 16, 4, seed=0).batch(5)
    starts = Loader(text, 16, 4, seed=0).window_starts(20, 4)
    for row, start in enumerate(starts):
        assert tokens[row].tolist() == whole[start : start + 16].tolist()
        assert targets[row].tolist() == whole[start + 1 : start + 17].tolist()


@settings(max_examples=30)
@given(seq_len=st.integers(1, 999), seed=st.integers(0, 100))
def test_an_epoch_visits_each_window_once(text: Tokens, seq_len: int, seed: int) -> None:
    loader = Loader(text, seq_len, 1, seed)
    n = loader.windows
    assert n * seq_len + 1 <= len(text) < (n + 2) * seq_len + 1
    for epoch in range(3):
        starts = sorted(loader.window_starts(epoch * n, n))
        assert 0 <= starts[0] < seq_len
        assert starts == list(range(starts[0], starts[0] + n * seq_len, seq_len))
        assert starts[-1] + seq_len + 1 <= len(text)


def test_epochs_and_seeds_differ(text: Tokens) -> None:
    loader = Loader(text, 16, 4, seed=0)
    n = loader.windows
    orders = [loader.window_starts(epoch * n, n) for epoch in range(6)]
    orders += [Loader(text, 16, 4, seed).window_starts(0, n) for seed in (1, 2, 3)]
    assert len({tuple(order) for order in orders}) == 9
    assert len({min(order) for order in orders}) > 3, "the borders move"


def test_a_batch_may_span_epochs(text: Tokens) -> None:
    loader = Loader(text, 200, 16, seed=0)
    assert loader.windows == 4
    starts = loader.window_starts(6, 16)
    assert starts == [loader.window_starts(i, 1)[0] for i in range(6, 22)]


def test_sequence_longer_than_the_text(text: Tokens) -> None:
    Loader(text, len(text) - 1, 1, 0).batch(0)
    for call in (lambda: Loader(text, 1000, 1, 0), lambda: validation_windows(text, 1000, 1)):
        with pytest.raises(ValueError, match=r"1000 needs 1001 tokens, but .* has 1000: use a shorter --seq-len"):
            call()


def test_bad_arguments(text: Tokens) -> None:
    for batch_size, world_size in [(6, 4), (0, 1), (-2, 2), (4, 0)]:
        with pytest.raises(ValueError, match=f"batch size {batch_size} does not divide among {world_size}"):
            Loader(text, 8, batch_size, 0, 0, world_size)
    with pytest.raises(ValueError, match="rank 2"):
        Loader(text, 8, 2, 0, 2, 2)
    with pytest.raises(ValueError, match="sequence length 0"):
        Loader(text, 0, 2, 0)
    with pytest.raises(ValueError, match="0 validation windows"):
        validation_windows(text, 8, 0)


@given(seq_len=st.integers(1, 999), count=st.integers(1, 200))
def test_validation_windows(text: Tokens, seq_len: int, count: int) -> None:
    tokens, targets = validation_windows(text, seq_len, count)
    available = (len(text) - 1) // seq_len
    assert tokens.shape == targets.shape == (min(count, available), seq_len)
    whole = text.read(0, len(text)).tolist()
    starts = [row * available // len(tokens) * seq_len for row in range(len(tokens))]
    gaps = {b - a for a, b in pairwise(starts)}
    assert all(gap >= seq_len for gap in gaps), "none overlaps another"
    assert not gaps or max(gaps) - min(gaps) <= seq_len, "evenly spread"
    for row, start in enumerate(starts):
        assert [*tokens[row].tolist(), targets[row, -1].item()] == whole[start : start + seq_len + 1]
