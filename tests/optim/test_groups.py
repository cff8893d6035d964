from __future__ import annotations

import dataclasses
import math
from typing import Any

import golden
import pytest
import torch
from cases import train
from oracle_names import oracle_names, oracle_parameters
from torch import nn

from spherelm.optim import AdamW, GatedAdamW, Muon
from spherelm.optim.groups import (
    ROLES,
    OptimConfig,
    RateMultipliers,
    build_optimizer,
    parameter_roles,
    set_rate,
)

both_arms = pytest.mark.parametrize("arm", golden.ARMS)


def role_by_name(name: str) -> str:
    """The roles as PAPER lists them, from the names alone."""
    if name.startswith("embed."):
        return "input_embedding"
    if name.startswith("head."):
        return "output_embedding"
    if name.endswith(".value"):
        return "scale"
    return "gain" if "norm" in name else "matrix"


@both_arms
def test_every_parameter_has_the_role_of_its_kind(arm: str, case: Any) -> None:
    model = case(arm).model
    names = oracle_names(dict(model.named_parameters()))
    assert parameter_roles(model) == {name: role_by_name(theirs) for name, theirs in names.items()}


@both_arms
@pytest.mark.parametrize("tie", [False, True])
def test_every_parameter_is_in_exactly_one_group(arm: str, tie: bool, case: Any) -> None:
    model = case(arm, tie_embeddings=tie).model
    groups = build_optimizer(model, OptimConfig(lr=1e-3)).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    assert len({group["role"] for group in groups}) == len(groups)


@both_arms
def test_a_tied_weight_is_an_output_embedding(arm: str, case: Any) -> None:
    roles = parameter_roles(case(arm, tie_embeddings=True).model)
    assert roles["embed.weight"] == "output_embedding"
    assert "head.linear.weight" not in roles


@pytest.mark.parametrize(("arm", "asked", "decay"), [("gpt", None, 0.1), ("ngpt", None, 0.0), ("gpt", 0.3, 0.3)])
def test_decay_reaches_matrices_and_embeddings_only(arm: str, asked: float | None, decay: float, case: Any) -> None:
    optimizer = build_optimizer(case(arm).model, OptimConfig(lr=1e-3, weight_decay=asked))
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if group["role"] in ("gain", "scale") else decay), group["role"]


@pytest.mark.row("Optimizers")
@both_arms
@pytest.mark.parametrize("role", ROLES)
def test_a_multiplier_reaches_exactly_its_role(arm: str, role: str, case: Any) -> None:
    """Adam's first step is proportional to the rate: compare what moved, and by how much."""
    moved = []
    for multiplier in (1.0, 0.25):
        c = case(arm)
        config = OptimConfig(lr=1e-4, weight_decay=0.0, multipliers=RateMultipliers(**{role: multiplier}))
        train(c.model, config, c.batches(1))
        moved.append({name: p.detach() - c.weights[name] for name, p in oracle_parameters(c.model)})
    for name, full in moved[0].items():
        if role_by_name(name) != role:
            assert torch.equal(moved[1][name], full), name
        else:
            # retraction bends the path a little: proportional up to the size of the step
            assert (moved[1][name] - full / 4).norm() <= 0.01 * full.norm(), name
            assert full.norm() > 0


def test_a_new_rate_keeps_the_multipliers(case: Any) -> None:
    multipliers = RateMultipliers(0.5, 2.0, 1.0, 3.0, 1.0)
    optimizer = build_optimizer(case("ngpt").model, OptimConfig(lr=1e-3, multipliers=multipliers))
    set_rate(optimizer, 0.1)
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"input_embedding": 0.05, "output_embedding": 0.2, "matrix": 0.1, "scale": 0.3})


def test_any_module_gets_roles_from_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert parameter_roles(model) == {"0.weight": "matrix", "0.bias": "gain", "1.weight": "gain", "1.bias": "gain"}


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_torch_are_no_matrices_for_muon(tied: bool) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 7, bias=False))
    if tied:
        model[2].weight = model[0].weight
    roles = parameter_roles(model)
    assert roles == {"0.weight": "input_embedding", "1.weight": "matrix"} | ({} if tied else {"2.weight": "matrix"})


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    model[0].weight.requires_grad_(False)
    assert parameter_roles(model) == {"1.weight": "matrix"}
    assert len(build_optimizer(model, OptimConfig(lr=1.0)).param_groups) == 1


def test_an_unknown_role_is_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.role = "matrx"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Linear at '0' declares role 'matrx'; roles are input_embedding"):
        parameter_roles(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr must be more than 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"betas": "0.9"}, "betas must be a list, got '0.9'"),
        ({"betas": 0.9}, "betas must be a list, got 0.9"),
        ({"betas": [0.9]}, r"betas must be a list of 2, got \[0.9\]"),
        ({"betas": [0.9, None]}, r"betas.1 must be a valid number, got None"),
        ({"betas": (0.9, 1.0)}, r"betas.1 must be less than 1, got 1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be more than 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number, got inf"),
        ({"eps": None}, "eps must be a valid number, got None"),
        ({"eps": 0}, "eps must be at least 1.175e-38, got 0"),
        ({"gated_step": 10**400}, "gated_step must be a valid number, got 1000"),
        ({"max_angle": math.inf}, "max_angle must be a finite number, got inf"),
        ({"max_angle": True}, "max_angle must be a valid number, got True"),
        ({"eps_gate": math.inf}, "eps_gate must be a finite number, got inf"),
        ({"momentum": None}, "momentum must be a valid number, got None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    kind = {"gated_step": GatedAdamW, "eps_gate": GatedAdamW, "momentum": Muon}.get(next(iter(fields)), AdamW)
    own = {field.name for field in dataclasses.fields(kind)} & fields.keys()
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{"lr": 1e-3, **({"optimizer": kind(**fields)} if own else fields)})
