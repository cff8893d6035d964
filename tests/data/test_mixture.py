"""Mixtures: exact proportions at every window, each text in its own order, the same for any number of ranks."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spherelm.data.loader import Loader
from spherelm.data.mixture import LONGEST_CYCLE, MixtureLoader, cycle, shares
from spherelm.data.shards import Shard, Tokens
from spherelm.data.tokenizer import ByteTokenizer


def text(directory: Path, letter: str, length: int, tokenizer: ByteTokenizer | None = None) -> Tokens:
    """One document of counted letters, so that each token says which text it is from."""
    tokenizer = tokenizer or ByteTokenizer()
    ids = [ord(letter) + i % 8 for i in range(length)]
    tiny.write_shard(directory / f"{letter}.bin", [ids], tokenizer, length)
    return Tokens([Shard(directory / f"{letter}.bin")], directory / letter, "train")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Tokens]:
    directory = tmp_path_factory.mktemp("texts")
    return [text(directory, letter, length) for letter, length in (("A", 700), ("a", 300), ("0", 90))]


def weights(*values: str) -> list[Fraction]:
    return [Fraction(value) for value in values]


@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_counts_never_stray_by_one(parts: list[int]) -> None:
    divisor = gcd(*parts)
    parts = [part // divisor for part in parts]
    order, total = cycle(tuple(parts)), sum(parts)
    counts = np.cumsum(order[:, None] == np.arange(len(parts)), axis=0)
    windows = np.arange(1, total + 1)[:, None]
    assert (np.abs(counts * total - windows * np.array(parts)) < total).all()
    assert counts[-1].tolist() == parts


def test_shares_are_exact() -> None:
    assert shares(weights("0.7", "0.3")) == (7, 3)
    assert shares(weights("1", "1", "2")) == (1, 1, 2)
    assert shares(weights("0.125", "3")) == (1, 24)
    assert shares(weights("5")) == (1,)
    with pytest.raises(ValueError, match="weight of 0: weights must be positive"):
        shares(weights("1", "0"))
    with pytest.raises(
        ValueError, match=f"common denominator is 1000001, more than {LONGEST_CYCLE}: give fewer digits"
    ):
        shares(weights("0.000001", "1"))


@pytest.mark.row("Data at scale")
@settings(max_examples=20)
@given(seq_len=st.integers(1, 60), share=st.integers(1, 2), seed=st.integers(0, 9), step=st.integers(0, 10**6))
def test_ranks_together_are_one_process(texts: list[Tokens], seq_len: int, share: int, seed: int, step: int) -> None:
    mixed, batch_size = weights("0.5", "0.3", "0.2"), 24 * share
    whole = MixtureLoader(texts, mixed, seq_len, batch_size, seed).batch(step)
    for world_size in (2, 3, 4, 8):
        ranks = [
            MixtureLoader(texts, mixed, seq_len, batch_size, seed, rank, world_size).batch(step)
            for rank in range(world_size)
        ]
        for part, expected in zip(zip(*ranks, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(part), expected)


@pytest.mark.parametrize("step", [0, 3, 10**7])
def test_each_text_comes_as_it_would_alone(texts: list[Tokens], step: int) -> None:
    """Over many of its epochs: what is left of the mixture without the others is the text's own stream."""
    mixed = weights("0.55", "0.35", "0.1")
    loader = MixtureLoader(texts, mixed, 16, 200, seed=5)
    tokens, targets = loader.batch(step)
    sources = loader.sources(step * 200, 200)
    assert np.bincount(sources).tolist() == [110, 70, 20]
    for number, (one, weight) in enumerate(zip(texts, mixed, strict=True)):
        rows = torch.from_numpy(np.flatnonzero(sources == number))
        alone = Loader(one, 16, 1, seed=5)
        before = step * 200 * weight
        assert before.denominator == 1
        starts = alone.window_starts(int(before), len(rows))
        expected = torch.tensor(np.stack([one.read(start, 17) for start in starts]))
        assert torch.equal(tokens[rows], expected[:, :-1])
        assert torch.equal(targets[rows], expected[:, 1:])


def test_a_text_alone_is_the_loader(texts: list[Tokens]) -> None:
    alone, mixture = Loader(texts[0], 16, 4, seed=1), MixtureLoader(texts[:1], weights("0.4"), 16, 4, seed=1)
    for step in (0, 1, 17, 500):
        assert all(torch.equal(a, b) for a, b in zip(alone.batch(step), mixture.batch(step), strict=True))
    assert mixture.state(3) == {}


def test_refusals(texts: list[Tokens], tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.fingerprint = "other"

    with pytest.raises(ValueError, match="were prepared with different tokenizers: prepare them with one"):
        MixtureLoader([texts[0], text(tmp_path, "x", 50, Other())], weights("1", "1"), 8, 4, 0)
    with pytest.raises(ValueError, match="batch size 6 does not divide among 4"):
        MixtureLoader(texts, weights("1", "1", "1"), 8, 6, 0, 0, 4)
    with pytest.raises(ValueError, match="sequence length 200 needs 201 tokens"):
        MixtureLoader(texts, weights("1", "1", "1"), 200, 4, 0)
