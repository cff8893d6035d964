"""What is not a plain decoder, over two processes: cut up by FSDP2 and recomputed, or in copies, as over one."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny_pairs
import torch

from spherelm import departure, load_model
from spherelm.runs.metrics import read_metrics

SPREADS = {
    "alone": (1, ()),
    "shard": (2, ("--strategy", "shard", "--recompute", "--micro-batch-size", "2")),
    "replicate": (2, ("--strategy", "replicate")),
}
SHAPE = ["eval_windows=3", "d_model=16", "n_heads=2", "d_ff=24"]
HYBRID = ["pattern=MAO", "mamba_d_head=8", "mamba_d_state=4", "mamba_chunk=8"]
MODELS = {
    "hybrid": ("ngpt", "hybrid", [*HYBRID, "n_experts=4"]),
    "balanced by a loss": ("ngpt", "hybrid", [*HYBRID, "balance=loss", "n_experts=6"]),
    "encoder-decoder": ("ngpt", "pairs", ["n_layers=2", "n_encoder_layers=2"]),
}
STRONG = """
from spherelm.layers.moe import Router
Router.__init__.__defaults__ = (*Router.__init__.__defaults__[:-1], 100.0)
"""
"""The coefficient of the loss that balances experts: at its default it is too weak to be seen after a few updates."""


def test_two_processes_train_the_model_that_one_does(data: Path, tmp_path: Path) -> None:
    """Mixers have parts that are single numbers, and experts matrices with three axes; an encoder-decoder has two towers.

    A loss that balances experts is one of the whole batch, of which each process knows a part.
    """
    given = {"hybrid": data, "pairs": tiny_pairs.make_pairs(tmp_path)}
    jobs = {}
    for model, (arm, preset, fields) in MODELS.items():
        text = ["train", "--arm", arm, "--preset", preset, "--data", str(given[preset]), "--steps", "4"]
        text += ["--seq-len", "16", "--batch-size", "8", "--no-compile", "--lr", "0.002", "--dtype", "float32"]
        for name, (processes, flags) in SPREADS.items():
            out = ["--out", str(tmp_path / f"{model}-{name}"), "--eval-every", "4", *flags, "--set", *SHAPE, *fields]
            jobs[model, name] = ranks.Job(processes, [*text, *out], STRONG)
    for (model, name), of_job in zip(jobs, ranks.run_ranks(list(jobs.values()), tmp_path / "err"), strict=True):
        assert [rank.code for rank in of_job] == [0] * len(of_job), (model, name, [rank.err for rank in of_job])
        run, alone = tmp_path / f"{model}-{name}", tmp_path / f"{model}-alone"
        found, wanted = ([r["loss"] for r in read_metrics(path / "metrics.jsonl")] for path in (run, alone))
        assert found == pytest.approx(wanted, rel=1e-5), (model, name)
        trained, same = load_model(run), load_model(alone)
        assert departure(trained) < 1e-6
        for (key, a), b in zip(trained.state_dict().items(), same.state_dict().values(), strict=True):
            assert (a - b).abs().max() < 1e-3 * max(1.0, float(b.abs().max())), (model, name, key)
            assert "score_bias" not in key or torch.equal(a, b), "counted over both"
