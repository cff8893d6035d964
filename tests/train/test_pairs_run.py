"""Encoder-decoders through the trainer that language models go through: learning, resuming, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_pairs
import torch
from cases import ARMS

from spherelm.layers.linear import departure
from spherelm.models import EncoderDecoder
from spherelm.runs.config import read_config
from spherelm.runs.loading import load_model
from spherelm.train.trainer import Trainer, train

both_arms = pytest.mark.parametrize("arm", ARMS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_pairs.make_pairs(tmp_path)


@both_arms
def test_a_run_learns_and_its_record_can_be_read(arm: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_pairs.run_config(arm, data, steps=40, diagnose_every=20, label_smoothing=0.0)
    loss = train(config, out, show_progress=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in records if r["kind"] == "val")
    assert loss < 0.75 * first["loss"]
    tokens = [r["tokens"] for r in records if r["kind"] == "val"]
    counts = json.loads((data / "pairs.json").read_text())["splits"]["train"]
    assert tokens[-1] == 40 * round(4 * (counts["target_tokens"] / counts["pairs"] + 1))
    model = load_model(out)
    assert isinstance(model, EncoderDecoder)
    assert model.encoder.embed is model.embed, "the default recipe shares source and target embeddings"
    assert departure(model) < 1e-6
    assert read_config(out / "config.json") == config


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(data: Path, tmp_path: Path) -> None:
    """Of the baseline; of nGPT, `test_support.py` runs it."""
    tiny.assert_resumes(tiny_pairs.run_config("gpt", data, steps=20, save_every=9), tmp_path)


@pytest.mark.row("Translation")
@both_arms
def test_labels_are_smoothed_in_training_and_not_in_validation(arm: str, data: Path, tmp_path: Path) -> None:
    plain, smooth = (
        Trainer(tiny_pairs.run_config(arm, data, label_smoothing=s), tmp_path / str(s)) for s in (0.0, 0.5)
    )
    assert plain._validation_losses() == smooth._validation_losses()
    assert plain._gradients(0).sum() != smooth._gradients(0).sum()
    for run in (plain, smooth):
        run.metrics.close()
    assert tiny_pairs.run_config(arm, data).train.label_smoothing == 0.1, "the preset's"


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(data: Path, tmp_path: Path, micro_batch_size: int) -> None:
    """Though their pairs have different numbers of target tokens."""
    sizes = {"whole": None, "parts": micro_batch_size}
    runs = [Trainer(tiny_pairs.run_config("ngpt", data, micro_batch_size=m), tmp_path / n) for n, m in sizes.items()]
    one, other = (run._gradients(0).sum().item() for run in runs)
    assert one == pytest.approx(other, rel=1e-6)
    for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    for run in runs:
        run.metrics.close()


def test_arms_and_data_must_belong_together(data: Path, tmp_path: Path) -> None:
    text = tiny.make_data(tmp_path)
    with pytest.raises(
        ValueError, match=r"an encoder-decoder learns from pairs and .* holds none: make them with spherelm data pairs"
    ):
        Trainer(replace(tiny_pairs.run_config("gpt", data), data=str(text)), tmp_path / "a")
    with pytest.raises(
        ValueError, match="holds pairs of texts, which are for encoder-decoders: train with --preset pairs"
    ):
        Trainer(tiny.run_config("gpt", data), tmp_path / "b")
    with pytest.raises(ValueError, match="has texts of up to 15 tokens, the run is for seq_len=12: give --seq-len 15"):
        Trainer(tiny_pairs.run_config("gpt", data, seq_len=12), tmp_path / "c")
    with pytest.raises(ValueError, match="pairs are always separate"):
        Trainer(tiny_pairs.run_config("gpt", data, mask_documents=True), tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abcd")
