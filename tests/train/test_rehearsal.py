"""The number format that "auto" comes to: the faster one, asked for once, and kept by a run that is resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from spherelm.models import GPTConfig, build
from spherelm.train import rehearsal
from spherelm.train.precision import resolve_dtype
from spherelm.train.rehearsal import Products, matrices
from spherelm.train.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
Speeds = Callable[[float], list[torch.dtype]]


@pytest.fixture
def bfloat16_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Speeds:
    """`bfloat16_takes(x)`: a machine that takes x times float32's time for it, and no memory of others;
    gives what is timed.
    """

    def make(times: float) -> list[torch.dtype]:
        asked: list[torch.dtype] = []

        def seconds(products: Products) -> float:
            asked.append(products.weight.dtype)
            return products.weight.numel() * (times if products.weight.dtype == torch.bfloat16 else 1.0)

        monkeypatch.setattr(Products, "seconds", seconds)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{times}"))
        return asked

    return make


SMALL = GPTConfig(vocab_size=23, n_layers=2, d_model=16, n_heads=2, d_ff=24, max_seq_len=8)


@pytest.mark.row("Number formats")
@pytest.mark.parametrize(
    ("times", "wanted"), [(0.3, torch.bfloat16), (0.95, torch.float32), (1.9, torch.float32), (100.0, torch.float32)]
)
def test_auto_is_the_faster_format(times: float, wanted: torch.dtype, bfloat16_takes: Speeds) -> None:
    bfloat16_takes(times)
    model = build(SMALL)
    assert resolve_dtype("auto", model, 8) is wanted
    assert resolve_dtype("float32", model, 8) is torch.float32
    assert resolve_dtype("bfloat16", model, 8) is torch.bfloat16
    assert resolve_dtype("auto", nn.Linear(2, 2, device="meta"), 8) is torch.float32


def test_it_is_measured_once_for_a_shape(bfloat16_takes: Speeds, tmp_path: Path) -> None:
    asked, model = bfloat16_takes(0.5), build(SMALL)
    for rows in (8, 8, 16):
        assert resolve_dtype("auto", model, rows) is torch.bfloat16
        assert bool(asked) == (rows == 16 or not (tmp_path / "seen").exists())
        (tmp_path / "seen").touch()
        asked.clear()
    file = tmp_path / "cache-0.5" / "spherelm" / "dtypes.json"
    assert list(json.loads(file.read_text())) != []
    file.write_text("damaged")
    assert resolve_dtype("auto", model, 8) is torch.bfloat16
    assert asked


def test_without_a_place_to_keep_it_is_measured_again(
    bfloat16_takes: Speeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = bfloat16_takes(0.5)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert resolve_dtype("auto", build(SMALL), 8) is torch.bfloat16
        assert asked
        asked.clear()


def test_a_format_that_is_emulated_is_not_tried_on_large_products(bfloat16_takes: Speeds) -> None:
    asked = bfloat16_takes(50.0)
    rehearsal.faster_dtype(Counter({(4, 4): 1, (8, 8): 1, (64, 64): 9}), 8, repeats=1)
    assert Counter(asked) == {torch.float32: 2, torch.bfloat16: 2}, "of the smallest matrix alone, once to prepare"


def test_products_are_those_of_a_linear_layer() -> None:
    layer, products = nn.Linear(3, 5, bias=False), Products((5, 3), 7, torch.float32)
    for tensor in (products.x, products.weight, products.grad):
        tensor.normal_()
    layer.load_state_dict({"weight": products.weight})
    products.x.requires_grad_()
    out = layer(products.x)
    out.backward(products.grad)
    with torch.no_grad():
        for ours, theirs in zip(products(), (out, products.x.grad, layer.weight.grad), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(Products((5, 3), 10**9, torch.float32).x) <= rehearsal.LARGEST_PRODUCT / 30


def test_embeddings_are_no_products() -> None:
    """Of this model: four of attention, two and one of the MLP a layer, and the head."""
    assert matrices(build(SMALL)) == {(16, 16): 8, (24, 16): 4, (16, 24): 2, (23, 16): 1}
    tied = build(GPTConfig(**{**vars(SMALL), "tie_embeddings": True}))
    assert (23, 16) in matrices(tied)


def test_a_resumed_run_keeps_its_format(
    trainer: MakeTrainer, bfloat16_takes: Speeds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bfloat16_takes(0.5)
    first = trainer("gpt", steps=2, dtype="auto")
    first.run()
    assert "bfloat16 (the faster one here) on 1 thread" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["dtype"] == "bfloat16"
    bfloat16_takes(2.0)
    again = trainer("gpt", steps=2, dtype="auto", resume=True)
    assert again.model.runtime.compute_dtype is torch.bfloat16
    again.run()
    assert "bfloat16 (as before)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"train\.dtype is 'bfloat16' there and 'float32' now"):
        trainer("gpt", steps=2, dtype="float32", resume=True)
