"""The mean loss over windows, and its unit that compares across tokenizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spherelm.evaluate.perplexity import bits_per_byte, mean_loss


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_mean_is_over_all_targets_that_count(arm: str, batch_size: int, case: Any) -> None:
    """Three windows with 6, 9 and 8 targets: a mean of windows' or batches' means would be another number."""
    c = case(arm)
    logits = c.model(c.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), c.targets.flatten(), ignore_index=-100).item()
    assert mean_loss(c.model, c.tokens, c.targets, batch_size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, case: Any) -> None:
    c = case("ngpt")
    c.model.train(training)
    before = {name: value.clone() for name, value in c.model.state_dict().items()}
    mean_loss(c.model, c.tokens, c.targets, 2)
    assert c.model.training is training
    assert all(torch.equal(value, before[name]) for name, value in c.model.state_dict().items())
    assert all(parameter.grad is None for parameter in c.model.parameters())


def test_bits_per_byte_of_even_odds() -> None:
    assert bits_per_byte(math.log(256), tokens_per_byte=1.0) == pytest.approx(8)
    assert bits_per_byte(math.log(4096), tokens_per_byte=0.25) == pytest.approx(3)
