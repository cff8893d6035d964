from __future__ import annotations

import paper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spherelm.layers.linear import (
    Linear,
    Scale,
    UnitEmbedding,
    UnitLinear,
    departure,
    retract,
    unit_modules,
)


class Shared(nn.Module):
    """An embedding that shares its weight with the read-out, as tied models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = UnitEmbedding(6, 4)
        self.head = UnitLinear(4, 6)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("axis", [0, 1])
def test_retract_normalizes_along_the_declared_axis(axis: int) -> None:
    module = UnitLinear(5, 7, writes=axis == 0).double()
    wanted = paper.norm(module.weight.detach().clone(), axis)
    retract(module)
    torch.testing.assert_close(module.weight.detach(), wanted, rtol=1e-15, atol=1e-16)
    assert departure(module) < 1e-15


def test_retract_is_in_place_and_leaves_everything_else() -> None:
    model = nn.Sequential(UnitLinear(4, 4, writes=True), Linear(4, 4), Scale(4, 1.0, 0.5), UnitEmbedding(4, 4))
    addresses = [p.data_ptr() for p in model.parameters()]
    untouched = [p.clone() for p in (*model[1].parameters(), *model[2].parameters())]
    retract(model)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.requires_grad for p in model.parameters())
    for before, after in zip(untouched, (*model[1].parameters(), *model[2].parameters()), strict=True):
        assert torch.equal(before, after)


@given(st.integers(0, 2**20), st.sampled_from([0, 1]), st.integers(1, 64))
def test_retracting_again_changes_nothing(seed: int, axis: int, n: int) -> None:
    torch.manual_seed(seed)
    module = UnitLinear(n, 9, writes=axis == 0)
    retract(module)
    once = module.weight.detach().clone()
    assert departure(module) <= 3e-7
    retract(module)
    assert torch.equal(module.weight, once)


def test_retract_leaves_unit_vectors_alone_and_no_others() -> None:
    module = UnitLinear(3, 3)
    eps = torch.finfo(torch.float32).eps
    with torch.no_grad():
        module.weight.copy_(torch.diag(torch.tensor([1 + eps, 1.0, 1 + 16 * eps])))
    retract(module)
    assert torch.equal(module.weight.detach().diag(), torch.tensor([1 + eps, 1.0, 1.0]))


def test_retract_of_bfloat16_weights_reduces_in_float32() -> None:
    module = UnitLinear(4096, 2).bfloat16()
    with torch.no_grad():
        module.weight.fill_(3.0)
    retract(module)
    assert torch.equal(module.weight, torch.full_like(module.weight, 1 / 64))


def test_departure_is_that_of_the_worst_vector() -> None:
    model = nn.Sequential(UnitLinear(4, 4, writes=True), UnitLinear(4, 3))
    retract(model)
    with torch.no_grad():
        model[1].weight[2] *= 1.25
    assert departure(model) == pytest.approx(0.25, abs=1e-6)
    with torch.no_grad():
        model[0].weight[:, 1] *= 0.5
    assert departure(model) == pytest.approx(0.5, abs=1e-6)
    assert departure(nn.Linear(3, 3)) == 0.0


def test_a_shared_weight_is_visited_once() -> None:
    assert [name for name, _, _ in unit_modules(Shared())] == ["embed"]


def test_a_linear_is_a_product_without_bias_in_the_dtype_of_its_input() -> None:
    layer = Linear(5, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(2, 5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_a_scale_folded_into_the_rows_is_a_scale_of_the_outputs() -> None:
    layer = Linear(5, 3).double()
    x, scale = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(layer(x, scale), scale * layer(x), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(layer.scaled_weight(scale), scale[:, None] * layer.weight)
    assert layer.scaled_weight() is layer.weight


@pytest.mark.parametrize(("init", "scale"), [(1.0, 1.0), (0.05, 0.125), (8.0, 0.03)])
def test_a_scale_starts_at_init_is_stored_at_scale_and_moves_by_their_ratio(init: float, scale: float) -> None:
    module = Scale((2, 3), init, scale).double()
    assert module.value.shape == (2, 3)
    assert module.value.unique().tolist() == pytest.approx([scale])
    assert module().unique().tolist() == pytest.approx([init])
    with torch.no_grad():
        module.value.add_(0.01)
    torch.testing.assert_close(module(), paper.effective(module.value, (init, scale), 1))
    assert (module() - init).unique().tolist() == pytest.approx([0.01 * init / scale])
    module.start()
    assert module().unique().tolist() == pytest.approx([init])


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_cannot_be_divided_by_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"got scale={scale}"):
        Scale(3, 1.0, scale)
