"""Runs of models with experts: what they tell, what their checkpoints hold, and updates that leave nothing behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from spherelm import load_model
from spherelm.data.loader import Loader
from spherelm.data.shards import open_tokens
from spherelm.layers.moe import routers
from spherelm.models import Decoder, build
from spherelm.recipes import make_run
from spherelm.runs.checkpoint import WEIGHTS
from spherelm.runs.config import RunConfig
from spherelm.runs.group import Group
from spherelm.runs.metrics import read_metrics
from spherelm.train import trainer
from spherelm.train.estimate import estimate, estimate_table
from spherelm.train.parallel import distributed
from spherelm.train.trainer import Trainer, train
from spherelm.train.update import gradients_of_batch

both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


def run_config(arm: str, data: Path, **overrides: Any) -> RunConfig:
    """Six steps in float32 of two layers of experts behind attention."""
    sizes = {"d_model": 16, "n_heads": 2, "d_ff": 24, "n_experts": 6, "seq_len": 16, "batch_size": 4, "steps": 6}
    rest = {"eval_every": 3, "eval_windows": 6, "compile": False, "dtype": "float32", "lr": 5e-3}
    rest |= {"balance_rate": 0.02} if overrides.get("balance", "bias") == "bias" else {}
    given = {**sizes, **rest, "pattern": "AOO", **overrides}
    return make_run(arm, "hybrid", vocab_size=tiny.VOCAB, data=str(data), **given)


def biases(model: Decoder) -> list[Tensor]:
    return [router.score_bias for _, router in routers(model)]


@both_arms
def test_an_update_tells_how_even_the_load_was(arm: str, data: Path, tmp_path: Path) -> None:
    train(run_config(arm, data, diagnose_every=3), tmp_path / "run", show_progress=False)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert all(1 <= r["load_max"] <= 3 and 0 <= r["load_entropy"] <= 1 for r in records), "two of six are picked"
    told = [r for r in records if "load_max_by_layer" in r]
    assert [r["step"] for r in told] == [3, 6]
    for record in told:
        assert record["load_max"] == max(record["load_max_by_layer"])
        assert len(record["load_entropy_by_layer"]) == len(record["bias_range_by_layer"]) == 2


def test_a_model_without_experts_tells_nothing_of_them(data: Path, tmp_path: Path) -> None:
    train(tiny.run_config("ngpt", data, diagnose_every=2), tmp_path / "run", show_progress=False)
    assert not any("load" in key for r in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in r)


@pytest.mark.parametrize(("arm", "balance"), [("gpt", "bias"), ("ngpt", "loss")])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(arm: str, balance: str, data: Path, tmp_path: Path) -> None:
    """With micro-batches, and in the same number of bits: the biases are in the checkpoint.

    An odd number of updates, each a step up or down of the same size, leaves no bias at 0.
    """
    config = run_config(arm, data, balance=balance, save_every=2, micro_batch_size=2, steps=5)
    _, ours = tiny.assert_resumes(config, tmp_path)
    saved = {name: tensor for name, tensor in load_file(ours / WEIGHTS).items() if "score_bias" in name}
    assert list(saved) == [f"blocks.{i}.experts.part.router.score_bias" for i in (1, 2)]
    assert all((tensor.abs().max() > 0) == (balance == "bias") for tensor in saved.values())
    assert all(torch.equal(a, b) for a, b in zip(biases(load_model(ours)), saved.values(), strict=True))


def test_accumulated_micro_batches_are_the_batch(data: Path, tmp_path: Path) -> None:
    """And so is recomputing: the biases, which counts decide, are the same."""
    found = {}
    for name, fields in (("whole", {}), ("parts", {"micro_batch_size": 1}), ("again", {"recompute": True})):
        train(run_config("ngpt", data, **fields), tmp_path / name, show_progress=False)
        found[name] = biases(load_model(tmp_path / name))
    for name in ("parts", "again"):
        assert all(torch.equal(a, b) for a, b in zip(found["whole"], found[name], strict=True))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_that_balances_is_of_the_whole_batch(size: int, recompute: bool, data: Path) -> None:
    """Its gradient from micro-batches is that from one pass over all; loads count once, and nothing is left behind."""
    loader, found = Loader(open_tokens(data, "train"), 16, 4, seed=0), []
    for parts in (None, size):
        torch.manual_seed(0)
        model = build(run_config("ngpt", data, balance="loss").model).double()
        for _, router in routers(model):
            router.coefficient = 10.0  # else it is a small part of the gradient
        gradients_of_batch(distributed(model, Group(), recompute), loader, 0, parts)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(int(router.load.sum()) == 2 * 4 * 16 for _, router in routers(model))
        assert all(router.batch_load is None is router.pending for _, router in routers(model))
    for name, whole in found[0].items():
        assert (found[1][name] - whole).abs().max() <= 1e-12 * whole.abs().max(), name


def test_an_update_that_is_left_out_is_not_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer.gradients_of_batch

    def bad_once(model: Any, loader: Any, step: int, *rest: Any) -> Tensor:
        loss = real(model, loader, step, *rest)
        return loss * math.nan if step == 2 else loss

    monkeypatch.setattr(trainer, "gradients_of_batch", bad_once)
    run = Trainer(run_config("ngpt", data, on_bad_step="skip", eval_every=0), tmp_path / "run")
    seen = []
    step = run.optimizer.step

    def stepped() -> Any:
        seen.append([int(router.load.sum()) for _, router in routers(run.model)])
        return step()

    run.optimizer.step = stepped  # type: ignore[method-assign, assignment]
    run.run(show_progress=False)
    assert seen == [[2 * 4 * 16] * 2] * 5


def test_a_dry_run_tells_what_a_token_meets(data: Path) -> None:
    found = estimate(run_config("ngpt", data))
    width = 12  # an MLP's 24 over the two that are picked
    per_expert = 3 * 16 * width + 2 * width
    assert found["parameters"] - found["parameters_active"] == 2 * 4 * per_expert
    assert found["parameters_by_role"]["router"] == 2 * 6 * 16
    assert f"{found['parameters_active']:,}" in estimate_table(found)
    plain = estimate(tiny.run_config("ngpt", data))
    assert plain["parameters"] == plain["parameters_active"]
    assert "active per token" not in estimate_table(plain)
