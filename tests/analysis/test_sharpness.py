"""How steep the loss is around the weights: second derivatives by automatic differentiation, and weights put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ARMS, make_case, make_hybrid_case, make_pair_case
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from spherelm import departure
from spherelm.analysis.sharpness import draw_direction, measure_sharpness
from spherelm.layers.linear import Linear, block_matrices, retract
from spherelm.models import Decoder


def directions(model: Decoder, count: int) -> list[dict[str, Tensor]]:
    """Those that are measured with seed 0, by the names of the matrices."""
    names = {id(module): name for name, module in model.named_modules()}
    draw, modules = torch.Generator().manual_seed(0), [module for _, module in block_matrices(model)]
    drawn = [draw_direction([module.weight.detach() for module in modules], draw) for _ in range(count)]
    return [{names[id(m)]: way for m, way in zip(modules, ways, strict=True)} for ways in drawn]


def curvature(model: Decoder, ways: dict[str, Tensor], tokens: Tensor) -> float:
    """The second derivative of the loss by the size of a perturbation, exact: a product with the Hessian in GPT,
    along the curve on the sphere in nGPT.
    """

    def moved(size: Tensor) -> Tensor:
        weights = {}
        for name, way in ways.items():
            module = model.get_submodule(name)
            weight = module.weight.detach() + size * way
            axis = getattr(module, "unit_axis", None)
            weights[f"{name}.weight"] = weight if axis is None else F.normalize(weight, dim=axis)
        logits = functional_call(model, weights, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    size = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
        (slope,) = torch.autograd.grad(moved(size), size, create_graph=True)
        return float(torch.autograd.grad(slope, size)[0])


@pytest.mark.row("Inside the models")
@pytest.mark.parametrize("arm", ARMS)
def test_the_rise_of_small_perturbations_is_the_second_derivative(arm: str) -> None:
    case = make_case(arm)
    retract(case.model)
    found = measure_sharpness(case.model, case.tokens, sizes=(1e-3, 2e-3), directions=3)
    assert found.rise.shape == (3, 2)
    for rise, ways in zip(found.rise, directions(case.model, 3), strict=True):
        half = curvature(case.model, ways, case.tokens) / 2
        np.testing.assert_allclose(rise, half * found.sizes**2, rtol=1e-3, atol=1e-11)
    assert len({tuple(rise) for rise in found.rise}) == 3, "directions of their own"
    again = measure_sharpness(case.model, case.tokens, sizes=(1e-3, 2e-3), directions=3)
    np.testing.assert_array_equal(again.rise, found.rise)
    other = measure_sharpness(case.model, case.tokens, sizes=(1e-3,), directions=1, seed=1)
    assert other.rise[0, 0] != found.rise[0, 0]


@pytest.mark.parametrize("arm", ARMS)
def test_every_matrix_moves_by_its_part_and_comes_back_to_the_bit(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(arm)
    retract(case.model)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    real, seen = case.model.loss, []

    def loss(*words: Tensor) -> Tensor:
        state = case.model.state_dict()
        seen.append({name: float((state[name] - old).norm() / old.norm()) for name, old in before.items()})
        assert arm == "gpt" or departure(case.model) < 1e-12
        if len(seen) == 4:
            raise RuntimeError("stop")
        return real(*words)

    monkeypatch.setattr(case.model, "loss", loss)
    with pytest.raises(RuntimeError, match="stop"):
        measure_sharpness(case.model, case.tokens, sizes=(0.01,))
    assert all(torch.equal(case.model.state_dict()[name], old) for name, old in before.items())
    matrices = {n for n, m in case.model.named_modules() if isinstance(m, Linear) and n.startswith("blocks")}
    for part in seen[1:]:
        for name, moved in part.items():
            wanted = 0.01 if name.removesuffix(".weight") in matrices else 0
            assert moved == pytest.approx(wanted, rel=1e-9 if arm == "gpt" else 0.2), name
    assert set(seen[0].values()) == {0.0}


@pytest.mark.parametrize("arm", ARMS)
def test_hybrids_and_encoder_decoders_are_measured(arm: str) -> None:
    for case in (make_hybrid_case(arm, "MAO"), make_pair_case(arm)):
        before = [parameter.clone() for parameter in case.model.parameters()]
        found = measure_sharpness(case.model, case.tokens, directions=1)
        assert np.isfinite(found.rise).all()
        assert (found.rise != 0).all()
        assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))
