"""Compiled training is eager training, up to rounding. Skipped where torch finds no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from spherelm.data.loader import Loader
from spherelm.data.shards import open_tokens
from spherelm.models import build
from spherelm.models.decoder import Decoder
from spherelm.runs.group import Group
from spherelm.train.parallel import distributed
from spherelm.train.precision import compile_blocks
from spherelm.train.update import gradients_of_batch


@pytest.mark.row("Compilation")
@tiny.compiles
def test_compiled_gradients_are_eager_gradients(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nGPT, whose blocks have everything that GPT's have and more."""
    from torch._inductor import config as inductor

    torch.manual_seed(0)
    model = build(tiny.run_config("ngpt", data).model)
    loader = Loader(open_tokens(data, "train"), seq_len=16, batch_size=4, seed=0)
    eager_loss, eager = gradients(model, loader)
    with inductor.patch(compile_threads=1):  # no pool of processes beside the tests
        compile_blocks(model, lambda: gradients_of_batch(distributed(model, Group()), loader, 0))
        loss, compiled = gradients(model, loader)
    torch.compiler.reset()
    assert capsys.readouterr().err == "", "it did compile"
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert loss == pytest.approx(eager_loss, rel=1e-6)
    for name, gradient in eager.items():
        assert (compiled[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-8, name


def gradients(model: Decoder, loader: Loader) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of batch number 1."""
    model.zero_grad()
    loss = gradients_of_batch(distributed(model, Group()), loader, 1)
    return loss.sum().item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
