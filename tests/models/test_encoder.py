"""Both encoders against the oracle, which reads row by row; what they refuse; and that they learn to fill in."""

from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from configs import make_config
from oracle_names import oracle_names, oracle_parameters
from torch import Tensor

from spherelm.generation.generate import generate
from spherelm.layers.linear import departure, unit_modules
from spherelm.models import ARMS, Config, MaskedModel, build
from spherelm.optim import OptimConfig, build_optimizer

TINY: dict[str, Any] = {"vocab_size": 37, "n_layers": 2, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 16}
FIELDS: dict[str, dict[str, Any]] = {"plain": {}, "grouped queries": {"n_heads": 6, "n_kv_heads": 2}}


def config_of(arm: str, **fields: Any) -> Config:
    return make_config(arm, "encoder", **TINY | fields)


def model_of(arm: str, **fields: Any) -> MaskedModel:
    """All gains and scales differ, so that nothing cancels."""
    model = build(config_of(arm, **fields)).double()
    assert isinstance(model, MaskedModel)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in oracle_parameters(model):
            if paper.unit_axis(name) is None:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            elif arm == "gpt":
                parameter.mul_(5)
    return model


def oracle(p: paper.Params, shape: paper.Shape, tokens: Tensor) -> Tensor:
    """The encoder of an encoder-decoder, with a read-out."""
    inside = {f"encoder.{name}" if name.startswith(("blocks.", "norm.")) else name: w for name, w in p.items()}
    if "s_z.value" not in p:
        return torch.stack([paper.gpt_encoder(inside, shape, row) @ p["head.weight"].T for row in tokens])
    s_z = paper.effective(p["s_z.value"], shape.s_z, shape.d_model)
    return torch.stack([s_z * (paper.encoder(inside, shape, row) @ p["head.weight"].T) for row in tokens])


def shape_of(model: MaskedModel) -> paper.Shape:
    config: Any = model.config
    n_kv_heads = config.n_kv_heads or config.n_heads
    return paper.Shape(config.n_layers, config.d_model, config.n_heads, n_kv_heads, n_encoder_layers=config.n_layers)


@pytest.mark.row("Models")
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("arm", ARMS)
def test_logits_loss_and_every_gradient(arm: str, fields: str) -> None:
    model = model_of(arm, **FIELDS[fields])
    weights = {name: p.detach().clone() for name, p in oracle_parameters(model)}
    tokens = torch.randint(38, (3, 9))  # the hidden token, 37, among them
    targets = torch.randint(37, (3, 9)).where(torch.rand(3, 9) < 0.4, -100)
    shape = shape_of(model)
    wanted = oracle(weights, shape, tokens)
    assert (model(tokens) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    loss, gradients = paper.loss_and_gradients(oracle, weights, shape, tokens, targets)
    ours = model.loss(tokens, targets)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-13)
    for name, parameter in oracle_parameters(model):
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() <= 2e-12 * gradients[name].abs().max(), name


@pytest.mark.parametrize("arm", ARMS)
def test_every_position_is_seen_from_every_other(arm: str) -> None:
    model = model_of(arm)
    tokens = torch.randint(37, (1, 8))
    other = tokens.clone()
    other[0, -1] = model.mask_token
    assert ((model(tokens) - model(other)).abs().amax(-1) > 1e-9).all()


def test_unit_axes_are_ngpts_and_hidden_tokens_are_a_point_on_the_sphere() -> None:
    model = model_of("ngpt")
    names = oracle_names(model.state_dict())
    declared = {names[f"{name}.weight"]: axis for name, _, axis in unit_modules(model)}
    assert declared == {n: axis for n, _ in oracle_parameters(model) if (axis := paper.unit_axis(n)) is not None}
    assert model.embed.weight.shape == (38, 24)
    assert departure(model) < 1e-6  # drawn in float32


@pytest.mark.parametrize("arm", ARMS)
def test_it_learns_to_fill_in_what_only_the_text_behind_tells(arm: str) -> None:
    """The hidden token comes first and is the one at the end: nothing that reads from left to right could know it."""
    model = build(config_of(arm, n_layers=1))
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
        generate(build(config_of(arm)), torch.tensor([[1, 2]]), max_new_tokens=2)


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
        config_of(arm, **fields)
