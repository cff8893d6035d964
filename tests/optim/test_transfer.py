"""nuGPT's rules, each by itself and all at once, as numbers worked out by hand from the paper's table."""

from __future__ import annotations

import dataclasses

import pytest

from spherelm.optim.transfer import BaseShape, transfer

BASE = BaseShape(d_model=64, n_layers=4, steps=1000)


def test_the_base_itself_only_halves_the_output_rate() -> None:
    rules = transfer(BASE, 64, 4, 1000)
    assert (rules.rate, rules.alpha_init, rules.s_z_init) == (1, 1, 1)
    assert dataclasses.asdict(rules.multipliers) == {
        "input_embedding": 1,
        "output_embedding": 0.5,
        "matrix": 1,
        "scale": 1,
        "gain": 1,
        "router": 1,
    }


def test_sixteen_times_the_width() -> None:
    rules = transfer(BASE, 1024, 4, 1000)
    assert rules.multipliers.input_embedding == pytest.approx(1 / 4)  # 16^(-1/2)
    assert rules.multipliers.matrix == pytest.approx(1 / 8)  # 16^(-3/4)
    assert rules.multipliers.output_embedding == pytest.approx(1 / 16)
    assert rules.multipliers.scale == 1
    assert rules.s_z_init == pytest.approx(4)  # 16^(1/2)
    assert (rules.rate, rules.alpha_init) == (1, 1)


def test_eight_times_the_updates() -> None:
    rules = transfer(BASE, 64, 4, 8000)
    assert rules.rate == pytest.approx(1 / 2)  # 8^(-1/3), of every role, scales included
    assert dataclasses.replace(rules, rate=1.0) == transfer(BASE, 64, 4, 1000)


def test_three_times_the_depth_changes_alpha_alone() -> None:
    rules = transfer(BASE, 64, 12, 1000)
    assert rules.alpha_init == pytest.approx(1 / 3)
    assert dataclasses.replace(rules, alpha_init=1.0) == transfer(BASE, 64, 4, 1000)


def test_two_transfers_in_a_row_are_one() -> None:
    """But for the half of the output rate, which belongs to every shape."""
    first, second = transfer(BASE, 256, 8, 3000), transfer(BaseShape(256, 8, 3000), 512, 24, 500)
    both = transfer(BASE, 512, 24, 500)
    assert both.rate == pytest.approx(first.rate * second.rate)
    assert both.alpha_init == pytest.approx(first.alpha_init * second.alpha_init)
    assert both.s_z_init == pytest.approx(first.s_z_init * second.s_z_init)
    for role in ("input_embedding", "matrix"):
        product = getattr(first.multipliers, role) * getattr(second.multipliers, role)
        assert getattr(both.multipliers, role) == pytest.approx(product)


def test_a_base_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n_layers must be more than 0, got 0"):
        BaseShape(64, 0, 10)
