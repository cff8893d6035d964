"""The oracle against the golden files: an independent computation of the same equations in float64."""

from __future__ import annotations

import math
from pathlib import Path

import golden
import paper
import pytest
import torch


@pytest.fixture(params=golden.ARMS)
def files(request: pytest.FixtureRequest, shared: Path) -> golden.Golden:
    return golden.load(shared, request.param)


def start(files: golden.Golden) -> paper.Params:
    """The weights that the stored results belong to: on the sphere, which the stored bfloat16 matrices are nearly."""
    return paper.retract(files.weights) if files.arm == "ngpt" else files.weights


def forward(files: golden.Golden) -> paper.Forward:
    return paper.gpt if files.arm == "gpt" else paper.ngpt


def test_loss_logits_and_every_gradient(files: golden.Golden) -> None:
    weights = start(files)
    logits = forward(files)(weights, files.shape, files.tokens)
    loss, gradients = paper.loss_and_gradients(forward(files), weights, files.shape, files.tokens, files.targets)
    assert float(loss) == pytest.approx(files.loss, rel=1e-14)
    # the stored logits and gradients are float32
    torch.testing.assert_close(logits, files.logits.double(), rtol=1e-6, atol=1e-6)
    assert gradients.keys() == files.gradients.keys()
    for name, gradient in gradients.items():
        stored = files.gradients[name].double()
        assert (gradient - stored).abs().max() <= 1e-7 * stored.abs().max(), name


def test_losses_of_twenty_steps(files: golden.Golden) -> None:
    recipe = paper.paper_recipe(files.arm, lr=1e-3)
    losses, _ = paper.train(forward(files), start(files), files.shape, files.batches(), recipe)
    assert losses == pytest.approx(files.losses, rel=1e-13)


def test_the_golden_losses_notice_a_mistake_in_the_oracle(mutated_arm: str, shared: Path) -> None:
    files = golden.load(shared, mutated_arm)
    recipe = paper.paper_recipe(files.arm, lr=1e-3)
    batches = [batch for _, batch in zip(range(4), files.batches(), strict=False)]
    losses, _ = paper.train(forward(files), start(files), files.shape, batches, recipe)
    stored = files.losses[: len(losses)]
    assert max(abs(a - b) / b for a, b in zip(losses, stored, strict=True)) > 1e-6


def test_the_stored_gradients_cover_the_checkpoint(files: golden.Golden) -> None:
    assert files.gradients.keys() == files.weights.keys()
    assert all(files.gradients[n].shape == w.shape for n, w in files.weights.items())


def test_area_under_the_logarithmic_decay() -> None:
    steps = 100_000
    for rho in (0.01, 0.1, 1.0):
        area = sum(paper.log_decay((i + 0.5) / steps, rho) for i in range(steps)) / steps
        assert area == pytest.approx(paper.log_decay_area(rho), rel=1e-6)


def test_rope_is_a_rotation_by_relative_position() -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 5, 8).split(1)
    scores = (paper.rope(q, 10000.0) @ paper.rope(k, 10000.0).transpose(-1, -2))[0]
    for offset in range(-4, 5):
        diagonal = torch.diagonal(scores, offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_capped_move_lands_at_the_cap() -> None:
    w = paper.norm(torch.randn(4, 6, dtype=torch.float64))
    capped = paper.capped_move(w, w + torch.randn(4, 6, dtype=torch.float64), 0.01)
    assert torch.acos((w * capped).sum(-1)).tolist() == pytest.approx([0.01] * 4, rel=1e-9)
    assert math.isclose(float(capped.norm(dim=-1).max()), 1, rel_tol=1e-12)
