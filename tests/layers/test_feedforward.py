from __future__ import annotations

from dataclasses import replace
from typing import Any

import paper
import pytest
import torch

from spherelm.layers.feedforward import MLPS, UNIT_MLPS
from spherelm.layers.linear import Scale, retract

SHAPE = paper.Shape(1, 12, 2, 2)
every_activation = pytest.mark.parametrize("activation", MLPS)


@every_activation
def test_feed_forward_and_its_gradients_are_the_papers(activation: str, agree: Any) -> None:
    module = MLPS[activation](12, 20).double()
    h = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    p = dict(module.named_parameters())
    agree(module(h), paper.gpt_mlp(p, "", SHAPE, h), [h, *p.values()])


@pytest.mark.row("MLPs and experts")
@pytest.mark.parametrize("inner_norm", [False, True])
@every_activation
def test_unit_feed_forward_and_its_gradients_are_the_papers(activation: str, inner_norm: bool, agree: Any) -> None:
    scales = [Scale(20, 1.0, 1.0) for _ in MLPS[activation].reading]
    module = UNIT_MLPS[activation](12, 20, *scales, inner_norm=inner_norm).double()
    retract(module)
    with torch.no_grad():
        for scale in scales:
            scale.value.mul_(1 + 0.5 * torch.randn_like(scale.value))
    h = paper.norm(torch.randn(2, 5, 12, dtype=torch.float64)).requires_grad_()
    p = dict(module.named_parameters())
    agree(module(h), paper.mlp(p, "", replace(SHAPE, inner_norm=inner_norm), h), [h, *p.values()])
