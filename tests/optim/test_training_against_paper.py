"""Optimizer steps of both arms against Adam, AdamW, clipping and retraction written out in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import golden
import paper
import pytest
from cases import LR, assert_trained, assert_trains, train

from spherelm.optim import AdamW
from spherelm.optim.groups import OptimConfig, RateMultipliers
from spherelm.optim.schedule import ScheduleConfig, factor

both_arms = pytest.mark.parametrize("arm", golden.ARMS)


@both_arms
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"n_heads": 6, "n_kv_heads": 2}], ids=str)
def test_training_is_the_papers(arm: str, steps: int, fields: dict[str, Any], case: Any) -> None:
    assert_trains(case(arm, **fields), steps)


@both_arms
def test_schedule_and_multipliers_are_the_papers(arm: str, case: Any) -> None:
    c = case(arm)
    schedule = [factor(ScheduleConfig("cosine", warmup_steps=2), i, 10) for i in range(10)]
    multipliers = RateMultipliers(input_embedding=0.5, output_embedding=0.25, matrix=2.0, scale=3.0, gain=0.1)
    losses = train(c.model, OptimConfig(lr=LR, multipliers=multipliers), c.batches(10), schedule)

    def rate(name: str) -> float:
        if name.endswith(".value"):
            return 3 * LR
        special = {"embed.weight": 0.5, "head.weight": 0.25}
        return LR * (0.1 if "norm" in name else special.get(name, 2.0))

    def decay(name: str) -> float:
        """So that rate times decay is the same for every role, as `weight_decay` says."""
        return plain.decay(name) * LR / rate(name)

    plain = paper.paper_recipe(arm, LR)
    recipe = dataclasses.replace(plain, lr=rate, decay=decay)
    oracle = paper.train(
        c.forward,
        c.weights,
        c.shape,
        c.batches(10),
        recipe,
        lambda i: (i + 1) / 2 if i < 2 else paper.cosine_decay((i - 2) / 8),
    )
    assert_trained(c, losses, oracle)


def test_other_constants_reach_the_optimizer(case: Any) -> None:
    c = case("gpt")
    config = OptimConfig(lr=LR, optimizer=AdamW(betas=(0.8, 0.99), eps=1e-3), weight_decay=0.5, grad_clip=None)
    recipe = paper.Recipe(
        lambda name: LR, lambda name: 5 * paper.gpt_decay(name), betas=(0.8, 0.99), eps=1e-3, limit=float("inf")
    )
    losses = train(c.model, config, c.batches(5))
    assert_trained(c, losses, paper.train(c.forward, c.weights, c.shape, c.batches(5), recipe))


@both_arms
def test_the_twenty_golden_losses(arm: str, shared: Path) -> None:
    files = golden.load(shared, arm)
    losses = train(files.model, OptimConfig(lr=1e-3), files.batches())
    assert losses == pytest.approx(files.losses, rel=1e-9)


def test_a_mistake_is_noticed(mutated_arm: str, case: Any) -> None:
    """With one mistake in the oracle, three steps no longer agree anywhere near the tolerances above."""
    c = case(mutated_arm)
    losses = train(c.model, OptimConfig(lr=1e-2), c.batches(3))
    wrong, _ = paper.train(c.forward, c.weights, c.shape, c.batches(3), paper.paper_recipe(c.arm, 1e-2))
    assert max(abs(a - b) / b for a, b in zip(losses, wrong, strict=True)) > 1e-6
