"""A folded model computes what the model computes, in every composition that there is, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

from spherelm import departure
from spherelm.generation.folding import Folded, folded, obstacle
from spherelm.layers.linear import Linear, Scale
from spherelm.models import Decoder

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {}),
    "gpt, grouped": ("gpt", {"n_kv_heads": 1}),
    "gpt, tied": ("gpt", {"tie_embeddings": True}),
    "gpt, norm of q and k": ("gpt", {"qk_norm": True, "n_kv_heads": 1}),
    "gpt, nvidia's rope": ("gpt", {"rope": "nvidia"}),
    "ngpt": ("ngpt", {}),
    "grouped": ("ngpt", {"n_kv_heads": 1}),
    "tied": ("ngpt", {"tie_embeddings": True}),
    "nvidia": ("ngpt", {"rope": "nvidia", "variant.step": "nvidia"}),
    "riemannian": ("ngpt", {"variant.step": "riemannian", "variant.alpha_sign": "free"}),
    "no norm of q and k": ("ngpt", {"variant.qk_norm": False}),
    "scalars": ("ngpt", {f"{name}.form": "scalar" for name in ("alpha", "s_qk", "s_u", "s_v", "s_z")}),
    "squared ReLU": ("ngpt", {"activation": "relu2"}),
    "gpt, squared ReLU": ("gpt", {"activation": "relu2"}),
    "inner norms": ("ngpt", {"variant.inner_norm": True}),
    "inner norms, squared ReLU": ("ngpt", {"variant.inner_norm": True, "activation": "relu2", "n_kv_heads": 1}),
    "preconditioned": ("ngpt", {"logit_preconditioning": 1.0}),
}
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))
both_arms = pytest.mark.parametrize("arm", golden.ARMS)


def decoded(model: Decoder, tokens: Tensor) -> Tensor:
    """The logits of every position, read a few and then one at a time through the cache."""
    cache = model.new_cache()
    pieces = tokens.split([4] + [1] * (tokens.shape[1] - 4), dim=1)
    return torch.cat([model(piece, cache) for piece in pieces], dim=1)


@pytest.mark.row("Generation")
@every_variant
def test_folded_is_unfolded(variant: str, case: Any) -> None:
    arm, fields = VARIANTS[variant]
    c = case(arm, **fields)
    wanted, small = c.model(c.tokens), folded(c.model)
    torch.testing.assert_close(small(c.tokens), wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(decoded(small, c.tokens), wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(small.loss(c.tokens, c.targets), c.model.loss(c.tokens, c.targets))


@every_variant
def test_in_float32_folded_is_unfolded_within_1e_5(variant: str, case: Any) -> None:
    arm, fields = VARIANTS[variant]
    c = case(arm, **fields)
    model = c.model.float()
    wanted = model(c.tokens)
    assert (decoded(folded(model), c.tokens) - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


@both_arms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_model_has_the_dtype_that_is_computed_in(arm: str, dtype: torch.dtype, case: Any) -> None:
    """Its scales are multiplied into the matrices before these are rounded,
    so the error is that of the number format.
    """
    c = case(arm)
    exact, model = c.model(c.tokens), c.model.float()
    model.runtime.compute_dtype = dtype
    small = folded(model)
    assert {p.dtype for p in small.parameters()} == {dtype}
    scale = exact.abs().max()
    ours, folds = ((m(c.tokens).double() - exact).abs().max() / scale for m in (model, small))
    assert folds <= 2 * ours + 4 * torch.finfo(dtype).eps


@both_arms
def test_no_scale_is_left_and_products_with_one_input_are_one(arm: str, case: Any) -> None:
    small = folded(case(arm).model)
    assert not any(isinstance(module, Scale) for module in small.modules())
    for block in small.blocks:
        assert sum(isinstance(module, Linear) for module in block.modules()) == 4
    assert departure(small) == 0.0, "none of its weights is declared unit"
    assert all(not p.requires_grad for p in small.parameters())


@both_arms
def test_it_is_a_copy(arm: str, case: Any) -> None:
    c = case(arm)
    wanted, small = c.model(c.tokens), folded(c.model)
    before = small(c.tokens)
    with torch.no_grad():
        for parameter in c.model.parameters():
            parameter.add_(1.0)
    assert torch.equal(small(c.tokens), before)
    with torch.no_grad():
        for parameter in c.model.parameters():
            parameter.sub_(1.0)
        for parameter in small.parameters():
            parameter.zero_()
    torch.testing.assert_close(c.model(c.tokens), wanted)


def test_folding_again_changes_nothing(case: Any) -> None:
    small = folded(case("ngpt").model)
    assert folded(small) is small


def test_it_is_for_inference(case: Any) -> None:
    small = folded(case("ngpt").model)
    assert not small.training
    assert small.eval() is small
    for action in (small.train, small.init_weights):
        with pytest.raises(ValueError, match="a folded model is for inference: train the model that it was made from"):
            action()


class OtherMLP(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h


def change_mlp(model: Any) -> None:
    model.blocks[1].mlp.part = OtherMLP()


def add_hook(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda *_: None)


def change_step(model: Any) -> None:
    model.blocks[0].mlp.step = lambda h, target, alpha: h


def change_inner_norm(model: Any) -> None:
    model.blocks[0].mlp.part.inner = torch.tanh


def replace_product(model: Any) -> None:
    model.blocks[0].attention.part.q.product = lambda x, weight, scale=None: x


def compile_block(model: Any) -> None:
    model.blocks[0].forward = lambda *inputs: inputs[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_mlp, "blocks.1.mlp.part is a OtherMLP, not spherelm's"),
        (add_hook, "blocks.0 has hooks, which would not be called"),
        (change_step, "blocks.0.mlp takes a step on the sphere that is not known here"),
        (change_inner_norm, "blocks.0.mlp.part has an inner norm that is not known here"),
        (compile_block, "blocks.0 is a Block, not spherelm's"),
        (
            replace_product,
            "the product of blocks.0.attention.part.q is rounded or replaced, which a folded one would not be",
        ),
    ],
)
def test_what_is_not_known_is_not_folded(change: Callable[[Any], None], reason: str, case: Any) -> None:
    model = case("ngpt").model
    assert obstacle(model) is None
    change(model)
    assert obstacle(model) == reason
    with pytest.raises(ValueError, match=f"cannot be folded: {reason}; use it as it is"):
        folded(model)


def test_another_decoder_is_not_folded(case: Any) -> None:
    class Mine(type(case("gpt").model)):  # type: ignore[misc]
        pass

    c = case("gpt")
    c.model.__class__ = Mine
    with pytest.raises(ValueError, match="Mine is not a language model of attention and MLP alone"):
        folded(c.model)


def test_obstacle_of_a_folded_model_is_its_type(case: Any) -> None:
    assert isinstance(folded(case("gpt").model), Folded)
