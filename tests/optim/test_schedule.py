from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

import paper
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spherelm.optim.schedule import ScheduleConfig, factor, logarithmic

KINDS = get_args(get_type_hints(ScheduleConfig)["kind"])
DECAYING = [kind for kind in KINDS if kind != "constant"]
configs = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(KINDS),
    warmup_steps=st.integers(0, 30),
    final=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 1),
    decay_shape=st.sampled_from(["linear", "minus_sqrt"]),
    rho=st.floats(0.01, 10),
)


def oracle(kind: str, r: float, end: float, rho: float) -> float:
    decays = {"cosine": paper.cosine_decay, "linear": paper.linear_decay}
    return paper.log_decay(r, rho, end) if kind == "log" else decays[kind](r, end)


@pytest.mark.row("Schedules")
@pytest.mark.parametrize("kind", ["cosine", "linear", "log"])
@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 10])
def test_every_step_is_the_papers_formula(kind: str, end: float, warmup: int) -> None:
    config = ScheduleConfig(kind, warmup_steps=warmup, final=end, rho=0.2)
    for step in range(warmup, 101):
        r = (step - warmup) / (100 - warmup)
        assert factor(config, step, 100) == pytest.approx(oracle(kind, r, end, 0.2), rel=1e-12, abs=1e-15)


@given(configs, st.integers(31, 500))
def test_the_factor_rises_to_the_peak_then_never_rises_again(config: ScheduleConfig, total: int) -> None:
    factors = [factor(config, step, total) for step in range(total + 1)]
    warm = config.warmup_steps
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert factors[:warm] == pytest.approx([(i + 1) / warm for i in range(warm)])
    assert factors[warm] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in zip(factors[warm:], factors[warm + 1 :], strict=False))
    if config.kind != "constant":
        assert factors[total] == pytest.approx(config.final, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_is_at_the_peak_without_warm_up(kind: str) -> None:
    assert factor(ScheduleConfig(kind), 0, 50) == pytest.approx(1)


@pytest.mark.parametrize("kind", DECAYING)
def test_the_last_update_is_near_the_final_rate_and_still_moves(kind: str) -> None:
    assert 0 < factor(ScheduleConfig(kind), 999, 1000) < 0.01


def test_a_constant_rate_is_constant() -> None:
    config = ScheduleConfig("constant", warmup_steps=2, final=0.3)
    assert [factor(config, i, 5) for i in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.row("Schedules")
@pytest.mark.parametrize(("shape", "formula"), [("linear", paper.linear_decay), ("minus_sqrt", paper.minus_sqrt_decay)])
def test_wsd_is_stable_then_falls(shape: Any, formula: Any) -> None:
    config = ScheduleConfig("wsd", warmup_steps=10, decay_fraction=0.2, final=0.1, decay_shape=shape)
    factors = [factor(config, i, 110) for i in range(111)]
    assert factors[10:91] == pytest.approx([1.0] * 81)
    assert factors[90:] == pytest.approx([formula(i / 20, 0.1) for i in range(21)])


def test_cosine_is_half_way_in_the_middle() -> None:
    assert factor(ScheduleConfig("cosine"), 50, 100) == pytest.approx(0.5)
    assert factor(ScheduleConfig("cosine", final=0.1), 50, 100) == pytest.approx(0.55)


@pytest.mark.parametrize("rho", [0.02, 0.1, 1.0, 5.0])
def test_the_area_under_the_logarithmic_decay(rho: float) -> None:
    total = 20_000
    config = ScheduleConfig("log", rho=rho)
    # the trapezoid rule over all steps
    area = (sum(factor(config, i, total) for i in range(total)) - 0.5) / total
    assert area == pytest.approx(paper.log_decay_area(rho), rel=1e-4)
    assert logarithmic(0.0, rho) == 1.0
    assert logarithmic(1.0, rho) == pytest.approx(0.0, abs=1e-15)


def test_a_smaller_rho_falls_earlier() -> None:
    halves = [factor(ScheduleConfig("log", rho=rho), 50, 100) for rho in (0.01, 0.1, 1.0, 100.0)]
    assert halves == sorted(halves)
    assert halves[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("total", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_shorter_than_its_warm_up_only_warms_up(kind: str, total: int) -> None:
    config = ScheduleConfig(kind, warmup_steps=4)
    assert [factor(config, i, total) for i in range(total)] == [(i + 1) / 4 for i in range(total)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosin"}, "kind must be 'constant', 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"final": 1.5}, r"final must be at most 1, got 1.5"),
        ({"decay_fraction": 0.0}, r"decay_fraction must be more than 0, got 0.0"),
        ({"rho": 0.0}, "rho must be at least 2.225e-308, got 0.0"),
        ({"rho": math.inf}, "rho must be a finite number, got inf"),
        ({"rho": 1e-320}, "rho must be at least 2.225e-308, got 1e-320"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)
