"""Both models against the oracle: logits, loss, gradients, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden
import paper
import pytest
import torch
from cases import assert_computes, assert_near
from oracle_names import oracle_parameters

from spherelm.layers.linear import retract

FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"n_layers": 1},
    "grouped queries": {"n_heads": 6, "n_kv_heads": 2},
    "one key head": {"n_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "default width": {"d_ff": None},
    "rope base": {"rope_base": 100.0},
    "squared ReLU": {"activation": "relu2", "d_ff": None},
}
SCALES: dict[str, dict[str, Any]] = {
    "alpha": {"alpha.init": 0.5, "alpha.scale": 0.3},
    "s_qk": {"s_qk.init": 0.33, "s_qk.scale": 1.0},
    "s_u and s_v": {"s_u.init": 0.2, "s_u.scale": 0.5, "s_v.init": 0.3, "s_v.scale": 2.0},
    "s_z": {"s_z.init": 24**0.5, "s_z.scale": 0.03},
}
NORMED: dict[str, dict[str, Any]] = {
    "norm of q and k": {"qk_norm": True},
    "norm of q and k, grouped": {"qk_norm": True, "n_kv_heads": 1},
}
OWN = [("ngpt", name) for name in SCALES] + [("gpt", name) for name in NORMED]
CASES = [(arm, name) for arm in golden.ARMS for name in FIELDS] + OWN


@pytest.mark.row("Models")
@pytest.mark.parametrize(("arm", "name"), CASES)
def test_logits_loss_and_every_gradient(arm: str, name: str, case: Any) -> None:
    assert_computes(case(arm, **{**FIELDS, **SCALES, **NORMED}[name]))


@pytest.mark.row("Embeddings")
def test_a_tied_model_has_one_embedding(case: Any) -> None:
    for arm in golden.ARMS:
        model = case(arm, tie_embeddings=True).model
        assert model.head.linear.weight is model.embed.weight
        assert "head.linear.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("arm", golden.ARMS)
def test_the_loss_of_training_is_the_cross_entropy_of_the_logits(arm: str, case: Any) -> None:
    c = case(arm)
    wanted = paper.cross_entropy(c.model(c.tokens), c.targets).item()
    assert c.model.loss(c.tokens, c.targets).item() == pytest.approx(wanted, rel=1e-13)
    with torch.no_grad():
        assert c.model.loss(c.tokens, c.targets).item() == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("arm", golden.ARMS)
def test_the_golden_files_through_our_model(arm: str, shared: Path) -> None:
    files = golden.load(shared, arm)
    model = files.model
    retract(model)
    loss = model.loss(files.tokens, files.targets)
    loss.backward()
    assert loss.item() == pytest.approx(files.loss, rel=1e-13)
    assert_near(model(files.tokens), files.logits.double(), 1e-6)
    for name, parameter in oracle_parameters(model):
        assert parameter.grad is not None
        assert_near(parameter.grad, files.gradients[name].double(), 1e-7, name)
