"""The step timer: both arms in turn, the ratio of neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spherelm.experiments import cost as module
from spherelm.experiments.cost import measure_cost, median_ratio, time_in_turn


def test_a_step_of_each_arm_takes_time(data: Path) -> None:
    cost = measure_cost(tiny.run_config("gpt", data), tiny.run_config("ngpt", data), steps=3, warmup=1)
    assert cost.gpt_seconds > 0
    assert cost.ngpt_seconds > 0
    assert cost.ratio > 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who took a step, in order; an nGPT step takes 3 s when GPT's takes 2,
    and a slow machine doubles every other pair.
    """
    taken: list[Any] = []

    def time_step(self: Any) -> float:
        taken.append(self)
        slow = 2 if (len(taken) - 1) // 2 % 2 else 1
        return slow * (3.0 if hasattr(self.model.head, "s_z") else 2.0)

    monkeypatch.setattr(module.TimedSteps, "time_step", time_step)
    return taken


def test_the_arms_take_turns_and_the_order_changes(steps: list[Any], data: Path) -> None:
    measure_cost(tiny.run_config("gpt", data), tiny.run_config("ngpt", data), steps=4, warmup=1)
    arms = ["ngpt" if hasattr(step.model.head, "s_z") else "gpt" for step in steps]
    assert arms == ["gpt", "ngpt"] + ["gpt", "ngpt", "ngpt", "gpt"] * 2


def test_the_ratio_is_of_neighbours_so_that_a_machines_moods_cancel(steps: list[Any], data: Path) -> None:
    cost = measure_cost(tiny.run_config("gpt", data), tiny.run_config("ngpt", data), steps=5, warmup=0)
    assert cost.ratio == pytest.approx(1.5)
    assert (cost.gpt_seconds, cost.ngpt_seconds) == (2.0, 3.0)


def test_more_than_two_take_turns_too_and_every_other_round_goes_backwards(steps: list[Any], data: Path) -> None:
    configs = {f"{arm}-{seed}": tiny.run_config(arm, data) for seed in (0, 1) for arm in tiny.ARMS}
    times = time_in_turn(configs, steps=2, warmup=0)
    assert list(times) == list(configs)
    assert steps[4:] == steps[:4][::-1]
    assert len({id(step) for step in steps}) == 4
    assert all(len(own) == 2 for own in times.values())


def test_the_ratio_is_the_median_over_rounds() -> None:
    assert median_ratio([3.0, 8.0, 2.0], [2.0, 2.0, 2.0]) == 1.5
    with pytest.raises(ValueError, match="longer"):
        median_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("micro_batch_size", "rows"), [(None, 4), (2, 2)])
def test_what_is_timed_is_a_micro_batch_of_the_runs_own_model(
    micro_batch_size: int | None, rows: int, steps: list[Any], data: Path
) -> None:
    configs = [tiny.run_config(arm, data, micro_batch_size=micro_batch_size, dtype="bfloat16") for arm in tiny.ARMS]
    measure_cost(configs[0], configs[1], steps=1, warmup=0)
    for taken, config in zip(steps, configs, strict=True):
        assert taken.model.config == config.model
        assert taken.model.runtime.compute_dtype is torch.bfloat16
        assert taken.tokens.shape == taken.targets.shape == (rows, 16)
        assert taken.tokens.max() < 257
        assert taken.grad_clip == 1.0


def test_a_timed_step_is_a_whole_update(data: Path) -> None:
    taken = module.TimedSteps(tiny.run_config("ngpt", data))
    before = {name: parameter.detach().clone() for name, parameter in taken.model.named_parameters()}
    assert taken.time_step() > 0
    assert all(not torch.equal(p, before[name]) for name, p in taken.model.named_parameters())
    assert all(p.grad is None for p in taken.model.parameters())
    assert {name: p.shape for name, p in taken.model.named_parameters()} == {n: p.shape for n, p in before.items()}


def test_timing_survives_a_compiler_that_does_not_work(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: torch.nn.Module) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    configs = [tiny.run_config(arm, data, compile=True) for arm in tiny.ARMS]
    assert measure_cost(configs[0], configs[1], steps=1, warmup=1).ratio > 0
    assert capsys.readouterr().err.count("torch.compile does not work here (no compiler)") == 2
