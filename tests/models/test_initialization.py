"""Where the weights start: PAPER's distributions, role by role."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import paper
import pytest
import torch
from oracle_names import oracle_names, oracle_parameters

from spherelm.layers.linear import departure
from spherelm.models import (
    DecoderArch,
    EncDecArch,
    EncoderArch,
    GPTConfig,
    NGPTConfig,
    ScaleSpec,
    build,
)

SIZES: dict[str, Any] = {"vocab_size": 300, "n_layers": 3, "d_model": 64, "n_heads": 4, "max_seq_len": 16}
BUILDERS = [GPTConfig, NGPTConfig]


def test_gpt_matrices_by_role() -> None:
    model = build(GPTConfig(**SIZES))
    for name, w in oracle_parameters(model):
        if w.ndim == 1:
            assert torch.equal(w, torch.ones_like(w)), name
            continue
        wanted = 0.02 / math.sqrt(2 * 3) if name.endswith(".o.weight") else 0.02
        assert w.std().item() == pytest.approx(wanted, rel=0.05), name
        assert abs(w.mean().item()) < 5 * wanted / math.sqrt(w.numel()), name
        kurtosis = ((w / w.std()) ** 4).mean().item()
        assert kurtosis == pytest.approx(3, rel=0.15), f"{name} is not normally distributed"


def test_gpt_init_std_is_a_field() -> None:
    model = build(GPTConfig(**SIZES, init_std=0.5))
    assert model.embed.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.blocks[0].mlp.part.o.weight.std().item() == pytest.approx(0.5 / math.sqrt(6), rel=0.05)


def test_ngpt_matrices_are_unit_along_their_axis_in_every_direction() -> None:
    model = build(NGPTConfig(**SIZES))
    assert departure(model) < 3e-7
    for name, w in oracle_parameters(model):
        axis = paper.unit_axis(name)
        if axis is None:
            continue
        lengths = w.double().norm(dim=axis)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=3e-7)
        assert w.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.02), name
        assert abs(w.mean().item()) < 5 * 0.125 / math.sqrt(w.numel()), name
        other = w.double().norm(dim=1 - axis)
        assert other.std() > 1e-3, f"{name} is unit along both axes"


def test_ngpt_scales_start_at_the_papers_values() -> None:
    model = build(NGPTConfig(**SIZES))
    start = 1 / math.sqrt(64)
    stored = {"alpha_a": start, "alpha_m": start, "s_qk": start, "s_u": 1.0, "s_v": 1.0, "s_z": start}
    used = {"alpha_a": 0.05, "alpha_m": 0.05, "s_qk": 1.0, "s_u": 1.0, "s_v": 1.0, "s_z": 1.0}
    shapes = {"alpha_a": (64,), "alpha_m": (64,), "s_qk": (4, 16), "s_u": (256,), "s_v": (256,), "s_z": (300,)}
    seen = set()
    parameters = dict(model.named_parameters())
    for name, theirs in oracle_names(parameters).items():
        if not name.endswith(".value"):
            continue
        path, value, scale = name.removesuffix(".value"), parameters[name], theirs.split(".")[-2]
        seen.add(scale)
        assert value.shape == shapes[scale], name
        assert value.unique().tolist() == pytest.approx([stored[scale]]), name
        assert model.get_submodule(path)().unique().tolist() == pytest.approx([used[scale]]), name
    assert seen == stored.keys()


COMMON: dict[str, tuple[Any, set[str]]] = {
    "ngpt": (NGPTConfig(**SIZES), {"embed.weight", "head.linear.weight"}),
    "tied": (NGPTConfig(**SIZES, tie_embeddings=True), {"embed.weight"}),
    "encoder": (NGPTConfig(**SIZES, architecture=EncoderArch()), {"embed.weight", "head.linear.weight"}),
    "hybrid": (NGPTConfig(**SIZES, architecture=DecoderArch(pattern="MA-")), {"embed.weight", "head.linear.weight"}),
}


@pytest.mark.parametrize("kind", COMMON)
def test_rows_of_embeddings_start_towards_one_direction_and_nothing_else_does(kind: str) -> None:
    config, leaning = COMMON[kind]
    weights = []
    for common_start in (0.0, 3.0):
        torch.manual_seed(0)
        weights.append(dict(build(replace(config, common_start=common_start)).named_parameters()))
    plain, together = weights
    moved = {name for name, w in together.items() if not torch.equal(w, plain[name])}
    # What a mixer's state space starts from is drawn after all matrices.
    assert {name for name in moved if ".ssm." not in name} == leaning
    directions = []
    for name in sorted(leaning):
        # Norm(e + 3 c) with unit e and c: stretched so that what is left beside e has length 3, every row leaves the
        # same 3 c.
        e, row = plain[name].double(), together[name].double()
        cosine = (e * row).sum(dim=1, keepdim=True)
        stretch = cosine + (cosine**2 + 8).sqrt()
        common = (stretch * row - e) / 3
        torch.testing.assert_close(common, common[:1].expand_as(common), rtol=0, atol=2e-6)
        torch.testing.assert_close(common.norm(dim=1), torch.ones(len(row)).double(), rtol=0, atol=2e-6)
        directions.append(common[0])
    if len(directions) == 2:
        assert abs(directions[0] @ directions[1]) < 0.5, "the embeddings share their direction"


def test_logits_start_nearly_equal_where_rows_start_together() -> None:
    h = torch.nn.functional.normalize(torch.randn(50, 64), dim=-1)
    spread = []
    for common_start in (0.0, 8.0):
        model = build(NGPTConfig(**SIZES, s_z=ScaleSpec(32.0), common_start=common_start))
        spread.append((32 * h @ model.head.linear.weight.T).std(dim=-1).mean().item())
    assert spread[0] == pytest.approx(32 / 8, rel=0.05)
    assert spread[1] == pytest.approx(32 / 8 / math.sqrt(65), rel=0.1)


def test_a_negative_common_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"common_start must be at least 0, got -1\.0"):
        NGPTConfig(**SIZES, common_start=-1.0)


@pytest.mark.parametrize("config_class", BUILDERS)
@pytest.mark.parametrize("tie", [False, True])
def test_the_seed_decides_the_weights(config_class: Any, tie: bool) -> None:
    config = config_class(**SIZES, tie_embeddings=tie)
    torch.manual_seed(3)
    first = build(config)
    torch.manual_seed(3)
    again = build(config)
    other = build(config)
    assert all(p.dtype == torch.float32 for p in first.parameters())
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.unique().numel() == 1 or not torch.equal(a, c), name


WHOLE: dict[str, dict[str, Any]] = {
    "decoder": {},
    "qk norm": {"qk_norm": True},
    "tied": {"tie_embeddings": True},
    "hybrid with experts": {"architecture": DecoderArch(pattern="MAO"), "d_model": 128},
    "encoder": {"architecture": EncoderArch()},
    "encoder-decoder": {"architecture": EncDecArch()},
}
"""Between them every kind of module that has weights."""


@pytest.mark.parametrize(
    ("config_class", "name"), [(c, n) for c in BUILDERS for n in WHOLE if (c, n) != (NGPTConfig, "qk norm")]
)
def test_every_weight_can_be_drawn_again(config_class: Any, name: str) -> None:
    config = config_class(**SIZES | WHOLE[name])
    model = build(config)
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 3)
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    fresh = build(config)
    torch.manual_seed(0)
    fresh.init_weights()
    wanted = fresh.state_dict()
    for weight, found in model.state_dict().items():
        assert torch.equal(found, wanted[weight]), weight


def test_an_untrained_model_knows_nothing() -> None:
    tokens = torch.randint(300, (2, 16))
    for config in (GPTConfig(**SIZES), NGPTConfig(**SIZES)):
        with torch.no_grad():
            loss = build(config).loss(tokens, tokens.roll(-1, 1)).item()
        assert loss == pytest.approx(math.log(300), rel=0.02)
