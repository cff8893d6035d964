"""Measurements of weights against numpy, and on models whose measurements are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from configs import make_config

from spherelm.analysis import weights
from spherelm.analysis.geometry import off_sphere
from spherelm.models import GPTConfig, NGPTConfig, build
from spherelm.models.decoder import Decoder

CONFIGS = {"gpt": GPTConfig, "ngpt": NGPTConfig}


def perturbed(arm: str, **fields: int) -> Decoder:
    shape = {"vocab_size": 37, "n_layers": 3, "d_model": 24, "n_heads": 3, "d_ff": 64, "max_seq_len": 16}
    model = build(CONFIGS[arm](**{**shape, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.9 * torch.randn_like(parameter))
    return model


def array(model: Decoder, name: str) -> np.ndarray:
    return model.get_parameter(name).detach().double().numpy()


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
def test_condition_numbers_are_numpys_median_over_heads(arm: str) -> None:
    model = perturbed(arm, n_kv_heads=1)
    measured = weights.condition_numbers(model)
    for layer in range(3):
        for name, path, heads in (("Q", "q", 3), ("K", "k", 1), ("V", "v", 1), ("W_o", "o", 3)):
            weight = array(model, f"blocks.{layer}.attention.part.{path}.weight")
            slices = np.split(weight, heads, axis=1 if name == "W_o" else 0)
            assert all(8 in piece.shape for piece in slices)
            assert measured[name][layer] == pytest.approx(
                np.median([np.linalg.cond(piece) for piece in slices]), rel=1e-9
            )
        for name, path in (("W_u", "u"), ("W_v", "v"), ("W_oMLP", "o")):
            weight = array(model, f"blocks.{layer}.mlp.part.{path}.weight")
            assert measured[name][layer] == pytest.approx(np.linalg.cond(weight), rel=1e-9)


def test_an_mlp_without_a_gate_has_two_matrices() -> None:
    model = build(make_config("ngpt", vocab_size=37, n_layers=2, d_model=24, n_heads=3, activation="relu2"))
    names = {"Q", "K", "V", "W_o", "W_u", "W_oMLP"}
    report = weights.measure(model)
    assert report.condition_numbers.keys() == names
    assert "s_v" not in report.scales
    assert off_sphere(model).keys() == names | {"input", "output"}


def test_a_matrix_without_full_rank_has_an_infinite_condition_number() -> None:
    model = perturbed("gpt", n_layers=1)
    model.get_parameter("blocks.0.mlp.part.u.weight").data.zero_()
    model.get_parameter("blocks.0.mlp.part.u.weight").data[0, 0] = 1
    assert weights.condition_numbers(model)["W_u"][0] == np.inf


@pytest.mark.parametrize("condition", [1e1, 9e3, 1.1e4, 1e6])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_singular_values_are_those_a_matrix_was_made_of(condition: float, shape: tuple[int, int]) -> None:
    """On both sides of the condition number up to which a Gram matrix serves."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.standard_normal((n, 12)))[0] for n in shape)
    values = np.geomspace(3.0, 3.0 / condition, 12)
    pair = np.stack(((left * values) @ right.T, random.standard_normal(shape)))
    found = weights._singular(pair)
    assert np.allclose(found[0], values, rtol=1e-7, atol=0)
    assert np.allclose(found[1], np.linalg.svd(pair[1], compute_uv=False), rtol=1e-10, atol=0)


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
def test_embedding_norms_are_sorted_row_norms(arm: str) -> None:
    model = perturbed(arm)
    norms = weights.embedding_norms(model)
    for table, name in (("input", "embed.weight"), ("output", "head.linear.weight")):
        expected = np.sort(np.sqrt((array(model, name) ** 2).sum(axis=1)))
        np.testing.assert_allclose(norms[table], expected, rtol=1e-12)


def test_scales_are_effective_values() -> None:
    config = make_config(
        "ngpt",
        vocab_size=37,
        n_layers=3,
        d_model=24,
        n_heads=3,
        **{"alpha.init": 0.2, "s_z.init": 24**0.5, "s_qk.init": 0.5, "s_u.init": 2.0, "s_u.scale": 0.1},
    )
    fresh = weights.measure(build(config))
    expected = {"alpha_A": 0.2, "alpha_M": 0.2, "s_qk": 0.5, "s_u": 2.0, "s_v": 1.0}
    assert fresh.scales.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(fresh.scales[name], [value] * 3, rtol=1e-6)
    assert fresh.s_z is not None
    np.testing.assert_allclose(fresh.s_z, 24**0.5, rtol=1e-6)


def test_scales_are_averaged_per_layer_and_alpha_is_absolute() -> None:
    model = perturbed("ngpt")
    scales = weights.scales(model)
    stored = 24**-0.5
    for layer in range(3):
        alpha = array(model, f"blocks.{layer}.attention.alpha.value") * 0.05 / stored
        assert (alpha < 0).any()
        assert scales["alpha_A"][layer] == pytest.approx(np.abs(alpha).mean(), rel=1e-6)
        s_qk = array(model, f"blocks.{layer}.attention.part.s_qk.value") / stored
        assert scales["s_qk"][layer] == pytest.approx(s_qk.mean(), rel=1e-6)
    expected = np.sort(array(model, "head.s_z.value") / stored)
    np.testing.assert_allclose(weights.logit_scales(model), expected, rtol=1e-6)


def test_a_gpt_has_no_scales() -> None:
    report = weights.measure(perturbed("gpt"))
    assert report.scales == {}
    assert report.s_z is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.mlp.part.o.weight", "head.linear.weight", "blocks.2.attention.norm.weight"])
def test_a_diverged_model_is_refused(name: str, value: float) -> None:
    model = perturbed("gpt")
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"{name} holds NaN or Inf"):
        weights.measure(model)


def test_another_module_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot measure a Linear"):
        weights.measure(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
