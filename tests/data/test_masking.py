"""Hidden tokens: how many, which, and that nothing but (seed, step, row) decides."""

from __future__ import annotations

from pathlib import Path

import torch

from spherelm.data.loader import Loader
from spherelm.data.masking import MaskedBatches, hidden
from spherelm.data.shards import open_tokens

MASK = 257


def batches(data: Path, rank: int = 0, world_size: int = 1) -> MaskedBatches:
    text = Loader(open_tokens(data, "train"), 16, 4, 0, rank, world_size)
    return MaskedBatches(text, MASK, 0.25, 0, rank)


def test_each_row_hides_its_part_and_asks_for_nothing_else() -> None:
    tokens = torch.randint(MASK, (50, 200))
    seen, targets = hidden(tokens, MASK, 0.2, 0)
    asked = targets != -100
    assert (asked.sum(1) == 40).all()
    assert torch.equal(targets[asked], tokens[asked])
    assert torch.equal(seen[~asked], tokens[~asked])
    assert ((seen == MASK).sum(1) == 32).all(), "eight in ten of them"
    kept = (seen == tokens) & asked
    assert 4 * 50 <= kept.sum() <= 4 * 50 + 10, "one in ten as it is; an exchanged token is itself once in 257"
    assert asked.float().mean(0).std() < 0.1, "places are spread evenly"


def test_a_short_row_hides_one() -> None:
    seen, targets = hidden(torch.tensor([[5, 6]]), MASK, 0.15, 0)
    assert (seen == MASK).sum() == (targets != -100).sum() == 1


def test_every_update_hides_others_and_every_process_the_same(data: Path) -> None:
    whole = batches(data)
    assert not torch.equal(whole.batch(0)[1] != -100, whole.batch(1)[1] != -100)
    parts = [batches(data, rank, 2).batch(3) for rank in range(2)]
    for one, other in zip(whole.batch(3), zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(other))
    assert torch.equal(batches(data).batch(3)[0], whole.batch(3)[0])
