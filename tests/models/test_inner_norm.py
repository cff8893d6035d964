"""FNGPT (arXiv 2605.06067): what every matrix that writes to the hidden state reads is a unit vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, make_case, make_hybrid_case, make_pair_case
from torch import Tensor

from spherelm.layers.feedforward import MLPS
from spherelm.models import build

MODELS: dict[str, Any] = {
    "decoder": lambda **fields: make_case("ngpt", **fields),
    "encoder": lambda **fields: make_case("ngpt", "encoder", **fields),
    "encoder-decoder": lambda **fields: make_pair_case("ngpt", **fields),
    "hybrid": lambda **fields: make_hybrid_case("ngpt", "MA-O", n_shared_experts=1, **fields),
}
every_activation = pytest.mark.parametrize("activation", MLPS)


def lengths_read(c: Case) -> dict[str, Tensor]:
    """The lengths of the vectors that each matrix that writes is given, by its name."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, inputs: found.update({name: inputs[0].detach().norm(dim=-1)})

    for name, module in c.model.named_modules():
        if getattr(module, "writes", False):
            module.register_forward_pre_hook(note(name))
    c.model(*c.inputs)
    return found


@every_activation
@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_that_writes_reads_unit_vectors(kind: str, activation: str) -> None:
    unit, plain = (
        lengths_read(MODELS[kind](activation=activation, **{"variant.inner_norm": inner})) for inner in (True, False)
    )
    assert len(unit) > 3
    for name, lengths in unit.items():
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-12, atol=1e-12)
        assert (plain[name] - 1).abs().max() > 0.01, name


def other_logits(c: Case) -> Tensor:
    """Those of the same weights without the inner norms."""
    fields = {**vars(c.model.config), "variant": type(c.model.config.variant)()}
    plain = build(type(c.model.config)(**fields)).double()
    plain.load_state_dict(c.model.state_dict())
    logits: Tensor = plain(*c.inputs)
    return logits


@every_activation
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_another_function_with_experts_only(kind: str, activation: str) -> None:
    """The step normalizes what a part makes, so that its length does not count; of several experts it weighs them."""
    c = MODELS[kind](activation=activation, **{"variant.inner_norm": True})
    apart = (other_logits(c) - c.model(*c.inputs)).abs().max() / c.model(*c.inputs).abs().max()
    assert apart > 1e-3 if kind == "hybrid" else apart < 1e-12


@every_activation
def test_cached_decoding_is_the_full_pass(activation: str) -> None:
    c = MODELS["hybrid"](activation=activation, **{"variant.inner_norm": True})
    whole, cache = c.model(c.tokens), c.model.new_cache()
    pieces = [c.model(piece, cache) for piece in c.tokens.split((4, 1, 1, 3), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)
