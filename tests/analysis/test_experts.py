"""Measurements of mixtures of experts, and how layers of other kinds are found among those of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paper
import paper_moe
import pytest
import torch
from cases import WITH_EXPERTS, E, model_with_experts
from torch import Tensor

from spherelm.analysis import geometry, weights
from spherelm.analysis.experts import between_proposals, between_rows, look_at_experts
from spherelm.analysis.inside import attention_layer, look_inside
from spherelm.analysis.motion import measure_motion
from spherelm.analysis.recording import record
from spherelm.layers.linear import departure
from spherelm.layers.moe import routers
from spherelm.models import Decoder, NGPTConfig, build
from spherelm.optim import OptimConfig, build_optimizer
from spherelm.report.inside_tables import write_tables
from spherelm.report.state_figures import expert_section, motion_section
from spherelm.report.weight_figures import weight_section
from spherelm.train.diagnostics import Diagnosis, load_of_experts

TOKENS = torch.randint(23, (4, 8), generator=torch.Generator().manual_seed(5))
D = 16
both_arms = pytest.mark.parametrize("arm", ["gpt", "ngpt"])


def model_of(arm: str) -> Decoder:
    return model_with_experts(arm).eval()


@both_arms
def test_load_is_how_often_each_expert_is_picked(arm: str) -> None:
    model = model_of(arm)
    picked: list[Tensor] = []
    handles = [r.register_forward_hook(lambda _, __, out: picked.append(out.experts)) for _, r in routers(model)]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    found = look_at_experts(model, TOKENS)
    assert found is not None
    assert found.layers.tolist() == [1, 2]
    for load, experts in zip(found.load, picked, strict=True):
        wanted = [(experts == e).sum().item() / experts.numel() for e in range(E)]
        assert load.tolist() == pytest.approx(wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_angles_are_between_what_experts_make_of_the_same_state() -> None:
    """As the oracle computes each of them, with angles from dot products."""
    mixture = model_with_experts().double().blocks[1].experts.part  # type: ignore[union-attr]
    states = paper.norm(torch.randn(7, D, dtype=torch.float64))
    p = dict(mixture.named_parameters())
    made = [
        paper.norm(paper.mlp(paper_moe.expert(p, "", e), "", paper.Shape(1, D, 2, 2), states).detach())
        for e in range(E)
    ]
    found, rows = between_proposals(mixture, states), paper.norm(mixture.router.weight.detach())
    for a in range(E):
        for b in range(E):
            wanted = (made[a] * made[b]).sum(-1).clamp(-1, 1).acos().mean().rad2deg() if a != b else 0.0
            assert found[a, b].item() == pytest.approx(float(wanted), abs=1e-6)
            between = (rows[a] @ rows[b]).acos().rad2deg() if a != b else 0.0
            assert between_rows(mixture)[a, b].item() == pytest.approx(float(between), abs=1e-6)


def test_equal_experts_are_at_no_angle() -> None:
    mixture = model_with_experts().double().blocks[0].experts.part  # type: ignore[union-attr]
    for bank in (mixture.u, mixture.v, mixture.o):
        bank.weight.data[:] = bank.weight.data[:1].clone()
    assert between_proposals(mixture, torch.randn(5, D, dtype=torch.float64)).abs().max() < 1e-6


def test_a_model_without_experts_has_none_and_no_section() -> None:
    model = build(NGPTConfig(**WITH_EXPERTS)).eval()
    assert look_at_experts(model, TOKENS) is None
    assert expert_section({"ngpt": [look_inside(model, TOKENS)]}) == []


@both_arms
def test_layers_are_found_by_their_parts(arm: str) -> None:
    """Of the second layer alone the experts are an MLP."""
    model = model_of(arm)
    model.blocks[1] = build(model.config).blocks[1]
    recording = record(model, TOKENS)
    assert recording.steps == [(1, "attention"), (1, "experts"), (2, "attention"), (2, "MLP")]
    motion = measure_motion(model, recording)
    assert motion.depths.tolist() == [0, 0.5, 1, 1.5, 2]
    assert [motion.of_part(part)[1] for part in ("attention", "experts", "MLP", "mixer")] == [[0, 2], [1], [3], []]
    places = weights.places(model)
    assert {name: places[name].tolist() for name in ("Q", "E_u", "W_u", "W_in")} == {
        "Q": [1, 2],
        "E_u": [1],
        "W_u": [2],
        "W_in": [],
    }
    singular = weights.singular_values(model)
    assert {name: values.shape[:2] for name, values in singular.items()} == {
        **dict.fromkeys(("Q", "K", "V", "W_o"), (2, 2)),
        **dict.fromkeys(("E_u", "E_v", "E_o"), (1, E)),
        **dict.fromkeys(("W_u", "W_v", "W_oMLP"), (1, 1)),
    }
    bank = model.get_parameter("blocks.0.experts.part.o.weight").detach().double().numpy()
    np.testing.assert_allclose(singular["E_o"][0, 3], np.linalg.svd(bank[3], compute_uv=False), rtol=1e-6)


def test_off_sphere_looks_at_every_expert() -> None:
    model = model_of("ngpt")
    model.get_parameter("blocks.1.experts.part.o.weight").data[4, :, 2] *= 1.25
    found = geometry.off_sphere(model)
    assert max(found, key=found.__getitem__) == "E_o"
    assert found["E_o"] == pytest.approx(departure(model)) == pytest.approx(0.25, abs=1e-6)


def test_figures_and_tables_of_experts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]' in a clone of spherelm")
    found = {arm: [look_inside(model_of(arm), TOKENS) for _ in range(2)] for arm in ("gpt", "ngpt")}
    figures = {figure.key: figure for figure in expert_section(found)}
    assert list(figures) == ["expert-load", "expert-angles", "expert-map"]
    assert all("<svg" in figure.svg and "<image" not in figure.svg for figure in figures.values())
    assert "of the experts" in figures["expert-load"].caption
    others = {figure.key for figure in [*weight_section(found), *motion_section(found)]}
    assert {"cond-experts", "scales", "angles"} <= others
    assert "cond-mlp" not in others
    written = write_tables([(arm, arm, seeds[0], [(1, {"Q": 0.0})]) for arm, seeds in found.items()], tmp_path)
    assert {"expert_load", "expert_angles"} <= {path.stem for path in written}


def test_a_layer_without_attention_is_refused_by_name() -> None:
    assert attention_layer([2, 5, 6], None) == 1
    assert attention_layer([2, 5, 6], 5) == 2
    with pytest.raises(ValueError, match="layer 1 has no attention: choose among 2, 5"):
        attention_layer([2, 5], 0)


def test_an_update_tells_its_load_and_the_angles_of_banks() -> None:
    model = model_with_experts()
    optimizer = build_optimizer(model, OptimConfig(lr=0.05))
    diagnosis = Diagnosis(model, optimizer)
    model.loss(TOKENS, TOKENS).backward()
    optimizer.step()
    told = diagnosis.measure()
    assert 0 < told["angle_mean"]["matrix"] < told["angle_max"]["matrix"] < 1
    for place, (_, router) in enumerate(routers(model)):
        part = router.seen.double() / 64
        assert told["load_max_by_layer"][place] == pytest.approx(part.max().item() * E)
        entropy = -sum(p * p.log() for p in part if p > 0) / np.log(E)
        assert told["load_entropy_by_layer"][place] == pytest.approx(float(entropy))
        assert told["bias_range_by_layer"][place] == pytest.approx(2e-3, rel=1e-4)
    summary = load_of_experts([router.seen for _, router in routers(model)])
    assert summary["load_max"] == max(told["load_max_by_layer"])
    assert summary["load_entropy"] == pytest.approx(np.mean(told["load_entropy_by_layer"]))
    assert load_of_experts([]) == {}
