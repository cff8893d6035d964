"""Encoders through the trainer that language models go through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spherelm.layers.linear import departure
from spherelm.models import MaskedModel
from spherelm.runs.config import RunConfig
from spherelm.runs.loading import load_model
from spherelm.train.batches import open_data
from spherelm.train.trainer import Trainer, train

both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


def run_config(arm: str, data: Path, **overrides: Any) -> RunConfig:
    """A run of six steps of an encoder."""
    return tiny.run_config(arm, data, architecture="encoder", **overrides)


@both_arms
def test_a_run_learns_and_goes_on_bitwise(arm: str, data: Path, tmp_path: Path) -> None:
    config = run_config(arm, data, steps=40, save_every=30, eval_every=20, hidden_part=0.25)
    loss = train(config, tmp_path / "whole", show_progress=False)
    first = next(r for r in tiny.metrics(tmp_path / "whole") if r["kind"] == "val")
    assert loss < 0.85 * first["loss"]
    train(config, tmp_path / "broken", show_progress=False)
    last = max((tmp_path / "broken" / "checkpoints").iterdir())
    (last / "state.json").unlink()
    train(config, tmp_path / "broken", resume=True, show_progress=False)
    tiny.assert_bitwise(*(tmp_path / name / "checkpoints" / "step-00000040" for name in ("whole", "broken")))
    assert tiny.metrics(tmp_path / "whole") == tiny.metrics(tmp_path / "broken")
    model = load_model(tmp_path / "whole")
    assert isinstance(model, MaskedModel)
    if arm == "ngpt":
        assert departure(model) < 1e-6


@both_arms
def test_micro_batches_give_the_gradient_of_the_whole_batch(arm: str, data: Path, tmp_path: Path) -> None:
    norms = []
    for size in (1, 4):
        run = Trainer(run_config(arm, data, micro_batch_size=size), tmp_path / str(size))
        norms.append(run._gradients(0).sum().item())
        run.metrics.close()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_validation_hides_the_same_at_every_seed(data: Path) -> None:
    one, other = (open_data(run_config("gpt", data, seed=seed)) for seed in (0, 1))
    for part, same in zip(one.held_out, other.held_out, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part.batch, same.batch, strict=True))
    assert not torch.equal(one.loader.batch(0)[0], other.loader.batch(0)[0])
