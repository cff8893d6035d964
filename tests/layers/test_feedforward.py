from __future__ import annotations

from typing import Any

import paper
import torch

from spherelm.layers.feedforward import FeedForward, UnitFeedForward
from spherelm.layers.linear import Scale, retract

SHAPE = paper.Shape(1, 12, 2, 2)


def test_feed_forward_and_its_gradients_are_the_papers(agree: Any) -> None:
    module = FeedForward(12, 20).double()
    h = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    p = dict(module.named_parameters())
    agree(module(h), paper.gpt_mlp(p, "", SHAPE, h), [h, *p.values()])


def test_unit_feed_forward_and_its_gradients_are_the_papers(agree: Any) -> None:
    module = UnitFeedForward(12, 20, Scale(20, 1.0, 1.0), Scale(20, 1.0, 1.0)).double()
    retract(module)
    with torch.no_grad():
        module.s_u.value.mul_(1 + 0.5 * torch.randn_like(module.s_u.value))
        module.s_v.value.mul_(1 + 0.5 * torch.randn_like(module.s_v.value))
    h = paper.norm(torch.randn(2, 5, 12, dtype=torch.float64)).requires_grad_()
    p = dict(module.named_parameters())
    agree(module(h), paper.mlp(p, "", SHAPE, h), [h, *p.values()])
