"""Which updates are bad, and what becomes of them."""

from __future__ import annotations

import math

import pytest

from spherelm.runs.config import TrainConfig
from spherelm.train.guard import TRUSTED, Diverged, Guard


def guard(**fields: object) -> Guard:
    return Guard(TrainConfig(steps=100, seq_len=1, batch_size=1, **fields))  # type: ignore[arg-type]


def test_a_norm_far_above_its_average_is_a_spike() -> None:
    judge = guard(spike_factor=5.0)
    for step in range(TRUSTED + 10):
        assert judge.fault([3.0], 2.0 + 0.1 * math.sin(step), step) is None
    average = judge.norm
    assert 1.9 < average < 2.1
    fault = judge.fault([3.0], 11.0, TRUSTED + 10)
    assert fault == f"the gradient norm is 11 at step {TRUSTED + 11}, {11 / average:.1f} times its average"
    assert judge.norm == average, "a spike does not raise what counts as one"
    assert judge.fault([3.0], 9.0, TRUSTED + 11) is None


def test_no_spikes_before_there_is_an_average_nor_unless_asked_for() -> None:
    assert guard(spike_factor=2.0).fault([3.0], 1e9, 0) is None
    judge = guard()
    for step in range(TRUSTED + 1):
        assert judge.fault([3.0], 1.0, step) is None
    assert judge.fault([3.0], 1e9, TRUSTED + 1) is None


def test_what_is_no_number_is_named() -> None:
    assert guard().fault([math.nan], 1.0, 4) == "the loss is nan at step 5"
    assert guard().fault([1.0, math.inf, math.nan], 1.0, 4) == "the loss is inf at step 5 on rank 1, 2"
    assert guard().fault([1.0], math.nan, 4) == "the gradient norm is nan at step 5"


def test_stopping_skipping_and_the_budget() -> None:
    with pytest.raises(Diverged, match=r"^reason$"):
        guard().skip("reason")
    judge = guard(on_bad_step="skip", skip_budget=2)
    judge.skip("one")
    judge.skip("two")
    with pytest.raises(Diverged, match=r"^three, and all 2 updates that may be skipped were skipped$"):
        judge.skip("three")
    assert judge.skipped == 2
