"""How vectors lie: against numpy's own words for it, and on arrangements whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spherelm.analysis import geometry, weights
from spherelm.layers.linear import departure
from spherelm.models import GPTConfig, NGPTConfig, build

SHAPE = {"vocab_size": 37, "n_layers": 2, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 16}


def rows(n: int = 60, d: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, d)) * np.linspace(1, 3, d) + 0.5


def test_eigenvalues_are_those_of_the_covariance_over_their_median() -> None:
    found = geometry.eigenvalues_over_median(rows())
    expected = np.linalg.eigvalsh(np.cov(rows(), rowvar=False, bias=True))
    np.testing.assert_allclose(found, expected / np.median(expected), rtol=1e-10)


def test_eigenvalues_of_few_rows_stay_as_they_are() -> None:
    found = geometry.eigenvalues_over_median(rows(3))
    assert np.isfinite(found).all()
    assert (found > 1e-9).sum() == 2


@pytest.mark.parametrize("unit", [False, True])
def test_pair_products_are_quantiles_over_all_pairs(unit: bool) -> None:
    vectors = rows() / np.linalg.norm(rows(), axis=1, keepdims=True) if unit else rows()
    pairs = (vectors @ vectors.T)[np.triu_indices(60, 1)]
    found, used = geometry.pair_products(rows(), unit)
    assert used == 60
    np.testing.assert_allclose(found, np.quantile(pairs, geometry.LEVELS), atol=1e-5)


def test_pairs_of_many_rows_are_a_sample_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, _ = geometry.pair_products(rows(400))
    monkeypatch.setattr(geometry, "PAIR_ROWS", 200)
    found, used = geometry.pair_products(rows(400))
    assert used == 200
    np.testing.assert_array_equal(found, geometry.pair_products(rows(400))[0])
    middle = slice(40, -40)
    assert np.abs(found - everything)[middle].max() < 0.05 * np.ptp(everything)


def test_effective_rank_is_the_number_of_equal_values() -> None:
    assert geometry.effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert geometry.effective_rank(np.array([1.0, 0.0])) == pytest.approx(1)
    assert geometry.effective_rank(np.zeros(4)) == pytest.approx(1)
    p = np.array([0.5, 0.3, 0.2])
    assert geometry.effective_rank(7 * p) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("shape", [(60, 8), (8, 60)])
def test_the_rank_of_rows_needs_no_svd(shape: tuple[int, int]) -> None:
    matrix = rows(*shape)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert geometry.rank_of_rows(matrix) == pytest.approx(float(geometry.effective_rank(singular)), rel=1e-6)


def test_anisotropy_is_the_mean_cosine_of_all_pairs() -> None:
    unit = rows() / np.linalg.norm(rows(), axis=1, keepdims=True)
    assert geometry.anisotropy(rows()) == pytest.approx((unit @ unit.T)[np.triu_indices(60, 1)].mean())
    assert geometry.anisotropy(np.ones((5, 3))) == pytest.approx(1)


def test_singular_values_are_those_of_every_head_and_of_unit_vectors() -> None:
    model = build(GPTConfig(**SHAPE, n_kv_heads=1))
    plain, unit = weights.singular_values(model), weights.singular_values(model, unit=True)
    assert {name: values.shape for name, values in plain.items()} == {
        "Q": (2, 3, 8), "K": (2, 1, 8), "V": (2, 1, 8), "W_o": (2, 3, 8),
        "W_u": (2, 1, 24), "W_v": (2, 1, 24), "W_oMLP": (2, 1, 24),
    }  # fmt: skip
    o = model.get_parameter("blocks.1.attention.part.o.weight").detach().double().numpy()
    head = o[:, 8:16] / np.linalg.norm(o[:, 8:16], axis=0)
    np.testing.assert_allclose(unit["W_o"][1, 1], np.linalg.svd(head, compute_uv=False), rtol=1e-9)
    u = model.get_parameter("blocks.0.mlp.part.u.weight").detach().double().numpy()
    np.testing.assert_allclose(plain["W_u"][0, 0], np.linalg.svd(u, compute_uv=False), rtol=1e-9)


def test_unit_vectors_change_nothing_on_the_sphere() -> None:
    model = build(NGPTConfig(**SHAPE))
    plain, unit = weights.singular_values(model), weights.singular_values(model, unit=True)
    for name in plain:
        np.testing.assert_allclose(plain[name], unit[name], rtol=1e-5)


def test_off_sphere_is_the_departure_matrix_by_matrix() -> None:
    model = build(NGPTConfig(**SHAPE))
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.part.o.weight")[:, 3] *= 1.25
    found = geometry.off_sphere(model)
    assert max(found, key=found.__getitem__) == "W_oMLP"
    assert found["W_oMLP"] == pytest.approx(departure(model)) == pytest.approx(0.25, abs=1e-6)
    assert max(value for name, value in found.items() if name != "W_oMLP") < 1e-6


def test_off_sphere_of_a_gpt_is_how_far_its_vectors_are_from_unit() -> None:
    model = build(GPTConfig(**SHAPE))
    rows_of_q = [block.attention.part.q.weight.norm(dim=1) for block in model.blocks]  # type: ignore[union-attr, operator]
    expected = (torch.cat(rows_of_q) - 1).abs().max().item()
    assert geometry.off_sphere(model)["Q"] == pytest.approx(expected, rel=1e-6)


def test_vector_lengths_are_sorted_and_of_one_layer() -> None:
    model = build(GPTConfig(**SHAPE))
    expected = model.get_parameter("blocks.1.attention.part.k.weight").detach().double().norm(dim=1).sort().values
    np.testing.assert_allclose(geometry.vector_lengths(model, "K", 1), expected.numpy(), rtol=1e-12)
