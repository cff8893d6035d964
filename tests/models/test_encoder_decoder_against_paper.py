"""Both encoder-decoders against the oracle, which reads every pair alone and unpadded:
logits, loss, gradients, training.
"""

from __future__ import annotations

from typing import Any

import paper
import pytest
from cases import ARMS, assert_computes, assert_retracts, assert_trains, make_pair_case

from spherelm.layers.linear import unit_modules

FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "as deep as the decoder": {"n_encoder_layers": None},
    "grouped queries": {"n_heads": 6, "n_kv_heads": 2},
    "shared": {"share_embeddings": True},
    "tied": {"tie_embeddings": True},
    "one embedding": {"share_embeddings": True, "tie_embeddings": True},
    "rope base": {"rope_base": 100.0},
}
SCALES: dict[str, dict[str, Any]] = {
    "alpha": {"alpha.init": 0.5, "alpha.scale": 0.3},
    "s_qk": {"s_qk.init": 0.33, "s_qk.scale": 1.0},
    "s_u, s_v, s_z": {"s_u.init": 0.2, "s_v.scale": 2.0, "s_z.init": 24**0.5},
}
NORMED: dict[str, dict[str, Any]] = {"norm of q and k": {"qk_norm": True, "n_heads": 6, "n_kv_heads": 2}}
OWN = [("ngpt", name) for name in SCALES] + [("gpt", name) for name in NORMED]
CASES = [(arm, name) for arm in ARMS for name in FIELDS] + OWN


@pytest.mark.row("Models")
@pytest.mark.parametrize(("arm", "name"), CASES)
def test_logits_loss_and_every_gradient(arm: str, name: str) -> None:
    assert_computes(make_pair_case(arm, **{**FIELDS, **SCALES, **NORMED}[name]), 2e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_the_smoothed_loss(arm: str) -> None:
    c = make_pair_case(arm)
    wanted = paper.smoothed_cross_entropy(c.forward(c.weights, c.shape, c.read), c.targets, 0.1)
    c.model.runtime.label_smoothing = 0.1
    assert c.model.loss(*c.batch).item() == pytest.approx(wanted.item(), rel=1e-13)
    plain = paper.cross_entropy(c.model(c.source, c.tokens), c.targets)
    assert c.model.eval().loss(*c.batch).item() == pytest.approx(plain.item(), rel=1e-13)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("fields", [{}, {"share_embeddings": True, "tie_embeddings": True}], ids=str)
def test_training_is_the_oracles(arm: str, fields: dict[str, Any]) -> None:
    assert_trains(make_pair_case(arm, **fields), 10)


@pytest.mark.parametrize("fields", [{}, {"share_embeddings": True}, {"tie_embeddings": True}], ids=str)
def test_retraction_finds_every_matrix_along_the_papers_axis(fields: dict[str, Any]) -> None:
    assert_retracts(make_pair_case("ngpt", **fields))
    assert not list(unit_modules(make_pair_case("gpt", **fields).model))


MISTAKES = {
    "no rotation in the encoder": ("rope", lambda x, base: x),
    "s_qk on q only": ("scale_q_k", lambda q, k, s_qk: (paper.norm(q) * s_qk, paper.norm(k))),
    "keys not normalized": ("scale_q_k", lambda q, k, s_qk: (paper.norm(q) * s_qk, k * s_qk)),
    "another softmax scale": ("softmax_scale", lambda d_k: d_k**-0.5),
    "cross-attention left out": ("cross", lambda p, prefix, shape, h, memory: h),
    "the source in reverse": ("encoder", lambda p, shape, source: right_encoder(p, shape, source.flip(0))),
}
right_encoder = paper.encoder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_notices(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, replacement = MISTAKES[mistake]
    monkeypatch.setattr(paper, name, replacement)
    c = make_pair_case("ngpt")
    wanted = c.forward(c.weights, c.shape, c.read)
    assert (c.model(c.source, c.tokens) - wanted).abs().max() > 1e-6 * wanted.abs().max()
