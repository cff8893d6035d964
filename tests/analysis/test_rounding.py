"""What four bits leave of dot products: known ratios and correlations, and those of a model by the definition."""

from __future__ import annotations

import math

import numpy as np
import paper
import pytest
import torch
from cases import ARMS, make_case

from spherelm.analysis.rounding import measure_product, measure_rounding


def test_the_numbers_are_those_of_all_pairs_one_by_one() -> None:
    x, weight = torch.randn(9, 20), torch.randn(7, 20) + 0.5
    rough = [paper.nvfp4(torch.nn.functional.pad(t, (0, 12)))[:, :20] for t in (x, weight)]
    exact = (x.double()[:, None] * weight.double()[None]).flatten(0, 1)
    errors = (rough[0][:, None] * rough[1][None]).flatten(0, 1) - exact
    decibels, correlation, of_noise = measure_product(x, weight)
    assert decibels == pytest.approx(
        10 * math.log10(exact.sum(1).square().mean() / errors.sum(1).square().mean()), rel=1e-4
    )
    for found, products in ((correlation, exact), (of_noise, errors)):
        second = products.T @ products / len(products)
        pairs = second.sum() - second.trace()
        assert found == pytest.approx(float(pairs / second.trace() / 19), rel=1e-3)


def test_equal_products_are_fully_correlated() -> None:
    assert measure_product(torch.full((3, 32), 0.7), torch.full((4, 32), 0.1))[1] == pytest.approx(1)


@pytest.mark.parametrize("arm", ARMS)
def test_every_matrix_of_a_model_is_measured(arm: str) -> None:
    case = make_case(arm)
    case.model.float()
    found = measure_rounding(case.model, case.tokens)
    assert set(found.decibels) == {"Q", "K", "V", "W_o", "W_u", "W_v", "W_oMLP"}
    for by_matrix in vars(found).values():
        assert all(values.shape == (2,) and np.isfinite(values).all() for values in by_matrix.values())
    assert all((values > 10).all() and (values < 30).all() for values in found.decibels.values())
