"""Models of any kind over two processes, cut up by FSDP2 and recomputed, or in copies: as over one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import ranks
import torch

from spherelm import departure, load_model
from spherelm.runs.metrics import read_metrics

pytestmark = pytest.mark.slow
SPREADS = {
    "alone": (1, ()),
    "shard": (2, ("--strategy", "shard", "--recompute", "--micro-batch-size", "2")),
    "replicate": (2, ("--strategy", "replicate")),
}
STRONG = """
from spherelm.layers.moe import Router
Router.__init__.__defaults__ = (*Router.__init__.__defaults__[:-1], 100.0)
"""
"""The coefficient of the loss that balances experts: at its default it is too weak to be seen after a few updates."""


def train_alone_and_spread(
    models: Mapping[str, Sequence[str]], directory: Path, before: str = ""
) -> dict[str, dict[str, Path]]:
    """Train each model by the words of its command, in every way of `SPREADS`; the run directories by model and way."""
    jobs, runs = {}, {name: {way: directory / f"{name}-{way}" for way in SPREADS} for name in models}
    length = ["--steps", "4", "--seq-len", "16", "--batch-size", "8", "--eval-every", "4"]
    habits = ["--no-compile", "--lr", "0.002", "--dtype", "float32"]
    for name, words in models.items():
        for way, (processes, flags) in SPREADS.items():
            command = ["train", *length, *habits, *flags, "--out", str(runs[name][way]), *words]
            jobs[name, way] = ranks.Job(processes, command, before)
    for job, ended in zip(jobs, ranks.run_ranks(list(jobs.values()), directory / "err"), strict=True):
        assert [rank.code for rank in ended] == [0] * len(ended), (job, [rank.err for rank in ended])
    return runs


def assert_same(runs: Mapping[str, Path]) -> None:
    """Training over two processes gives the model that one process gives."""
    for way in set(SPREADS) - {"alone"}:
        found, wanted = ([r["loss"] for r in read_metrics(runs[w] / "metrics.jsonl")] for w in (way, "alone"))
        assert found == pytest.approx(wanted, rel=1e-5), way
        trained, same = load_model(runs[way]), load_model(runs["alone"])
        assert departure(trained) < 1e-6
        for (key, a), b in zip(trained.state_dict().items(), same.state_dict().values(), strict=True):
            assert (a - b).abs().max() < 1e-3 * max(1.0, float(b.abs().max())), (way, key)
            assert "score_bias" not in key or torch.equal(a, b), "counted over both"


def test_a_loss_that_balances_experts_is_of_the_whole_batch(data: Path, tmp_path: Path) -> None:
    """Of which each process knows a part."""
    fields = ["eval_windows=3", "d_model=16", "n_heads=2", "d_ff=24", "pattern=MAO", "mamba_d_head=8"]
    fields += ["mamba_d_state=4", "mamba_chunk=8", "balance=loss", "n_experts=6"]
    words = ["--arm", "ngpt", "--preset", "hybrid", "--recipe", "paper", "--data", str(data), "--set", *fields]
    assert_same(train_alone_and_spread({"hybrid": words}, tmp_path, STRONG)["hybrid"])
