"""Both encoders against the oracle, which reads row by row; what they refuse; and that they learn to fill in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ARMS, assert_computes, assert_retracts, config_of, make_case

from spherelm.generation.generate import generate
from spherelm.models import MaskedModel, build
from spherelm.optim import OptimConfig, build_optimizer


@pytest.mark.row("Models")
@pytest.mark.parametrize("fields", [{}, {"n_heads": 6, "n_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("arm", ARMS)
def test_logits_loss_and_every_gradient(arm: str, fields: dict[str, Any]) -> None:
    assert_computes(make_case(arm, "encoder", **fields), 2e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_every_position_is_seen_from_every_other(arm: str) -> None:
    model = make_case(arm, "encoder").model
    tokens = torch.randint(37, (1, 8))
    other = tokens.clone()
    other[0, -1] = model.mask_token
    assert ((model(tokens) - model(other)).abs().amax(-1) > 1e-9).all()


def test_hidden_tokens_are_a_point_on_the_sphere() -> None:
    assert "embed.weight" in assert_retracts(c := make_case("ngpt", "encoder"))
    assert c.model.embed.weight.shape == (38, 24)


@pytest.mark.parametrize("arm", ARMS)
def test_it_learns_to_fill_in_what_only_the_text_behind_tells(arm: str) -> None:
    """The hidden token comes first and is the one at the end: nothing that reads from left to right could know it."""
    model = build(config_of(arm, "encoder", n_layers=1))
    assert isinstance(model, MaskedModel)
    optimizer, draw = build_optimizer(model, OptimConfig(lr=3e-2)), torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = torch.randint(8, (32, 3), generator=draw)
        targets = torch.full_like(tokens, -100)
        targets[:, 0] = tokens[:, -1]
        tokens[:, 0] = model.mask_token
        optimizer.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < torch.tensor(8.0).log()


@pytest.mark.parametrize("arm", ARMS)
def test_it_writes_nothing(arm: str) -> None:
    with pytest.raises(ValueError, match="an encoder fills in hidden tokens and writes no text"):
        generate(build(config_of(arm, "encoder")), torch.tensor([[1, 2]]), max_new_tokens=2)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_part": 0.0}, "hidden_part must be more than 0, got 0.0"),
        ({"tie_embeddings": True}, "cannot be tied"),
    ],
)
def test_what_no_encoder_can_be_made_of_is_refused(arm: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_of(arm, "encoder", **fields)
